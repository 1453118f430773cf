"""The decoding loop: exact on a two-token-memory toy whose every outcome is listed, and on a small
GPT-2."""

import itertools
import re
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fjax.log_probs import make_log_prob_fn, pack
from fjax.models import gpt2
from fjax.sampling import Samples, chain, greedy, identity, sample, temperature, top_k, top_p

EOS, V, T = 0, 4, 3


class Memory(NamedTuple):
    """The toy's cache: which columns are filled, how many, and how many tokens each row really
    has."""

    where: jax.Array
    length: jax.Array
    real: jax.Array


def memory(rows, columns):
    return Memory(jnp.zeros((rows, columns), bool), jnp.int32(0), jnp.zeros(rows, jnp.int32))


def toy_decode(table, tokens, cache, where=None):
    """Logits from the last token and from how many came before; ``table`` is ``[steps, V, V]``."""
    where = jnp.ones(tokens.shape, bool) if where is None else where
    filled = jax.lax.dynamic_update_slice_in_dim(cache.where, where, cache.length, axis=1)
    real = cache.real + where.sum(-1, dtype=jnp.int32)
    return table[real - 1, tokens[:, -1]], Memory(filled, cache.length + tokens.shape[1], real)


@pytest.fixture(scope="module")
def table():
    return 1.5 * jax.random.normal(jax.random.key(3), (8, V, V))


CONFIG = gpt2.GPT2Config(vocab_size=300, n_positions=24, n_embd=16, n_layer=2, n_head=2)
DECODE = gpt2.decode_fn(CONFIG)
TRANSFORM = chain(temperature(0.8), top_k(40), top_p(0.9))


@pytest.fixture(scope="module")
def params():
    """Random weights, large enough for the predictions to be far from uniform and to depend on the
    context."""
    return jax.tree.map(lambda x: 4.0 * x, gpt2.init_params(CONFIG, jax.random.key(1)))


def draw_gpt2(params, rng_key, prompt, *, where=None, row_ids=None, **options):
    settings = {"max_new_tokens": 10, "eos_id": EOS, "transform": TRANSFORM, **options}

    def run(params, rng_key, prompt, where, row_ids):
        cache = gpt2.init_cache(
            CONFIG, *prompt.shape[:1], prompt.shape[1] + settings["max_new_tokens"]
        )
        return sample(
            DECODE, params, rng_key, prompt, cache, where=where, row_ids=row_ids, **settings
        )

    return jax.jit(run)(params, rng_key, prompt, where, row_ids)


def ragged_prompts(rows=6, columns=5, seed=5):
    rng = np.random.default_rng(seed)
    where = np.arange(columns)[None] >= columns - 1 - rng.integers(0, columns, (rows, 1))
    return jnp.asarray(np.where(where, rng.integers(1, 300, (rows, columns)), EOS)), jnp.asarray(
        where
    )


def outcomes(ends=(EOS,)):
    """All finished sequences of at most T tokens, and all unfinished prefixes of exactly T."""
    for length in range(1, T + 1):
        for tokens in itertools.product(range(V), repeat=length):
            if not set(ends) & set(tokens[:-1]) and (tokens[-1] in ends or length == T):
                yield tokens


def exact_log_prob(log_table, tokens, first):
    lasts = (first, *tokens)
    return sum(float(log_table[step, lasts[step], token]) for step, token in enumerate(tokens))


@pytest.mark.parametrize("transform", [identity, chain(temperature(1.5), top_k(3)), top_p(0.85)])
def test_frequencies_on_a_listed_space(table, transform):
    """Chi-square over all outcomes with 5 or more expected; the threshold is the 1 - 1e-4 quantile,
    the seed fixed."""
    n, prompt = 20_000, jnp.array([[2]])
    draw = jax.jit(
        partial(
            sample,
            toy_decode,
            max_new_tokens=T,
            eos_id=EOS,
            transform=transform,
            samples_per_prompt=n,
        )
    )
    samples = draw(table, jax.random.key(0), prompt, memory(1, 1 + T))
    compare_with_the_listed_space(samples, list(outcomes()), table, transform, 1e-5)


