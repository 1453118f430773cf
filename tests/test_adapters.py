"""Adapters of low rank: what they are at first, what they can become, and that their gradient is
the chain rule's."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fjax
from fjax import enumeration
from fjax.adapters import adapt, attach_lora, init_lora, is_adapted, merge_attached, merge_lora
from fjax.models import gpt2
from fjax.rollouts import make_sample_fn
from fjax.training import Checkpoints

KEY = jax.random.key(0)


def params_of(seed=0, dtype=np.float32):
    """A matrix, a vector, and the kernel of a layer with heads."""
    draw = np.random.default_rng(seed).normal
    shapes = {"wte": (5, 3), "h_0": {"kernel": (3, 4), "bias": (4,)}, "h_1": {"kernel": (3, 2, 2)}}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(
        lambda shape: jnp.asarray(draw(size=shape), dtype), shapes, is_leaf=is_shape
    )


def moved(adapters, seed=1):
    """Some that training may have led to."""
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape), x.dtype), adapters)


def test_by_hand():
    """[[1], [2]] · [[3, 4]] = [[3, 4], [6, 8]], once and, with α = 4 at rank 2, twice."""
    params = {"w": jnp.zeros((2, 2)), "b": jnp.ones(2)}
    adapters = {"w": {"down": jnp.array([[1.0], [2.0]]), "up": jnp.array([[3.0, 4.0]])}}
    merged = merge_lora(params, adapters)
    assert merged["w"].tolist() == [[3, 4], [6, 8]]
    assert merged["b"] is params["b"]
    padded = {"down": jnp.array([[1.0, 0], [2, 0]]), "up": jnp.array([[3.0, 4.0], [5, 6]])}
    assert merge_lora(params, {"w": padded}, alpha=4)["w"].tolist() == [[6, 8], [12, 16]]
    compiled = jax.jit(merge_lora)(params, {"w": padded}, alpha=4.0)
    assert compiled["w"].tolist() == [[6, 8], [12, 16]]
    assert merge_lora(params, {"w": padded})["w"].tolist() == [[3, 4], [6, 8]]


def test_every_matrix_has_one_and_no_vector():
    adapters = init_lora(params_of(), KEY, rank=2)
    assert jax.tree.map(jnp.shape, adapters) == {
        "wte": {"down": (5, 2), "up": (2, 3)},
        "h_0/kernel": {"down": (3, 2), "up": (2, 4)},
        "h_1/kernel": {"down": (3, 2), "up": (2, 2, 2)},
    }
    trained = sum(x.size for x in jax.tree.leaves(adapters))
    assert trained == 2 * (5 + 3) + 2 * (3 + 4) + 2 * (3 + 4)


def test_a_pattern_says_which():
    assert list(init_lora(params_of(), KEY, rank=1, pattern="^h_.*kernel")) == [
        "h_0/kernel",
        "h_1/kernel",
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "jit"])
def test_at_first_they_are_the_base_model_bit_for_bit(dtype, compiled, x64):
    params = params_of(dtype=dtype)
    adapters = init_lora(params, KEY, rank=2)
    merge = jax.jit(merge_lora) if compiled else merge_lora
    merged = merge(params, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for new, old in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        assert new.dtype == old.dtype == dtype
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()
    expected = "float64" if dtype == "float64" else "float32"
    assert {x.dtype.name for x in jax.tree.leaves(adapters)} == {expected}


def test_what_goes_down_is_as_large_as_what_comes_in():
    """Its variance is 1/in; 5 standard errors of 40 000 squares are 5·√(2/40000) of it."""
    (adapter,) = init_lora({"w": jnp.zeros((400, 100))}, KEY, rank=100).values()
    assert float(jnp.mean(adapter["down"] ** 2) * 400) == pytest.approx(1, abs=5 * 0.0071)
    assert not adapter["up"].any()


def test_of_a_matrix_with_its_output_first_the_input_s_side_is_drawn():
    """A leaf called weight, [out, in] = [100, 400]: up, of variance 1/400."""
    tree = {"weight": jnp.zeros((100, 400)), "kernel": jnp.zeros((100, 400))}
    adapters = init_lora(tree, KEY, rank=100)
    up = adapters["weight"]["up"]
    assert float(jnp.mean(up**2) * 400) == pytest.approx(1, abs=5 * 0.0071)
    assert not adapters["weight"]["down"].any()
    assert adapters["kernel"]["down"].any()
    assert not adapters["kernel"]["up"].any()


def test_keys_make_adapters_and_matrices_differ():
    params = {"a": jnp.zeros((4, 4)), "b": jnp.zeros((4, 4))}
    ours, others = (init_lora(params, jax.random.key(seed), rank=1) for seed in (0, 1))
    downs = [x["down"] for x in (*ours.values(), *others.values())]
    assert len({np.asarray(down).tobytes() for down in downs}) == 4


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_the_gradient_is_the_chain_rule_s(alpha, x64):
    """Of any loss with gradient G in the merged matrix: s·G·upᵀ and s·downᵀ·G."""
    params = params_of(dtype=np.float64)
    adapters = moved(init_lora(params, KEY, rank=2))
    loss = lambda params: sum(jnp.sum(jnp.sin(x) ** 3) for x in jax.tree.leaves(params))  # noqa: E731
    policy_of = partial(merge_lora, params, alpha=alpha)
    whole = fjax._trees.name_leaves(jax.grad(loss)(policy_of(adapters)))
    scale = 1 if alpha is None else alpha / 2
    found = jax.grad(adapt(loss, policy_of))(adapters)
    for path, adapter in adapters.items():
        down, up, g = (np.asarray(x) for x in (adapter["down"], adapter["up"], whole[path]))
        up, g = up.reshape(2, -1), g.reshape(len(down), -1)
        np.testing.assert_allclose(found[path]["down"], scale * g @ up.T, rtol=1e-12)
        up_grad = np.asarray(found[path]["up"]).reshape(2, -1)
        np.testing.assert_allclose(up_grad, scale * down.T @ g, rtol=1e-12)


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_beside_the_matrices_they_are_the_same_as_added_up(alpha, x64):
    """log π and its gradient of a GPT-2 with adapters on every matrix, and the cached model's
    logits: in float64 to 1e-10, also where padding stands on the left."""
    config = gpt2.GPT2Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    params = gpt2.init_params(config, KEY, param_dtype=jnp.float64)
    params = jax.tree.map(lambda x: 10 * x, params)
    adapters = moved(init_lora(params, KEY, rank=2))
    assert {"wte/embedding", "wpe/embedding", "h_1/mlp/c_fc/kernel"} < set(adapters)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (3, 6)))
    log_prob_fn = fjax.make_log_prob_fn(gpt2.logits_fn(config, dtype=jnp.float64), start=2)
    where = jnp.ones_like(tokens, bool).at[:, :2].set(False)

    def found(way):
        policy_of = partial(way, params, alpha=alpha)
        log_pi, back = jax.vjp(
            lambda adapters: adapt(log_prob_fn, policy_of)(adapters, tokens, where), adapters
        )
        cache = gpt2.init_cache(config, 3, 6, dtype=jnp.float64)
        real = jnp.ones_like(tokens, bool).at[0, :3].set(False)
        decode = adapt(gpt2.decode_fn(config, dtype=jnp.float64), policy_of)
        return log_pi, back(jnp.arange(1.0, 4.0))[0], decode(adapters, tokens, cache, real)[0]

    beside, merged = map(jax.jit(found, static_argnums=0), (attach_lora, merge_lora))
    assert min(abs(x).max() for x in jax.tree.leaves(merged[1])) > 1e-3
    for a, b in zip(*map(jax.tree.leaves, (beside, merged)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * abs(b).max())


def test_beside_the_matrices_none_of_their_size_is_made():
    """As many bytes as W has are more than all that the gradient needs."""
    config = gpt2.GPT2Config(vocab_size=7, n_positions=8, n_embd=256, n_layer=1, n_head=2)
    params = gpt2.init_params(config, KEY)
    adapters = init_lora(params, KEY, rank=1, pattern="mlp")
    tokens = jnp.zeros((1, 4), jnp.int32)

    def temporary(way):
        logits_fn = adapt(gpt2.logits_fn(config), lambda adapters: way(params, adapters))
        grad = jax.jit(jax.grad(lambda adapters: logits_fn(adapters, tokens).sum()))
        return grad.lower(adapters).compile().memory_analysis().temp_size_in_bytes

    matrix = 4 * 256 * 1024
    assert temporary(attach_lora) < matrix < temporary(merge_lora)


def test_one_array_of_each_matrix_serves_policy_and_base_model():
    """The base model's own; and neither the sampler nor the score makes another of its size."""
    config = gpt2.GPT2Config(vocab_size=7, n_positions=8, n_embd=256, n_layer=1, n_head=2)
    params = gpt2.init_params(config, KEY)
    adapters = init_lora(params, KEY, rank=1, pattern="kernel")
    before = {id(array) for array in jax.live_arrays()}
    policy = attach_lora(params, adapters, alpha=2.0)
    assert max(x.size for x in jax.live_arrays() if id(x) not in before) < 256 * 10
    leaves = jax.tree.leaves(policy, is_leaf=is_adapted)
    shared = [leaf.matrix if is_adapted(leaf) else leaf for leaf in leaves]
    assert all(a is b for a, b in zip(shared, jax.tree.leaves(params), strict=True))

    sample_fn = make_sample_fn(
        gpt2.decode_fn(config), partial(gpt2.init_cache, config), max_new_tokens=3, eos_id=0
    )
    tokens = jnp.zeros((1, 4), jnp.int32)
    prompt = KEY, tokens[:, :1], tokens[:, :1] == 0, jnp.arange(1)
    score = jax.jit(fjax.make_log_prob_fn(gpt2.logits_fn(config)))
    programs = sample_fn.lower(policy, *prompt, each=1), score.lower(policy, tokens, tokens == 0)
    for program in programs:
        memory = program.compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4 * 256 * 256  # of its smallest matrix
        assert memory.argument_size_in_bytes < 1.02 * sum(x.nbytes for x in jax.tree.leaves(params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_attached_can_be_merged_later(dtype):
    params = params_of(dtype=dtype)
    adapters = moved(init_lora(params, KEY, rank=2))
    found = merge_attached(attach_lora(params, adapters, alpha=4.0))
    merged = merge_lora(params, adapters, alpha=4.0)
    assert found["h_0"]["bias"] is params["h_0"]["bias"]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(merged), strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-5)


def test_of_full_rank_they_can_be_any_change(x64):
    params, others = (params_of(seed, dtype=np.float64) for seed in (0, 1))
    adapters = init_lora(params, KEY, rank=3)
    named, wanted = (fjax._trees.name_leaves(x) for x in (params, others))
    for path, adapter in adapters.items():
        change = (wanted[path] - named[path]).reshape(len(named[path]), -1)
        left, sizes, right = np.linalg.svd(change, full_matrices=False)
        adapter["down"] = jnp.asarray(left * sizes)
        adapter["up"] = jnp.asarray(right.reshape(adapter["up"].shape))
    merged = merge_lora(params, adapters)
    for path in adapters:
        np.testing.assert_allclose(
            fjax._trees.name_leaves(merged)[path], wanted[path], rtol=1e-12, atol=1e-12
        )


def test_in_bfloat16_the_sum_is_taken_before_it_is_rounded():
    """Just above half a unit is seen; rounded first to half a unit, 1 would stay 1. Less is lost."""
    unit = float(jnp.finfo(jnp.bfloat16).eps)

    def merged(change):
        adapter = {"down": jnp.full((1, 1), change), "up": jnp.ones((1, 1))}
        return merge_lora({"w": jnp.ones((1, 1), jnp.bfloat16)}, {"w": adapter})["w"]

    assert merged(unit).dtype == jnp.bfloat16
    assert float(merged(unit / 2 * (1 + 2**-10))[0, 0]) == 1 + unit
    assert float(merged(unit / 4)[0, 0]) == 1


def test_arguments_of_a_function_are_passed_on():
    def logits_fn(params, tokens, where=None, *, start=0):
        return params["w"][tokens[:, start:]]

    params = {"w": jnp.arange(9.0).reshape(3, 3)}
    policy_of = partial(merge_lora, params)
    adapters = moved(init_lora(params, KEY, rank=1))
    tokens = jnp.array([[0, 2, 1]])
    found = adapt(logits_fn, policy_of)(adapters, tokens, start=1)
    np.testing.assert_array_equal(found, logits_fn(policy_of(adapters), tokens, start=1))
    log_probs = fjax.make_log_prob_fn(adapt(logits_fn, policy_of))
    expected = fjax.make_log_prob_fn(logits_fn)(policy_of(adapters), tokens, tokens > 0)
    np.testing.assert_array_equal(log_probs(adapters, tokens, tokens > 0), expected)


@pytest.mark.parametrize("name", ["jensen_shannon", "forward_kl", "alpha=0.3"])
def test_the_surrogate_s_expected_gradient_is_that_of_the_divergence(name, x64):
    """In the adapters, summed over a listed space, off-policy; to 1e-10."""
    tabular, prefixes = enumeration.tabular_log_prob_fn(3, 2)
    space, f = enumeration.sequences(3, 2, eos_id=0), fjax.divergences.by_name(name)
    base = {"logits": jax.random.normal(jax.random.key(1), (prefixes, 3))}
    log_prob_fn = lambda params: tabular(params["logits"], *space)  # noqa: E731
    log_p = jax.nn.log_softmax(jax.random.normal(jax.random.key(2), (len(space.tokens),)))
    log_pi = adapt(log_prob_fn, partial(merge_lora, base, alpha=4.0))
    log_q = log_prob_fn(base)

    def expected_loss(adapters):
        losses = fjax.surrogate_loss(
            log_pi(adapters), log_p, log_q=log_q, divergence=f, baseline=0.0
        )
        return jnp.sum(jnp.exp(log_q) * losses)

    adapters = moved(init_lora(base, KEY, rank=2))
    found = jax.grad(expected_loss)(adapters)
    exact = jax.grad(lambda x: fjax.exact_divergence(log_pi(x), log_p, divergence=f))(adapters)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), found, exact)


