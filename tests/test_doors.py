"""What every public function of the mathematics does with wrong shapes, other dtypes and masked
junk, as a user meets it.

A function with arrays among its arguments needs a row in ``DOORS``;
`test_every_public_function_has_a_row` fails without.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from fjax import (
    divergences,
    enumeration,
    estimators,
    policy_gradients,
    preferences,
    rejection,
    surrogates,
    targets,
)

pytestmark = pytest.mark.usefixtures("bare")

MODULES = (
    divergences,
    estimators,
    surrogates,
    policy_gradients,
    preferences,
    targets,
    enumeration,
    rejection,
)
N, C, T, K = 8, 4, 3, 2  # samples, which eight devices can share, contexts, tokens, features
# Where f is one of the arguments any will do: that each computes in float32 and is finite is shown in
# test_contracts. Jensen–Shannon takes ten times as long to compile.
F = divergences.squared_hellinger()
Z = estimators.Estimate(-1.0, 0.1, 8.0)


class Door(NamedTuple):
    """How a function is called, and with what.

    Attributes:
        call: takes the arrays as keyword arguments, by the names that its error messages use.
        arrays: name -> shape.
        of: what the function is about: "samples", each array one number a sample, so that a further
            axis is an error, or "entries", which are independent: then equal shapes will do.
        mask: which argument is a mask, if any; None for a call with all of them counted must be
            possible.
        masks: what of the others it makes not count; all, if empty.
    """

    call: Callable
    arrays: dict[str, tuple[int, ...]]
    of: str = "samples"
    mask: str | None = None
    masks: tuple[str, ...] = ()


def samples(call: Callable, *names: str, of: str = "samples", mask: str | None = None) -> Door:
    """A row whose arrays are all one number a sample."""
    return Door(call, dict.fromkeys((*names, *([mask] if mask else [])), (N,)), of, mask)


def _mean_of(update):
    # What a state is computed in is its own affair: by default the precision that JAX is set to.
    return lambda log_weights, where=None: tuple(
        update(estimators.init_log_mean(jnp.float32), log_weights, where=where)
    )


three = ("log_pi", "log_p", "log_q")
# A function with several ways to be called has several rows, told apart by what stands behind the
# point.
DOORS: dict[str, Door] = {
    "exact_divergence": samples(partial(divergences.exact_divergence, divergence=F), "log_pi", "log_p", mask="where"),
    "effective_sample_size": samples(estimators.effective_sample_size, "log_weights", mask="where"),
    "pareto_k": samples(estimators.pareto_k, "log_weights", mask="where"),
    "estimate_log_z": samples(estimators.estimate_log_z, "log_score", "log_q", mask="where"),
    "estimate_divergence": samples(partial(estimators.estimate_divergence, divergence=F), *three, mask="where"),
    "estimate_divergence.on_policy": samples(partial(estimators.estimate_divergence, divergence=F), *three[:2], mask="where"),
    "estimate_divergence_from_score": samples(
        partial(estimators.estimate_divergence_from_score, divergence=F), "log_pi", "log_score", "log_q", mask="where"
    ),
    "estimate_mean": samples(estimators.estimate_mean, "values", mask="where"),
    "estimate_mean.weighted": samples(estimators.estimate_mean, "values", "log_weights", mask="where"),
    "estimate_kl_to_base": samples(estimators.estimate_kl_to_base, "log_pi", "log_a", "log_q", mask="where"),
    "estimate_entropy": samples(estimators.estimate_entropy, "log_pi", "log_q", mask="where"),
    "estimate_proposal_gain": samples(
        estimators.estimate_proposal_gain, "log_pi", "log_proposal", "log_score", "log_q", mask="where"
    ),
    "estimate_divergence_from_halves": samples(
        partial(estimators.estimate_divergence_from_halves, log_z=Z, divergence=F),
        "log_pi", "log_score", "target_log_pi", "target_log_score", "log_z_shares",
    ),
    "estimate_forward_kl_from_target": samples(
        partial(estimators.estimate_forward_kl_from_target, log_z=Z), "target_log_pi", "target_log_score", "log_z_shares"
    ),
    "estimate_target_entropy": samples(
        partial(estimators.estimate_target_entropy, log_z=Z), "target_log_score", "log_z_shares"
    ),
    "log_mixture": samples(partial(estimators.log_mixture, base_fraction=0.25), "log_pi", "log_a", of="entries"),
    "update_log_mean": samples(_mean_of(estimators.update_log_mean), "log_weights", mask="where"),
    "running_log_mean.update": samples(_mean_of(estimators.running_log_mean().update), "log_weights", mask="where"),
    "importance_weights": samples(surrogates.importance_weights, "log_pi", "log_q", of="entries"),
    "pseudo_rewards": samples(partial(surrogates.pseudo_rewards, divergence=F), "log_pi", "log_p", of="entries"),
    "score_weights": samples(partial(surrogates.score_weights, divergence=F), *three, of="entries"),
    "score_weights.on_policy": samples(partial(surrogates.score_weights, divergence=F), *three[:2], of="entries"),
    "leave_one_out": samples(surrogates.leave_one_out, "scores", mask="where"),
    "leave_one_out.strata": samples(
        lambda scores, where=None: surrogates.leave_one_out(scores, where=where, strata=jnp.arange(scores.size) % 2),
        "scores", mask="where",
    ),
    "self_normalized": samples(
        lambda log_pi, log_q, weights: surrogates.self_normalized(log_pi, log_q)(weights), "log_pi", "log_q", "weights"
    ),
    "self_normalized_log_q": samples(surrogates.self_normalized_log_q, "log_pi", "log_q"),
    "running_mean.update": samples(
        lambda weights: surrogates.running_mean(0.5).update(jnp.zeros(2, jnp.float32), weights), "weights"
    ),
    "centred_weights": samples(partial(surrogates.centred_weights, baseline=0.5), "weights", "log_pi", "log_q"),
    "surrogate_loss": samples(partial(surrogates.surrogate_loss, divergence=F), *three),
    "surrogate_loss.leave_one_out": samples(
        partial(surrogates.surrogate_loss, divergence=F, baseline=surrogates.leave_one_out), *three
    ),
}  # fmt: skip

pair = ("chosen_log_pi", "rejected_log_pi", "chosen_log_a", "rejected_log_a")
listed = ("log_pi", "log_a", "rewards")


def group(call: Callable, *of_tokens: str, of_sequences: tuple[str, ...] = ()) -> Door:
    """A row whose arrays are one number a token, the mask among them, and some one a sequence."""
    shapes = dict.fromkeys((*of_tokens, "where"), (N, T)) | dict.fromkeys(of_sequences, (N,))
    return Door(call, shapes, mask="where")


def fields(fit: targets.MomentFit):
    return fit.coefficients, fit.residual, fit.log_z


SPACE = enumeration.sequences(3, 2, eos_id=0)
table, prefixes = enumeration.tabular_log_prob_fn(3, 2)
policy = (table, jnp.arange(3.0 * prefixes).reshape(prefixes, 3) % 0.7, SPACE)
of_space = {"log_p": (7,), "log_q": (7,)}
DOORS |= {
    "k1": samples(policy_gradients.k1, "log_pi", "log_a", of="entries"),
    "k2": samples(policy_gradients.k2, "log_pi", "log_a", of="entries"),
    "k3": samples(policy_gradients.k3, "log_pi", "log_a", of="entries"),
    "k_estimator": samples(partial(policy_gradients.k_estimator, divergence=F), "log_pi", "log_a", of="entries"),
    "divergence_penalty": samples(
        partial(policy_gradients.divergence_penalty, divergence=F), "log_pi", "log_a", "log_q", of="entries"
    ),
    "kl_reward_to_go": group(policy_gradients.kl_reward_to_go, "token_log_pi", "token_log_a"),
    "reinforce": samples(policy_gradients.reinforce, "log_pi", "rewards", of="entries"),
    "reinforce.baseline": samples(policy_gradients.reinforce, "log_pi", "rewards", "baseline", of="entries"),
    "rloo": samples(policy_gradients.rloo, "log_pi", "rewards"),
    "group_advantages": samples(policy_gradients.group_advantages, "rewards", mask="where"),
    "ppo_clip": samples(policy_gradients.ppo_clip, "log_pi", "log_q", "advantages", of="entries"),
    **{
        call.__name__: group(
            partial(call, max_tokens=T) if call is policy_gradients.dr_grpo else call,
            "token_log_pi", "token_log_q", of_sequences=("rewards",),
        )
        for call in (policy_gradients.grpo, policy_gradients.dr_grpo, policy_gradients.gspo)
    },
    "trajectory_balance": samples(policy_gradients.trajectory_balance, "log_pi", "log_score"),
    "f_trajectory_balance": samples(partial(policy_gradients.f_trajectory_balance, divergence=F), "log_pi", "log_p"),
    "f_regularized_optimum": samples(
        partial(policy_gradients.f_regularized_optimum, beta=0.5, divergence=F), "log_a", "rewards"
    ),
    "dpo": samples(partial(preferences.dpo, beta=0.1), *pair, of="entries"),
    "f_dpo": samples(partial(preferences.f_dpo, beta=0.1, divergence=F), *pair, of="entries"),
    "chi_po": samples(partial(preferences.chi_po, beta=0.1), *pair, of="entries"),
    "ipo": samples(partial(preferences.ipo, beta=0.1), *pair, of="entries"),
    "exo_pair": samples(partial(preferences.exo_pair, beta=0.1), *pair, of="entries"),
    "exo": samples(partial(preferences.exo, beta=0.1, reward_beta=1.0), *listed),
    "f_po": samples(partial(preferences.f_po, beta=0.1, reward_beta=1.0, divergence=F), *listed),
    "pointwise": samples(lambda log_a, satisfied: targets.pointwise(log_a, satisfied > -2), "log_a", "satisfied", of="entries"),
    "smoothed": samples(
        lambda log_a, satisfied: targets.smoothed(log_a, satisfied > -2, epsilon=0.5), "log_a", "satisfied", of="entries"
    ),
    "reward_tilted": samples(partial(targets.reward_tilted, beta=0.5), "log_a", "rewards", of="entries"),
    "exponential_family": Door(
        targets.exponential_family, {"log_a": (N,), "features": (N, K), "coefficients": (K,)}
    ),
    "fit_coefficients": Door(
        lambda features, moments: fields(targets.fit_coefficients(features, moments + 1)), {"features": (N, K), "moments": (K,)}
    ),
    "fit_coefficients.weighted": Door(
        lambda features, log_weights: fields(
            targets.fit_coefficients(features, jnp.array([-2.5, -2.5], jnp.float32), log_weights=log_weights)
        ),
        {"features": (N, K), "log_weights": (N,)},
    ),
    "factorize": Door(lambda log_p: enumeration.factorize(log_p, SPACE, vocab_size=3), {"log_p": (7,)}),
    "exact_log_z": samples(enumeration.exact_log_z, "log_score"),
    "exact_gradient": Door(lambda log_p: enumeration.exact_gradient(*policy, log_p, divergence=F), {"log_p": (7,)}),
    "expected_gradient": Door(
        lambda log_p, log_q: enumeration.expected_gradient(lambda x, *_: x, *policy, log_p, log_q), of_space
    ),
    "expected_surrogate_gradient": Door(
        lambda log_p, log_q: enumeration.expected_surrogate_gradient(*policy, log_p, log_q, divergence=F), of_space
    ),
    "log_acceptance": samples(partial(rejection.log_acceptance, log_beta=0.5), "log_score", "log_q", of="entries"),
    "accept": samples(
        lambda log_score, log_q: rejection.accept(jax.random.key(0), log_score, log_q, log_beta=0.5).astype(jnp.float32),
        "log_score", "log_q",
    ),
    "choose_log_beta": samples(partial(rejection.choose_log_beta, acceptance_rate=0.3), "log_score", "log_q"),
    "estimate_rejection": samples(partial(rejection.estimate_rejection, log_beta=0.5), "log_score", "log_q"),
}  # fmt: skip
# what takes a state, or an option that may be an array
NO_ARRAYS_OF_SAMPLES = {"log_mean_estimate", "product_of_experts"}
# what is computed on the host, of one context or several: tests/test_estimates_over_contexts.py
ON_THE_HOST = {"estimate_mean_over_contexts", "estimate_ratio", "estimate_win_rate"}


def takes_arrays(function) -> bool:
    """Not an option, which is one number, but arrays of samples."""
    annotations = (p.annotation for p in inspect.signature(function).parameters.values())
    return any(
        "Array" in str(annotation) and "''" not in str(annotation) for annotation in annotations
    )


def test_every_public_function_has_a_row():
    public = {
        f
        for module in MODULES
        for f in map(vars(module).get, module.__all__)
        if inspect.isfunction(f)
    }
    expected = {f.__name__ for f in public if takes_arrays(f)} - NO_ARRAYS_OF_SAMPLES - ON_THE_HOST
    assert len(expected) > 10
    assert expected <= {name.split(".")[0] for name in DOORS}, expected - {
        name.split(".")[0] for name in DOORS
    }


def values(door: Door, seed: int = 0, dtype="float32") -> dict[str, jax.Array]:
    """Whole numbers from -4 to -1, which every dtype has but booleans; masks of which the first two
    count."""
    rng = np.random.default_rng(seed)
    arrays = {
        name: jnp.asarray(rng.integers(-4, 0, shape)).astype(dtype)
        for name, shape in door.arrays.items()
    }
    if door.mask is not None:
        counts = rng.uniform(size=door.arrays[door.mask]) < 0.6
        counts[..., :2] = True
        arrays[door.mask] = jnp.asarray(counts)
    return arrays


def wrong(door: Door):
    """Every array by itself with a further axis and too short, and all of them with an axis for
    contexts."""
    right = values(door)
    if len(right) > 1:
        for name, x in right.items():
            yield f"{name} {[*x.shape, 1]}", right | {name: x[..., None]}
            yield f"{name} {[*x.shape[:-1], 1]}", right | {name: x[..., :1]}
            yield f"{name} {[C, *x.shape]}", right | {name: jnp.stack([x] * C)}
    if door.of == "samples":
        yield "all with contexts", {name: jnp.stack([x] * C) for name, x in right.items()}
        yield "all as columns", {name: x[..., None] for name, x in right.items()}
        yield "all without an axis", {name: x[0] for name, x in right.items()}


each_door = pytest.mark.parametrize("name", DOORS)


@each_door
def test_wrong_shapes_are_refused_and_vmap_is_named(name):
    for _, arrays in wrong(DOORS[name]):
        with pytest.raises(ValueError, match=r"jax\.vmap"):
            DOORS[name].call(**arrays)


@each_door
def test_so_are_they_under_jit_vmap_and_shard_map(name):
    door = DOORS[name]
    _, arrays = list(wrong(door))[-1]
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))

    def call(arrays):
        return door.call(**arrays)

    spread = jax.shard_map(call, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    stacked = jax.tree.map(lambda x: jnp.stack([x] * C), arrays)
    for transformed, given in (
        (jax.jit(call), arrays),
        (jax.vmap(call), stacked),
        (spread, arrays),
    ):
        with pytest.raises(ValueError, match=r"jax\.vmap"):
            transformed(given)


@each_door
def test_contexts_come_from_vmap(name):
    door = DOORS[name]
    batch = [values(door, seed) for seed in range(C)]
    together = jax.tree.map(lambda *x: np.stack(x), *batch)
    call = jax.jit(lambda arrays: door.call(**arrays))
    expected = jax.tree.map(lambda *x: np.stack(x), *map(call, batch))
    close(jax.jit(jax.vmap(call))(together), expected)
    if door.of == "entries":
        close(call(together), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "int32"])
@each_door  # innermost: what a function has compiled serves the next dtype
def test_everything_but_float64_is_computed_in_float32(name, dtype):
    """All arguments in the dtype, and each by itself beside float32: the numbers are those of
    float32 throughout."""
    door = DOORS[name]
    right = values(door)
    expected = door.call(**right)
    assert {x.dtype.name for x in jax.tree.leaves(expected)} == {"float32"}
    narrow = values(door, dtype=dtype)
    for arrays in (narrow, *(right | {key: narrow[key]} for key in right)):
        found = door.call(**arrays)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert {x.dtype.name for x in jax.tree.leaves(found)} == {"float32"}


@each_door
def test_three_hundred_samples_of_int8_are_counted(name):
    """Regression: 300 is no int8."""
    door = DOORS[name]
    many = door._replace(
        arrays={
            key: (300, *shape[1:]) if shape[0] == N else shape for key, shape in door.arrays.items()
        }
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        door.call(**values(many, dtype="int8")),
        door.call(**values(many)),
    )


@pytest.mark.parametrize("name", [name for name, door in DOORS.items() if door.mask])
@pytest.mark.parametrize("junk", [jnp.nan, jnp.inf, -jnp.inf], ids=str)
def test_masked_entries_may_be_anything(name, junk):
    """In value and in gradient; and a mask of integers is a mask."""
    door = DOORS[name]
    clean = values(door)
    counted = clean.pop(door.mask)
    masked = [
        key
        for key in clean
        if clean[key].shape == counted.shape and (not door.masks or key in door.masks)
    ]
    dirty = clean | {key: jnp.where(counted, clean[key], junk) for key in masked}

    expected, slope = value_and_gradient(name)(clean, counted)
    for mask in (counted, counted.astype(jnp.int32) * 2):
        value, gradient = value_and_gradient(name)(dirty, mask)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for key in masked:
            np.testing.assert_allclose(
                gradient[key], jnp.where(counted, slope[key], 0.0), rtol=1e-6, err_msg=key
            )


@cache
def value_and_gradient(name):
    """Of what counts of a door's results, compiled once for all kinds of junk."""
    door = DOORS[name]

    def total(arrays, mask):
        leaves, counted = jax.tree.leaves(door.call(**arrays, **{door.mask: mask})), mask != 0
        return sum(
            jnp.where(counted, x, 0.0).sum() if x.shape == counted.shape else x.sum()
            for x in leaves
        )

    return jax.jit(jax.value_and_grad(total))


def test_a_mask_of_floats_is_refused():
    for door in DOORS.values():
        if door.mask is not None:
            arrays = values(door)
            with pytest.raises(ValueError, match="must be booleans"):
                door.call(**arrays | {door.mask: arrays[door.mask].astype(float)})


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7), a, b)


@each_door
def test_float32_stays_float32_in_64_bit_mode(name, x64):
    """As with JAX_ENABLE_X64=1, where a plain `jnp.zeros` or `arange` inside would be of 64
    bits."""
    door = DOORS[name]
    call = jax.jit(lambda arrays: door.call(**arrays))
    with jax.enable_x64(False):
        arrays = values(door)
        expected = call(arrays)
    found = call(arrays)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
    assert {x.dtype.name for x in jax.tree.leaves(found)} == {"float32"}