def compare_with_the_listed_space(samples, space, table, transform, tolerance):
    n, log_table = len(samples.tokens), np.asarray(jax.nn.log_softmax(transform(table)))
    log_probs = np.array([exact_log_prob(log_table, tokens, 2) for tokens in space])
    # prefixes included, the space is whole
    np.testing.assert_allclose(np.exp(log_probs).sum(), 1.0, rtol=tolerance)

    place = {tokens: i for i, tokens in enumerate(space)}
    rows = zip(np.asarray(samples.tokens), np.asarray(samples.lengths), strict=True)
    drawn = np.array([place[tuple(tokens[:length].tolist())] for tokens, length in rows])
    np.testing.assert_allclose(samples.sequence_log_probs, log_probs[drawn], atol=tolerance)
    counts, expected = np.bincount(drawn, minlength=len(space)), n * np.exp(log_probs)
    assert not counts[expected == 0].any()
    often = expected >= 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert statistic < stats.chi2.ppf(1 - 1e-4, often.sum())


@pytest.mark.parametrize(
    "transform", [identity, temperature(0.7), top_k(20), top_p(0.9), TRANSFORM]
)
def test_log_probs_equal_an_uncached_rescoring(params, transform):
    """With left-padded prompts, against the teacher-forced model under the same transform."""
    prompt, where = ragged_prompts()
    samples = draw_gpt2(
        params, jax.random.key(0), prompt, where=where, transform=transform, samples_per_prompt=4
    )
    whole = jnp.concatenate([jnp.repeat(prompt, 4, 0), samples.tokens], 1)
    real = jnp.concatenate([jnp.repeat(where, 4, 0), samples.where], 1)
    logits_fn = partial(gpt2.logits_fn(CONFIG), start=prompt.shape[1] - 1)
    log_probs = jax.jit(lambda *inputs: jax.nn.log_softmax(transform(logits_fn(*inputs))))(
        params, whole[:, :-1], real[:, :-1]
    )
    rescored = jnp.take_along_axis(log_probs, samples.tokens[..., None], -1)[..., 0]
    assert samples.log_probs.dtype == jnp.float32
    np.testing.assert_allclose(
        samples.log_probs, jnp.where(samples.where, rescored, 0.0), atol=1e-5
    )
    assert (samples.log_probs < -1e-3).any()


def test_nothing_counts_after_the_end_and_the_end_counts(table):
    draw = jax.jit(
        partial(sample, toy_decode, max_new_tokens=6, eos_id=EOS, pad_id=9, samples_per_prompt=200)
    )
    samples = draw(table, jax.random.key(1), jnp.array([[1]]), memory(1, 7))
    tokens, where, lengths = (
        np.asarray(x) for x in (samples.tokens, samples.where, samples.lengths)
    )
    assert set(lengths[samples.finished]) > {1, 2, 3}
    for row in range(200):
        is_end = tokens[row] == EOS
        assert samples.finished[row] == is_end.any()
        assert lengths[row] == (np.argmax(is_end) + 1 if is_end.any() else 6)
        assert (tokens[row, lengths[row] :] == 9).all()
        assert where[row].tolist() == [True] * lengths[row] + [False] * (6 - lengths[row])
    assert not np.asarray(samples.log_probs)[~where].any()
    # the end-of-sequence token has its own log-probability
    assert np.asarray(samples.log_probs)[where].all()


def test_a_sequence_ends_at_any_of_several_tokens(table, x64):
    """In float64: the finished sequences and prefixes of two ends have the listed log-probabilities
    to 1e-12, and are drawn as often as these say. Order and repetition matter to padding alone."""
    table = jnp.asarray(table, jnp.float64)
    draw = partial(sample, toy_decode, max_new_tokens=T, samples_per_prompt=5000)
    arguments = table, jax.random.key(0), jnp.array([[2]]), memory(1, 1 + T)
    samples = jax.jit(partial(draw, eos_id=(EOS, 3)))(*arguments)
    assert samples.log_probs.dtype == jnp.float64
    compare_with_the_listed_space(samples, list(outcomes((EOS, 3))), table, identity, 1e-12)
    tokens, lengths = np.asarray(samples.tokens), np.asarray(samples.lengths)
    last = tokens[np.arange(5000), lengths - 1]
    assert np.asarray(samples.finished).tolist() == np.isin(last, (EOS, 3)).tolist()
    assert set(last[lengths < T]) == {EOS, 3}
    assert (tokens[~np.asarray(samples.where)] == EOS).all()
    other = jax.jit(partial(draw, eos_id=[3, 3, EOS]))(*arguments)
    assert (np.asarray(other.tokens)[~np.asarray(other.where)] == 3).all()
    jax.tree.map(np.testing.assert_array_equal, other[1:], samples[1:])