def test_a_flax_nnx_state_is_a_tree_like_any_other():
    module = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    adapters = init_lora(params, KEY, rank=2, pattern="kernel")
    assert adapters["query/kernel/value"]["up"].shape == (2, 2, 2)  # of [features, heads, each]
    merged = merge_lora(params, moved(adapters))
    x = jnp.ones((1, 3, 4))
    before, after = (nnx.merge(graph, p, rest, copy=True)(x) for p in (params, merged))
    assert type(merged) is type(params)
    assert not np.allclose(before, after)
    np.testing.assert_array_equal(
        before, nnx.merge(graph, merge_lora(params, adapters), rest, copy=True)(x)
    )


def test_an_equinox_partition_is_too():
    equinox = pytest.importorskip("equinox")
    module = equinox.nn.MLP(3, 2, 4, 1, key=KEY)
    params, rest = equinox.partition(module, equinox.is_inexact_array)
    adapters = init_lora(params, KEY, rank=2)
    assert list(adapters) == ["layers/0/weight", "layers/1/weight"]
    merged = equinox.combine(merge_lora(params, moved(adapters)), rest)
    again = equinox.combine(merge_lora(params, adapters), rest)
    assert not np.allclose(merged(jnp.ones(3)), module(jnp.ones(3)))
    np.testing.assert_array_equal(again(jnp.ones(3)), module(jnp.ones(3)))


