"""A tuner of GPT-2 that was saved on one mesh goes on on another: the next step is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fjax
from fjax.models import gpt2
from fjax.training import Checkpoints, Rollout

CONFIG = gpt2.GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=1, n_head=2)
LOG_PROB_FN = fjax.make_log_prob_fn(gpt2.logits_fn(CONFIG))
TUNER = fjax.fdpg(LOG_PROB_FN, optax.adam(1e-2), divergence=fjax.jensen_shannon())
UPDATE = jax.jit(TUNER.update)
MESHES = {
    "1": Mesh(jax.devices()[:1], ("data",)),
    "8": Mesh(jax.devices(), ("data",)),
    "2x4": Mesh(np.reshape(jax.devices(), (2, 4)), ("data", "tensor")),
}


def rollout():
    """Rows as they came, with a policy that has moved since."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 16, (8, 6)), jnp.int32)
    where = jnp.broadcast_to(jnp.arange(6) > 0, tokens.shape)
    log_q = LOG_PROB_FN(gpt2.init_params(CONFIG, jax.random.key(1)), tokens, where)
    return Rollout(tokens, where, log_q, log_q + jnp.linspace(-1.0, 1.0, 8))


def layout(tree, name):
    """Matrices over all axes that divide them, from the last on; what is smaller, everywhere."""
    mesh = MESHES[name]

    def of(leaf):
        axes, shape = [None] * leaf.ndim, leaf.shape
        if leaf.ndim >= 2:
            for i, axis in zip((-1, -2), reversed(mesh.axis_names), strict=False):
                axes[i] = axis if shape[i] % mesh.shape[axis] == 0 else None
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(of, tree)


def place(tree, name):
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), tree, layout(tree, name))


@pytest.mark.parametrize(("before", "after"), [("1", "8"), ("8", "2x4"), ("2x4", "1")])
def test_the_next_step_is_the_same_on_another_mesh(before, after, tmp_path):
    rows = rollout()
    state = place(TUNER.init(gpt2.init_params(CONFIG, jax.random.key(0))), before)
    for _ in range(2):
        state, _ = UPDATE(state, rows)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state)
        restored = checkpoints.restore(layout(state, after))
    for leaf, like in zip(
        jax.tree.leaves(restored), jax.tree.leaves(layout(state, after)), strict=True
    ):
        assert leaf.sharding == like.sharding
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    spread = {leaf.sharding.num_devices for leaf in jax.tree.leaves(restored.params)}
    assert spread == {MESHES[after].size}
    (stayed, expected), (moved, found) = UPDATE(state, rows), UPDATE(restored, rows)
    for name, value in expected._asdict().items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), value, getattr(found, name)
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stayed.params, moved.params
    )
