"""A mesh of devices changes where things lie and nothing else: eight virtual devices against one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fjax
from fjax import rollouts, sharding
from fjax._trees import name_leaves
from fjax.log_probs import make_log_prob_fn
from fjax.models import LanguageModel, gpt2
from fjax.models.sharded import on_mesh, shard_model
from fjax.runs.memory import bytes_per_device
from fjax.runs.programs import collective_bytes, compile_to_inspect, program_memory

CONFIG = gpt2.GPT2Config(vocab_size=24, n_positions=12, n_embd=16, n_layer=2, n_head=4)
LAYOUTS = ("data=8", "fsdp=8", "data=4,tensor=2", "data=2,fsdp=2,tensor=2")
STEPS = 10


def make_model(dtype) -> LanguageModel:
    params = gpt2.init_params(CONFIG, jax.random.key(0), param_dtype=dtype)
    return LanguageModel(
        CONFIG,
        jax.tree.map(lambda x: 8 * x, params),  # else all tokens are equally likely
        None,
        gpt2.logits_fn(CONFIG, dtype=dtype),
        gpt2.decode_fn(CONFIG, dtype=dtype),
        partial(gpt2.init_cache, CONFIG, dtype=dtype),
        max_length=CONFIG.max_length,
        bos_id=0,
        eos_ids=(0,),
    )


def align(model, optimizer, microbatch_size):
    """Ten steps: tokens, losses and gradient norms of each, and the last state."""
    log_prob_fn = make_log_prob_fn(model.logits_fn)
    sample_fn = rollouts.make_sample_fn(
        model.decode_fn, model.init_cache, max_new_tokens=6, eos_id=0
    )
    draw = rollouts.make_draw(
        sample_fn, jax.jit(log_prob_fn), model.params, start_id=0, samples=32, base_samples=8
    )
    tuner = fjax.fdpg(
        log_prob_fn,
        optimizer,
        divergence=fjax.jensen_shannon(),
        microbatch_size=microbatch_size,
    )
    state, seen = tuner.init(model.params), []
    update = sharding.jit_update(tuner.update)
    for step in range(STEPS):
        batch = draw(state.params, jax.random.fold_in(jax.random.key(1), step))
        tokens = np.asarray(batch.tokens)
        log_score = np.where((tokens == 5).any(1), np.asarray(batch.log_a), -np.inf)
        rollout = rollouts.to_rollout(batch, log_score)
        state, info = update(state, rollout)
        seen.append((tokens, np.asarray(info.loss), np.asarray(info.grad_norm)))
    return seen, state


CASES = {
    # Adam moves a weight whose gradient is all rounding as far as any other: in float64 alone can
    # its ten steps be compared.
    "float32": (jnp.float32, optax.sgd(0.3), 1e-5),
    "float64": (jnp.float64, optax.adam(1e-2), 1e-9),
}


@pytest.fixture(scope="module")
def on_one_device():
    """Name of a case -> what one device does."""
    found = {}
    for name, (dtype, optimizer, _) in CASES.items():
        with jax.enable_x64(name == "float64"):
            found[name] = align(make_model(dtype), optimizer, None)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_a_layout_takes_the_steps_of_one_device(layout, case, on_one_device):
    dtype, optimizer, tolerance = CASES[case]
    expected, last = on_one_device[case]
    with jax.enable_x64(case == "float64"):
        mesh = sharding.make_mesh(layout)
        model = shard_model(make_model(dtype), mesh, rules=gpt2.RULES)
        seen, state = align(model, optimizer, 16 if case == "float64" else None)
    for (tokens, *numbers), (tokens_there, *numbers_there) in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(tokens, tokens_there)
        np.testing.assert_allclose(numbers, numbers_there, rtol=0, atol=tolerance)
    for ours, theirs in zip(*map(jax.tree.leaves, (state, last)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
    shardings = sharding.make_shardings(model.params, gpt2.RULES, mesh)
    for path, leaf in name_leaves(state.params).items():
        there = name_leaves(shardings)[path]
        assert leaf.sharding.is_equivalent_to(there, leaf.ndim), path


BLOCKS = gpt2.GPT2Config(vocab_size=32, n_positions=8, n_embd=64, n_layer=16, n_head=2)
"""Nearly all of its parameters are in blocks."""


def compiled_update(layout):
    """Of that model, by shapes alone."""
    params = jax.eval_shape(lambda: gpt2.init_params(BLOCKS, jax.random.key(0)))
    model = make_model(jnp.float32)._replace(logits_fn=gpt2.logits_fn(BLOCKS))
    model = on_mesh(model, sharding.make_mesh(layout), gpt2.RULES)
    log_prob_fn = make_log_prob_fn(model.logits_fn)
    tuner = fjax.fdpg(log_prob_fn, optax.sgd(0.1), divergence=fjax.jensen_shannon())
    state = jax.eval_shape(tuner.init, params)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        state,
        model.shardings(state),
    )
    tokens = jax.ShapeDtypeStruct((8, 4), jnp.int32)
    numbers = jax.ShapeDtypeStruct((8,), jnp.float32)
    rollout = fjax.Rollout(tokens, jax.ShapeDtypeStruct((8, 4), bool), numbers, numbers)
    return compile_to_inspect(sharding.jit_for(tuner.update, state).lower(state, rollout)), params


def test_an_update_moves_what_its_layout_must():
    """Beside rounding errors of kilobytes: statistics of eight samples."""
    compiled, params = compiled_update("data=8")
    whole = bytes_per_device(params)
    moved = collective_bytes(compiled)
    assert set(moved) <= {"all-reduce", "all-gather"}
    np.testing.assert_allclose(moved["all-reduce"], whole, rtol=0.1)  # the gradient
    assert moved.get("all-gather", 0) < 0.01 * whole

    compiled, _ = compiled_update("fsdp=8")
    moved = collective_bytes(compiled)
    # Parameters for the forward pass, those of blocks for the backward pass again; the gradient.
    np.testing.assert_allclose(moved["all-gather"], 2 * whole, rtol=0.1)
    reduced = moved["all-reduce"] + moved.get("reduce-scatter", 0)
    np.testing.assert_allclose(reduced, whole, rtol=0.1)
    # Two of sixteen blocks whole, and some eighths: the gradient, and what becomes of it.
    assert program_memory(compiled).temporary < 0.75 * whole