def test_checkpoints_hold_adapters_alone(tmp_path):
    """Under paths with a slash in them; Adam keeps two numbers for each that is trained."""
    params = {"h_0": {"kernel": jnp.ones((64, 64))}}
    adapters = init_lora(params, KEY, rank=1)
    loss = adapt(
        lambda params, x: jnp.sum(params["h_0"]["kernel"] @ x), partial(merge_lora, params)
    )
    optimizer = optax.adam(0.1)
    updates, opt_state = optimizer.update(
        jax.grad(loss)(adapters, jnp.ones(64)), optimizer.init(adapters), adapters
    )
    tree = {"params": optax.apply_updates(adapters, updates), "opt_state": opt_state}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, wait=True)
        restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, tree))
    jax.tree.map(np.testing.assert_array_equal, restored, tree)
    (record,) = tmp_path.rglob("record/*.json")
    arrays = json.loads(record.read_text())["arrays"]
    numbers = sum(int(np.prod(array["shape"])) for array in arrays.values())
    assert numbers == 3 * 128 + 1  # and the count of steps


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (params_of(), {"rank": 1, "pattern": "lm_head"},
         "pattern 'lm_head' is in no parameter's path. There are h_N/bias, h_N/kernel, wte."),
        (params_of(), {"rank": 1, "pattern": "(wte"}, "pattern must be a regular expression, got"),
        (params_of(), {"rank": 1, "pattern": "bias"},
         "pattern 'bias' is in the path of no matrix, and adapters are for matrices. There are "
         "h_N/kernel, wte."),
        ({"b": jnp.ones(2)}, {"rank": 1}, "There are none."),
        (params_of(), {"rank": 4},
         "rank must be from 1 to the smaller side of every matrix, which is 3 for h_0/kernel "
         "[3, 4]; got 4. Take another rank, or give a pattern"),
        (params_of(), {"rank": 0}, "got 0"),
        ({"mask": jnp.ones((2, 2), bool)}, {"rank": 1}, "Adapters change floats; mask holds bool."),
        ({"ids": jnp.ones((2, 2), int)}, {"rank": 1}, "Adapters change floats; ids holds int32."),
    ],
)  # fmt: skip
def test_what_cannot_have_adapters_is_said(params, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        init_lora(params, KEY, **options)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"wpe": {"down": jnp.ones((5, 1)), "up": jnp.ones((1, 3))}},
         "There is an adapter of 'wpe', which is not in params. There are h_N/bias, h_N/kernel"),
        ({"wte": {"down": jnp.ones((5, 1)), "up": jnp.ones((1, 4))}},
         "The adapter of 'wte' has down [5, 1] and up [1, 4]; for a matrix of shape [5, 3]"),
        ({"wte": {"down": jnp.ones((5, 2)), "up": jnp.ones((1, 3))}}, "down [5, 2] and up [1, 3]"),
        ({"h_0/bias": {"down": jnp.ones(4), "up": jnp.ones(4)}}, "down [4] and up [4]"),
    ],
)  # fmt: skip
def test_adapters_of_other_parameters_are_refused(adapters, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        merge_lora(params_of(), adapters)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_is_positive(alpha):
    with pytest.raises(ValueError, match="alpha must be positive"):
        merge_lora(params_of(), {}, alpha=alpha)
