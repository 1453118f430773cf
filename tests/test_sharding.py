"""Batches spread over an Explicit mesh axis give the numbers of one device, and results that are
spread alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fjax import log_probs, sample
from fjax._sharding import spread_as
from fjax.models import gpt2
from fjax.sampling import chain, draw, greedy, temperature, top_k, top_p

CONFIG = gpt2.GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2)
ROWS = np.random.default_rng(0)
TOKENS = jnp.asarray(ROWS.integers(0, 11, (4, 6)), jnp.int32)
LOGITS = jnp.asarray(ROWS.normal(size=(4, 6, 11)), jnp.float32)
COLUMN = jnp.arange(6)[None]
LEFT = jnp.arange(4)[:, None] <= COLUMN
COUNTED = (COLUMN >= 2) & log_probs.where_from_lengths(jnp.array([6, 5, 4, 3]), 6)
TRANSFORM = chain(temperature(0.9), top_k(8), top_p(0.95))


def params():
    return jax.tree.map(lambda x: 4 * x, gpt2.init_params(CONFIG, jax.random.key(0)))


def sampled(params, tokens, where, n=1):
    cache = gpt2.init_cache(CONFIG, 4, 9)
    options = {"max_new_tokens": 3, "eos_id": 0, "transform": TRANSFORM, "samples_per_prompt": n}
    return sample(
        gpt2.decode_fn(CONFIG), params, jax.random.key(1), tokens, cache, where=where, **options
    )


def gradient(params, tokens, where):
    score = log_probs.make_log_prob_fn(gpt2.logits_fn(CONFIG))
    return jax.grad(lambda params: score(params, tokens, where).sum())(params)


def decoded_twice(params, tokens, where):
    logits, cache = gpt2.decode_fn(CONFIG)(params, tokens, gpt2.init_cache(CONFIG, 4, 8), where)
    return logits, gpt2.decode_fn(CONFIG)(params, tokens[:, :1], cache)


def scored(params, tokens, where):
    head = {"transformer": params, "score": {"kernel": jnp.ones((8, 1))}}
    return gpt2.score_fn(CONFIG)(head, tokens, where)


# Name -> function and arguments; those with a batch are spread, the parameters are not.
FUNCTIONS = {
    "token_log_probs": (lambda _, x, t: log_probs.token_log_probs(x, t), LOGITS, TOKENS),
    "sequence_log_probs": (
        lambda _, x, t, w: log_probs.sequence_log_probs(x, t, where=w),
        LOGITS,
        TOKENS,
        COUNTED,
    ),
    "log_prob_fn": (
        log_probs.make_log_prob_fn(gpt2.logits_fn(CONFIG), start=2, transform=TRANSFORM),
        TOKENS,
        COUNTED,
    ),
    "its gradient": (gradient, TOKENS, COUNTED),
    "token_log_prob_fn": (
        log_probs.make_token_log_prob_fn(gpt2.logits_fn(CONFIG)),
        TOKENS,
        COUNTED,
    ),
    "where_from_lengths": (lambda _, n: log_probs.where_from_lengths(n, 5), jnp.arange(4)),
    "pack": (
        lambda _, p, c, m, w: log_probs.pack(p, c, prompt_where=m, where=w),
        TOKENS,
        TOKENS,
        LEFT,
        COUNTED,
    ),
    "pack, whole prompts": (
        lambda _, p, c, w: log_probs.pack(p, c, where=w),
        TOKENS,
        TOKENS,
        COUNTED,
    ),
    "logits_fn": (gpt2.logits_fn(CONFIG), TOKENS, LEFT),
    "score_fn": (scored, TOKENS, COUNTED),
    "decode_fn": (decoded_twice, TOKENS, LEFT),
    "sample": (sampled, TOKENS, LEFT),
    "sample, n of each": (lambda p, t, w: sampled(p, t, w, n=2), TOKENS, LEFT),
    "sample, whole prompts": (lambda p, t: sampled(p, t, None), TOKENS),
    "draw": (
        lambda _, keys, x: jax.vmap(draw)(keys, x),
        jax.random.split(jax.random.key(0), 4),
        LOGITS[:, 0],
    ),
    "transforms": (lambda _, x: (TRANSFORM(x), greedy(x)), LOGITS),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_explicit_axes(name):
    """In and out of a mesh's context, for the types of arrays carry their mesh."""
    function, *args = FUNCTIONS[name]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    spread = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in args]
    expected = jax.jit(function)(params(), *args)
    found = jax.jit(function)(params(), *spread)
    with jax.set_mesh(mesh):
        in_context = jax.jit(function)(params(), *spread)
    for results in (found, in_context):
        for ours, theirs in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
            if name != "its gradient" and theirs.ndim:
                assert ours.sharding.spec[0] == "data"


def test_elsewhere_the_function_itself_is_called():
    """Without Explicit axes among its arguments: the very arguments, in the very trace."""
    seen = []
    auto = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    for x in (
        jnp.zeros(4),
        jax.device_put(jnp.zeros(4), NamedSharding(auto, PartitionSpec("data"))),
    ):
        assert spread_as(x, lambda *args: seen.append(args), x, "static") is None
        assert seen.pop()[0] is x
