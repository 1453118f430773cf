"""What every public function of the mathematics does with wrong shapes, other dtypes and masked junk, as a user meets it.

A function with arrays among its arguments needs a row in ``DOORS``; `test_every_public_function_has_a_row` fails without.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from fjax import divergences, estimators, surrogates

pytestmark = pytest.mark.usefixtures("bare")

MODULES = (divergences, estimators, surrogates)
N, C = 8, 4  # samples, which eight devices can share, and contexts
F = divergences.jensen_shannon()


class Door(NamedTuple):
    """How a function is called, and with what.

    Attributes:
        call: takes the arrays as keyword arguments, by the names that its error messages use.
        arrays: name -> shape.
        of: what the function is about: "samples", each array one number a sample, so that a further axis is an error, or
            "entries", which are independent: then equal shapes will do.
        mask: which argument is a mask, if any; None for a call with all of them counted must be possible.
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
    return lambda log_weights, where=None: tuple(update(estimators.init_log_mean(), log_weights, where=where))


three = ("log_pi", "log_p", "log_q")
# A function with several ways to be called has several rows, told apart by what stands behind the point.
DOORS: dict[str, Door] = {
    "exact_divergence": samples(partial(divergences.exact_divergence, divergence=F), "log_pi", "log_p", mask="where"),
    "effective_sample_size": samples(estimators.effective_sample_size, "log_weights", mask="where"),
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
        lambda weights: surrogates.running_mean(0.5).update(surrogates.running_mean(0.5).init(), weights), "weights"
    ),
    "centred_weights": samples(partial(surrogates.centred_weights, baseline=0.5), "weights", "log_pi", "log_q"),
    "surrogate_loss": samples(partial(surrogates.surrogate_loss, divergence=F), *three),
    "surrogate_loss.leave_one_out": samples(
        partial(surrogates.surrogate_loss, divergence=F, baseline=surrogates.leave_one_out), *three
    ),
}  # fmt: skip
NO_ARRAYS_OF_SAMPLES = {"log_mean_estimate"}  # what takes a state, or an option that may be an array


def takes_arrays(function) -> bool:
    """Not an option, which is one number, but arrays of samples."""
    annotations = (p.annotation for p in inspect.signature(function).parameters.values())
    return any("Array" in str(annotation) and "''" not in str(annotation) for annotation in annotations)


def test_every_public_function_has_a_row():
    public = {f for module in MODULES for f in map(vars(module).get, module.__all__) if inspect.isfunction(f)}
    expected = {f.__name__ for f in public if takes_arrays(f)} - NO_ARRAYS_OF_SAMPLES
    assert len(expected) > 10
    assert expected <= {name.split(".")[0] for name in DOORS}, expected - {name.split(".")[0] for name in DOORS}


def values(door: Door, seed: int = 0, dtype="float32") -> dict[str, jax.Array]:
    """Whole numbers from -4 to -1, which every dtype has but booleans; masks of which the first two count."""
    rng = np.random.default_rng(seed)
    arrays = {name: jnp.asarray(rng.integers(-4, 0, shape)).astype(dtype) for name, shape in door.arrays.items()}
    if door.mask is not None:
        counts = rng.uniform(size=door.arrays[door.mask]) < 0.6
        counts[..., :2] = True
        arrays[door.mask] = jnp.asarray(counts)
    return arrays


def wrong(door: Door):
    """Every array by itself with a further axis and too short, and all of them with an axis for contexts."""
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
    for transformed, given in ((jax.jit(call), arrays), (jax.vmap(call), stacked), (spread, arrays)):
        with pytest.raises(ValueError, match=r"jax\.vmap"):
            transformed(given)


@each_door
def test_contexts_come_from_vmap(name):
    door = DOORS[name]
    batch = [values(door, seed) for seed in range(C)]
    together = {key: jnp.stack([arrays[key] for arrays in batch]) for key in batch[0]}
    each = [door.call(**arrays) for arrays in batch]
    close(jax.vmap(lambda arrays: door.call(**arrays))(together), jax.tree.map(lambda *x: jnp.stack(x), *each))
    if door.of == "entries":
        close(door.call(**together), jax.tree.map(lambda *x: jnp.stack(x), *each))


@each_door
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "int32"])
def test_everything_but_float64_is_computed_in_float32(name, dtype):
    """All arguments in the dtype, and each by itself beside float32: the numbers are those of float32 throughout."""
    door = DOORS[name]
    right = values(door)
    expected = door.call(**right)
    assert {x.dtype.name for x in jax.tree.leaves(expected)} == {"float32"}
    narrow = values(door, dtype=dtype)
    for arrays in (narrow, *(right | {key: narrow[key]} for key in right)):
        jax.tree.map(np.testing.assert_array_equal, door.call(**arrays), expected)
        assert {x.dtype.name for x in jax.tree.leaves(door.call(**arrays))} == {"float32"}


@each_door
def test_three_hundred_samples_of_int8_are_counted(name):
    """Regression: 300 is no int8."""
    door = DOORS[name]
    many = door._replace(arrays={key: (300, *shape[1:]) for key, shape in door.arrays.items()})
    jax.tree.map(np.testing.assert_array_equal, door.call(**values(many, dtype="int8")), door.call(**values(many)))


@pytest.mark.parametrize("name", [name for name, door in DOORS.items() if door.mask])
@pytest.mark.parametrize("junk", [jnp.nan, jnp.inf, -jnp.inf], ids=str)
def test_masked_entries_may_be_anything(name, junk):
    """In value and in gradient; and a mask of integers is a mask."""
    door = DOORS[name]
    clean = values(door)
    counted = clean.pop(door.mask)
    masked = [key for key in clean if clean[key].shape == counted.shape and (not door.masks or key in door.masks)]
    dirty = clean | {key: jnp.where(counted, clean[key], junk) for key in masked}

    def total(arrays, mask):
        leaves = jax.tree.leaves(door.call(**arrays, **{door.mask: mask}))
        return sum(jnp.where(counted, x, 0.0).sum() if x.shape == counted.shape else x.sum() for x in leaves)

    for mask in (counted, counted.astype(jnp.int32) * 2):
        value, gradient = jax.value_and_grad(total)(dirty, mask)
        expected, slope = jax.value_and_grad(total)(clean, counted)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for key in masked:
            np.testing.assert_allclose(gradient[key], jnp.where(counted, slope[key], 0.0), rtol=1e-6, err_msg=key)


def test_a_mask_of_floats_is_refused():
    for door in DOORS.values():
        if door.mask is not None:
            arrays = values(door)
            with pytest.raises(ValueError, match="must be booleans"):
                door.call(**arrays | {door.mask: arrays[door.mask].astype(float)})


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), a, b)
