"""The door of the tuners: what does not belong together is named, what is only written otherwise is
taken, dtypes are kept."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fjax
from fjax import enumeration, preferences, reverse_kl, total_variation
from fjax.estimators import running_log_mean
from fjax.training import PairBatch, Rollout, fdpg, ppo_tuner, preference_tuner, rloo_tuner
from tests.cases import refused, world
from tests.training.test_rl import token_log_prob_fn

DESCENT = optax.sgd(1.0)
SEQUENCE_LOG_PROB_FN = enumeration.tabular_log_prob_fn(3, 2)[0]


def make(name, log_prob_fn=None, optimizer=DESCENT, **options):
    """Any of the tuners, over the tabular policy."""
    if name == "ppo":
        return ppo_tuner(log_prob_fn or token_log_prob_fn, optimizer, minibatches=1, **options)
    log_prob_fn = log_prob_fn or SEQUENCE_LOG_PROB_FN
    if name == "preference":
        return preference_tuner(
            log_prob_fn, optimizer, loss=partial(preferences.dpo, beta=0.3), **options
        )
    return (rloo_tuner if name == "rloo" else partial(fdpg, divergence=total_variation()))(
        log_prob_fn, optimizer, **options
    )


def batch_for(name, dtype=None):
    """Every sequence once; as pairs, each with the next."""
    small = world()
    tokens, where = small.space
    log_q, log_score = (x.astype(dtype or x.dtype) for x in (small.log_pi, small.log_p + 0.7))
    if name == "preference":
        return PairBatch(tokens[1:], where[1:], tokens[:-1], where[:-1], log_q[1:], log_q[:-1])
    return Rollout(tokens, where, log_q, log_score)


def update(name, batch, **options):
    """State and figures after one step."""
    tuner = make(name, **options)
    return jax.jit(tuner.update)(tuner.init(world().params), batch)


each_online = pytest.mark.parametrize("name", ["fdpg", "rloo", "ppo"])
each_tuner = pytest.mark.parametrize("name", ["fdpg", "rloo", "ppo", "preference"])

WRONG_ROLLOUTS = {
    "log_q [7, 1]": (lambda r: {"log_q": r.log_q[:, None]}, r"A Rollout has tokens .*log_q \[7, 1\], log_score \[7\]"),
    "log_score [1, 7]": (lambda r: {"log_score": r.log_score[None]}, r"A Rollout has tokens .*log_score \[1, 7\]"),
    "one log_q": (lambda r: {"log_q": r.log_q[0]}, r"A Rollout has .*log_q \[\]"),
    "fewer scores": (lambda r: {"log_score": r.log_score[1:]}, r"A Rollout has .*log_score \[6\]"),
    "contexts of tokens": (lambda r: {"tokens": r.tokens[None], "where": r.where[None]}, r"tokens \[1, 7, 2\], log_q \[7\]"),
    "tokens of one sample": (lambda r: {"tokens": r.tokens[0], "where": r.where[0]}, r"Got tokens \[2\]"),
    "no samples": (lambda r: {key: getattr(r, key)[:0] for key in Rollout._fields[:4]}, r"N being at least 1.*tokens \[0, 2\]"),
    "tokens of floats": (lambda r: {"tokens": r.tokens * 1.0}, "tokens must be integers, got float32"),
    "where a sample": (lambda r: {"where": r.where[:, 0]}, r"where must have the shape of what it masks, \[7, 2\]; got \[7\]"),
    "where of floats": (lambda r: {"where": r.where * 1.0}, "where must be booleans"),
    "strata a token": (lambda r: {"strata": r.tokens}, r"A Rollout has .*strata \[7, 2\]"),
    "strata of floats": (lambda r: {"strata": r.log_q}, "strata must be integers, got float32"),
    "contexts without an axis": (lambda r: {"contexts": jnp.array([0])}, r"log_q being \[C, N\] .* got log_q of shape \[7\]"),
}  # fmt: skip


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(("change", "message"), WRONG_ROLLOUTS.values(), ids=WRONG_ROLLOUTS)
@each_online
def test_arrays_that_do_not_belong_together_are_refused_with_their_shapes(name, change, message):
    tuner, rollout = make(name), batch_for(name)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            tuner.update, tuner.init(world().params), rollout._replace(**change(rollout))
        )


WRONG_PAIRS = {
    "log_a [6, 1]": (
        lambda p: {"chosen_log_a": p.chosen_log_a[:, None]},
        r"A PairBatch has .*chosen_log_a \[6, 1\]",
    ),
    "fewer rejected": (
        lambda p: {"rejected_tokens": p.rejected_tokens[1:]},
        r"A PairBatch has .*rejected_tokens \[5, 2\]",
    ),
    "longer rejected": (
        lambda p: {"rejected_tokens": jnp.zeros((6, 3), jnp.int32)},
        r"same T.*rejected_tokens \[6, 3\]",
    ),
    "where a pair": (
        lambda p: {"chosen_where": p.chosen_where[:, 0]},
        r"A PairBatch has .*chosen_where \[6\]",
    ),
    "where of floats": (
        lambda p: {"rejected_where": p.rejected_where * 1.0},
        "rejected_where must be booleans",
    ),
    "tokens of floats": (
        lambda p: {"rejected_tokens": p.rejected_tokens * 1.0},
        "rejected_tokens must be integers",
    ),
    "no pairs": (
        lambda p: jax.tree.map(lambda x: x[:0], p)._asdict(),
        r"N being at least 1.*chosen_tokens \[0, 2\]",
    ),
}


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(("change", "message"), WRONG_PAIRS.values(), ids=WRONG_PAIRS)
def test_pairs_that_do_not_belong_together_are_refused_with_their_shapes(change, message):
    tuner, pairs = make("preference"), batch_for("preference")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tuner.update, tuner.init(world().params), pairs._replace(**change(pairs)))


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("returned", ["[B, 1]", "[]", "a pair"])
@each_tuner
def test_a_policy_that_returns_another_shape_is_refused(name, returned):
    def log_prob_fn(params, tokens, where):
        log_pi = SEQUENCE_LOG_PROB_FN(params, tokens, where)
        return {"[B, 1]": log_pi[:, None], "[]": log_pi.sum(), "a pair": (log_pi, log_pi)}[returned]

    tuner = make(name, log_prob_fn)
    with pytest.raises(
        ValueError,
        match=rf"must return one log-probability a {'token' if name == 'ppo' else 'sequence'}",
    ):
        jax.eval_shape(tuner.update, tuner.init(world().params), batch_for(name))


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("size", [None, 3])
@each_tuner
def test_numpy_and_integer_masks_are_taken(name, size):
    """Without `jax.jit`, as in a notebook."""
    expected, expected_info = update(name, batch_for(name), microbatch_size=size)
    batch = jax.tree.map(
        lambda x: np.asarray(x, np.int64 if x.dtype == bool else x.dtype), batch_for(name)
    )
    tuner = make(name, microbatch_size=size)
    state, info = tuner.update(tuner.init(np.asarray(world().params)), batch)
    np.testing.assert_allclose(state.params, expected.params, atol=1e-6)
    np.testing.assert_allclose(info.grad_norm, expected_info.grad_norm, rtol=1e-5)


UNCALLED = {
    "divergence": (
        lambda: fdpg(SEQUENCE_LOG_PROB_FN, DESCENT, divergence=fjax.jensen_shannon),
        "jensen_shannon",
    ),
    "optimizer": (lambda: rloo_tuner(SEQUENCE_LOG_PROB_FN, optax.adam), "adam"),
    "log_z": (
        lambda: ppo_tuner(token_log_prob_fn, DESCENT, log_z=running_log_mean),
        "running_log_mean",
    ),
    "optimizer of pairs": (lambda: make("preference", optimizer=optax.adam), "adam"),
}


@pytest.mark.parametrize(("construct", "function"), UNCALLED.values(), ids=UNCALLED)
def test_a_part_that_was_not_called_is_named(construct, function):
    with refused(f"must be a .*, got the function {function}: call it"):
        construct()


@pytest.mark.parametrize(
    "options", [{"num_contexts": 0}, {"microbatch_size": 2.0}, {"microbatch_size": -3}]
)
@each_online
def test_numbers_of_how_many_are_whole_and_positive(name, options):
    with refused(rf"{next(iter(options))} must be at least 1, a whole number; got"):
        make(name, **options)


@each_tuner
def test_a_leaf_that_is_not_trained_is_named(name):
    with refused(r"every leaf must hold floats; params\['positions'\] is int32"):
        make(name).init({"table": world().params, "positions": jnp.arange(3)})


@pytest.mark.parametrize("column", [0, 1])
def test_counting_a_column_that_nothing_predicts_is_reported(column):
    """Column 0 of a language model has no prediction: log π is NaN, ``finite`` False, and nothing
    moves."""

    def uniform(params, tokens, where=None, *, start=0):
        return params[tokens[:, start:]]

    tuner = fdpg(fjax.make_log_prob_fn(uniform), DESCENT, divergence=reverse_kl())
    tokens, where = (
        jnp.array([[0, 1, 2], [0, 2, 0]]),
        jnp.zeros((2, 3), bool).at[:, column:].set(True),
    )
    state = tuner.init(jnp.zeros((3, 3)))
    # Where the mask is known, `make_log_prob_fn` refuses it; compiled, it is not.
    state, info = jax.jit(tuner.update)(
        state, Rollout(tokens, where, jnp.zeros(2), jnp.array([0.0, 1.0]))
    )
    assert bool(info.finite) == (column > 0)
    assert bool((state.params == 0).all()) == (column == 0)


# bfloat16 has 8 bits: each part is rounded by 2⁻⁹ of itself, and parts of both signs are larger
# than their sum.
@pytest.mark.parametrize("size", [1, 8])
@each_tuner
def test_micro_batches_of_half_precision_parameters_change_nothing(name, size):
    """Added up in bfloat16, the small parts of a large sum would be lost: up to 22 % of the
    gradient."""
    batch = batch_for(name)
    rows = np.random.default_rng(0).integers(len(batch[0]), size=512)
    batch = jax.tree.map(lambda x: x[rows], batch)

    def in_float32(params, tokens, where):
        function = token_log_prob_fn if name == "ppo" else SEQUENCE_LOG_PROB_FN
        return function(params.astype(jnp.float32), tokens, where)

    def gradient(**options):
        # its state is the gradient, before it is added up
        tuner = make(name, in_float32, optax.trace(0.0), **options)
        start = tuner.init(world().params.astype(jnp.bfloat16))
        state, _ = jax.jit(tuner.update)(start, batch)
        return np.asarray(state.opt_state.trace, np.float32)

    whole, parts = gradient(), gradient(microbatch_size=size)
    assert abs(whole).max() > 1e-3
    np.testing.assert_allclose(parts, whole, rtol=0, atol=2**-7 * abs(whole).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@each_tuner
def test_half_precision_numbers_are_computed_with_in_float32(name, dtype):
    """What is rounded once is then exact: the step is that of the same numbers in float32."""
    half = batch_for(name, dtype)
    single = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == dtype else x, half)
    (state, info), (expected, expected_info) = (update(name, batch) for batch in (half, single))
    jax.tree.map(np.testing.assert_array_equal, (state, info), (expected, expected_info))


def test_the_norm_of_a_half_precision_gradient_does_not_overflow():
    """Squares of more than 255 are infinite in float16."""

    def steep(params, tokens, where):
        log_pi = SEQUENCE_LOG_PROB_FN(params.astype(jnp.float32), tokens, where)
        return jax.lax.stop_gradient(log_pi) + 10_000 * (log_pi - jax.lax.stop_gradient(log_pi))

    tuner = fdpg(steep, DESCENT, divergence=reverse_kl())
    _, info = jax.jit(tuner.update)(
        tuner.init(world().params.astype(jnp.float16)), batch_for("fdpg")
    )
    assert info.finite
    assert info.grad_norm > 300


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [None, 3])
@each_tuner
def test_float32_in_64_bit_mode_and_the_state_keeps_its_dtypes(name, size, dtype):
    """`jax.lax.scan` raises if an update changes any."""
    params, batch = world().params.astype(dtype), batch_for(name)
    with jax.enable_x64(True):
        tuner = make(
            name, optimizer=optax.adam(optax.cosine_decay_schedule(0.1, 10)), microbatch_size=size
        )
        start = tuner.init(params)
        state, info = jax.lax.scan(lambda state, _: tuner.update(state, batch), start, length=2)
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), state, start)
        assert state.params.dtype == dtype
        assert info.finite.all()


@each_tuner
def test_an_optimizer_that_answers_in_another_dtype_does_not_change_the_state(name):
    """Its state of bfloat16 comes back in float32, as a schedule's does in 64-bit mode."""

    def update(grads, state, params=None):
        return grads, jax.tree.map(lambda s, g: s.astype(jnp.float32) + g, state, grads)

    tuner = make(
        name, optimizer=optax.GradientTransformation(lambda p: p.astype(jnp.bfloat16), update)
    )
    state = tuner.init(world().params)
    after = jax.eval_shape(tuner.update, state, batch_for(name))[0]
    assert after.opt_state.dtype == jnp.bfloat16