@pytest.mark.parametrize("one", [(EOS,), [EOS], np.array([EOS])])
def test_one_end_in_a_sequence_is_the_same_program(table, one, bare):
    programs = [
        jax.jit(partial(sample, toy_decode, max_new_tokens=T, eos_id=eos_id))
        .lower(table, jax.random.key(0), jnp.array([[2]]), memory(1, 1 + T))
        .as_text()
        for eos_id in (EOS, one)
    ]
    assert programs[0] == programs[1]


def test_padding_is_the_end_by_default(table):
    samples = sample(
        toy_decode,
        table,
        jax.random.key(1),
        jnp.ones((50, 1), int),
        memory(50, 7),
        max_new_tokens=6,
        eos_id=EOS,
    )
    assert (np.asarray(samples.tokens)[~np.asarray(samples.where)] == EOS).all()
    assert not samples.where.all()


@pytest.mark.parametrize(("end_at", "calls"), [(1, 1), (4, 4), (99, 8)])
def test_the_loop_ends_with_the_last_row(end_at, calls):
    """Counts the model's calls: one for the prompt, and one for each token but the last."""
    columns = []

    def count_up(params, tokens, cache, where=None):
        jax.debug.callback(columns.append, jnp.int32(tokens.shape[1]))
        return 60.0 * jax.nn.one_hot(tokens[:, -1] + 1, 100), cache

    draw = jax.jit(partial(sample, count_up, max_new_tokens=8, eos_id=end_at))
    samples = draw(None, jax.random.key(0), jnp.zeros((3, 2), int).at[0, 1].set(end_at - 1), None)
    jax.effects_barrier()
    assert [int(c) for c in columns] == [2] + [1] * (calls - 1)
    assert samples.lengths.tolist() == [1, calls, calls]


def test_a_split_batch_gives_the_same_samples(params):
    prompt, where = ragged_prompts()
    whole = draw_gpt2(params, jax.random.key(0), prompt, where=where)
    for cut in (slice(0, 2), slice(2, 6), slice(5, 6)):
        part = draw_gpt2(
            params, jax.random.key(0), prompt[cut], where=where[cut], row_ids=jnp.arange(6)[cut]
        )
        np.testing.assert_array_equal(part.tokens, whole.tokens[cut])
        np.testing.assert_allclose(part.log_probs, whole.log_probs[cut], atol=1e-5)
    other = draw_gpt2(
        params, jax.random.key(0), prompt[:2], where=where[:2], row_ids=jnp.array([7, 8])
    )
    assert (other.tokens != whole.tokens[:2]).any()


def test_devices_do_not_change_the_samples(table):
    """A batch over two devices under `pmap`, each with its own rows' ids."""
    prompt = jnp.array([[1], [2], [3], [1]])
    options = {"max_new_tokens": 6, "eos_id": EOS}
    whole = sample(toy_decode, table, jax.random.key(4), prompt, memory(4, 7), **options)

    def half(prompt, row_ids):
        return sample(
            toy_decode, table, jax.random.key(4), prompt, memory(2, 7), row_ids=row_ids, **options
        )

    halves = jax.pmap(half)(prompt.reshape(2, 2, 1), jnp.arange(4).reshape(2, 2))
    np.testing.assert_array_equal(halves.tokens.reshape(4, 6), whole.tokens)


def test_left_padding_changes_nothing(params):
    prompt, where = ragged_prompts()
    wider = jnp.pad(prompt, ((0, 0), (3, 0)), constant_values=17), jnp.pad(where, ((0, 0), (3, 0)))
    plain = draw_gpt2(params, jax.random.key(2), prompt, where=where)
    padded = draw_gpt2(params, jax.random.key(2), wider[0], where=wider[1])
    np.testing.assert_array_equal(padded.tokens, plain.tokens)
    np.testing.assert_allclose(padded.log_probs, plain.log_probs, atol=1e-5)