@each_tuner
def test_weak_types_do_not_change_from_step_to_step(name):
    params = 0.1 + jnp.full((4, 3), jnp.asarray(1.0))
    tuner = make(name)
    state = tuner.init(jnp.broadcast_to(jnp.asarray(0.5), params.shape))
    after = jax.eval_shape(tuner.update, state, batch_for(name))[0]
    assert jax.tree.map(lambda x: (x.dtype, x.weak_type), after) == jax.tree.map(
        lambda x: (x.dtype, x.weak_type), state
    )


@pytest.mark.parametrize("size", [None, 4])
@each_tuner
def test_samples_that_are_spread_over_devices(name, size):
    """Under explicit sharding, where JAX asks of each array how it lies; the same step as on one
    device."""

    def token_fn(params, tokens, where):
        found = jnp.einsum("btv,v->bt", jax.nn.one_hot(tokens, 3), jax.nn.log_softmax(params))
        return jnp.where(where, found, 0.0)

    batch = jax.tree.map(lambda x: jnp.concatenate([x, x, x])[:16], batch_for(name))
    batch = batch if name == "preference" else batch._replace(strata=jnp.arange(16) // 12)
    function = token_fn if name == "ppo" else lambda *x: token_fn(*x).sum(-1)
    tuner = make(name, function, microbatch_size=size)
    params = jnp.array([0.1, 0.5, 0.2])
    expected, _ = jax.jit(tuner.update)(tuner.init(params), batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spread = jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.P("data")))
        state, info = jax.jit(tuner.update)(tuner.init(params), spread)
    assert info.finite
    np.testing.assert_allclose(state.params, expected.params, atol=1e-5)