@pytest.mark.parametrize("padding", ["right", "both sides", "holes"])
def test_prompts_may_be_padded_anywhere(params, padding):
    """With ids that the vocabulary has not: the same samples as from the same prompts padded on the
    left."""
    lengths = np.array([1, 2, 3, 5, 4, 2])
    where = {
        "right": np.arange(6)[None] < lengths[:, None],
        "both sides": (np.arange(6)[None] >= 1) & (np.arange(6)[None] <= lengths[:, None]),
        "holes": np.stack(
            [np.random.default_rng(n).permutation(np.arange(6) < n) for n in lengths]
        ),
    }[padding]
    prompt = np.where(where, np.random.default_rng(3).integers(1, 300, (6, 6)), -100)
    left_where = np.sort(where, axis=1)
    left = np.full_like(prompt, EOS)
    left[left_where] = prompt[where]
    expected = draw_gpt2(
        params, jax.random.key(2), jnp.asarray(left), where=jnp.asarray(left_where)
    )
    found = draw_gpt2(
        params, jax.random.key(2), jnp.asarray(prompt), where=jnp.asarray(where, jnp.int32)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.isfinite(found.log_probs).all()


def test_a_prompt_of_nothing_real_has_no_log_prob(params):
    where = jnp.array([[True, True], [False, False]])
    samples = draw_gpt2(params, jax.random.key(2), jnp.full((2, 2), 5), where=where)
    assert np.isnan(samples.sequence_log_probs).tolist() == [False, True]
    assert ((samples.tokens >= 0) & (samples.tokens < 300)).all()


def test_any_padding_behind_the_end(params):
    """The model never reads it: with -100 there, all else stays as it was."""
    prompt, where = ragged_prompts()
    plain = draw_gpt2(params, jax.random.key(0), prompt, where=where, transform=greedy)
    ends = jnp.asarray(plain.tokens[0, 1])
    plain, padded = (
        draw_gpt2(params, jax.random.key(0), prompt, where=where, eos_id=int(ends), pad_id=pad)
        for pad in (None, -100)
    )
    assert not plain.where.all()
    np.testing.assert_array_equal(padded.tokens, jnp.where(plain.where, plain.tokens, -100))
    np.testing.assert_array_equal(padded.log_probs, plain.log_probs)


def test_row_ids_of_few_bits_do_not_overflow(table):
    draw = partial(sample, toy_decode, max_new_tokens=6, eos_id=EOS, samples_per_prompt=3)
    first, second = (
        draw(
            table,
            jax.random.key(0),
            jnp.ones((2, 1), int),
            memory(2, 7),
            row_ids=jnp.array([100, 14], dtype),
        )
        for dtype in (jnp.int8, jnp.int32)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("transform", [temperature(0.3), top_p(0.8), TRANSFORM])
def test_half_precision_logits_are_rescored_as_they_were_drawn(table, transform):
    """The sampler's log-probabilities are those of `make_log_prob_fn` under the same transform, of
    bfloat16 logits too."""

    def half_decode(table, tokens, cache, where=None):
        logits, cache = toy_decode(table, tokens, cache, where)
        return logits.astype(jnp.bfloat16), cache

    def half_logits(table, tokens, where=None, *, start=0):
        return table[jnp.arange(tokens.shape[1])[None], tokens][:, start:].astype(jnp.bfloat16)

    draw = partial(
        sample,
        half_decode,
        max_new_tokens=6,
        eos_id=EOS,
        transform=transform,
        samples_per_prompt=50,
    )
    samples = draw(table, jax.random.key(1), jnp.array([[1]]), memory(1, 7))
    tokens, where = pack(jnp.ones((50, 1), int), samples.tokens, where=samples.where)
    rescored = make_log_prob_fn(half_logits, transform=transform)(table, tokens, where)
    np.testing.assert_allclose(samples.sequence_log_probs, rescored, atol=1e-6)


def test_nan_logits_give_nan_log_probs_and_ids_that_exist(table):
    samples = sample(
        toy_decode,
        table.at[1].set(jnp.nan),
        jax.random.key(1),
        jnp.ones((50, 1), int),
        memory(50, 5),
        max_new_tokens=4,
        eos_id=EOS,
    )
    went_on = np.asarray(samples.lengths) > 1
    assert np.isnan(samples.sequence_log_probs).tolist() == went_on.tolist()
    assert went_on.any()
    assert ((samples.tokens >= 0) & (samples.tokens < V)).all()


def test_float32_under_64_bits_draws_the_same(params, bare):
    """With ids of 64 bits, NumPy's among them; log-probabilities in float32."""
    prompt, where = ragged_prompts()
    expected = draw_gpt2(params, jax.random.key(0), prompt, where=where, samples_per_prompt=2)
    with jax.enable_x64(True):
        wide = jnp.asarray(prompt, jnp.int64)
        found = draw_gpt2(
            params, jax.random.key(0), wide, where=where, samples_per_prompt=2, pad_id=np.int64(EOS)
        )
    chex.assert_trees_all_equal_dtypes(found, expected)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)


def test_samples_of_a_prompt_equal_copies_of_it(params):
    prompt, where = ragged_prompts()
    shared = draw_gpt2(params, jax.random.key(0), prompt, where=where, samples_per_prompt=3)
    copied = draw_gpt2(
        params, jax.random.key(0), jnp.repeat(prompt, 3, 0), where=jnp.repeat(where, 3, 0)
    )
    np.testing.assert_array_equal(shared.tokens, copied.tokens)
    np.testing.assert_allclose(shared.log_probs, copied.log_probs, atol=1e-5)
    # each has a key of its own
    assert len({tuple(row) for row in np.asarray(shared.tokens[:3]).tolist()}) == 3


def test_a_prompt_is_read_once_for_all_its_samples(table):
    shapes = []

    def spy(params, tokens, cache, where=None):
        shapes.append(tokens.shape)
        return toy_decode(params, tokens, cache, where)

    sample(
        spy,
        table,
        jax.random.key(0),
        jnp.ones((2, 3), int),
        memory(2, 6),
        max_new_tokens=2,
        eos_id=0,
        samples_per_prompt=5,
    )
    assert shapes[0] == (2, 3)
    assert set(shapes[1:]) == {(10, 1)}


def test_greedy_follows_the_most_probable_token(params):
    prompt, where = ragged_prompts()
    samples = draw_gpt2(
        params, jax.random.key(0), prompt, where=where, transform=greedy, max_new_tokens=6
    )
    whole = jnp.concatenate([prompt, samples.tokens], 1)
    real = jnp.pad(where, ((0, 0), (0, 6)), constant_values=True)
    logits_fn = partial(gpt2.logits_fn(CONFIG), start=prompt.shape[1] - 1)
    best = np.argmax(jax.jit(logits_fn)(params, whole[:, :-1], real[:, :-1]), -1)
    np.testing.assert_array_equal(samples.tokens, np.where(samples.where, best, EOS))
    assert not samples.log_probs.any()


def test_half_precision_models_give_float32_log_probs(params):
    cache = gpt2.init_cache(CONFIG, 2, 5, dtype=jnp.bfloat16)
    decode = gpt2.decode_fn(CONFIG, dtype=jnp.bfloat16)
    draw = jax.jit(partial(sample, decode, max_new_tokens=4, eos_id=EOS))
    samples = draw(params, jax.random.key(0), jnp.ones((2, 1), int), cache)
    assert samples.log_probs.dtype == jnp.float32
    assert np.isfinite(samples.log_probs).all()


def test_one_compilation_for_all_keys_prompts_and_equal_transforms(table):
    @partial(jax.jit, static_argnames="transform")
    @chex.assert_max_traces(n=1)
    def draw(table, rng_key, prompt, transform):
        return sample(
            toy_decode,
            table,
            rng_key,
            prompt,
            memory(2, 6),
            max_new_tokens=4,
            eos_id=EOS,
            transform=transform,
        )

    chex.clear_trace_counter()
    for seed in range(3):
        samples = draw(
            table, jax.random.key(seed), jnp.full((2, 2), seed), chain(temperature(0.9), top_k(3))
        )
    assert isinstance(samples, Samples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": jnp.zeros((2, 0), int)}, "at least one column"),
        (
            {"max_new_tokens": 5},
            "The cache has 6 columns, but a prompt of 2 and 5 new tokens need 7",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"samples_per_prompt": 0}, "samples_per_prompt=0"),
        ({"eos_id": V}, f"one of the {V} tokens of the vocabulary, got {V}"),
        ({"eos_id": -1}, f"one of the {V} tokens of the vocabulary, got -1"),
        ({"eos_id": (EOS, V)}, f"one of the {V} tokens of the vocabulary, got (0, {V})"),
        ({"eos_id": ()}, "eos_id must be a token id or a sequence of them, got ()"),
        ({"eos_id": [[0]]}, "eos_id must be a token id or a sequence of them, got [[0]]"),
        ({"eos_id": 0.0}, "eos_id must be a token id or a sequence of them, got 0.0"),
        ({"pad_id": 2**31}, "pad_id must be an int32, as the tokens are; got 2147483648"),
        ({"row_ids": jnp.arange(3)}, "row_ids must have shape (2,) for this prompt, got (3,)"),
        (
            {"where": jnp.ones((2, 1), bool)},
            "where must have the shape of what it masks, [2, 2]; got [2, 1]",
        ),
        ({"cache": memory(3, 6)}, "The cache is for [3] rows, but the prompt has 2"),
    ],
)
def test_misuse_is_named_when_tracing(table, changes, message, bare):
    arguments = {
        "prompt": jnp.ones((2, 2), int),
        "cache": memory(2, 6),
        "max_new_tokens": 4,
        "eos_id": EOS,
    } | changes
    prompt, cache = arguments.pop("prompt"), arguments.pop("cache")
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(
            partial(sample, toy_decode, **arguments), table, jax.random.key(0), prompt, cache
        )
