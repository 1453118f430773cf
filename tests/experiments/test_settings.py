"""The optimiser that a command line stands for."""

import jax
import numpy as np
import optax
import pytest

from experiments._programs import load_model
from experiments._run_folder import RunError
from experiments._settings import Settings, make_optimizer

from .commands import TINY


@pytest.fixture(scope="module")
def params():
    return load_model(Settings(model=str(TINY), max_new_tokens=8)).params


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_only_what_is_trainable_moves_and_only_its_gradient_is_clipped(params, optimizer):
    settings = Settings(trainable="wte|^h_0/.*bias", optimizer=optimizer, learning_rate=0.1, warmup_steps=1, max_grad_norm=0.5)
    descend = make_optimizer(settings, params)
    updates, _ = descend.update(jax.tree.map(np.ones_like, params), descend.init(params), params)
    moved = {
        jax.tree_util.keystr(keys, simple=True, separator="/")
        for keys, update in jax.tree_util.tree_leaves_with_path(updates)
        if np.asarray(update).any()
    }
    biases = {f"h_0/{name}/bias" for name in ("attn/c_attn", "attn/c_proj", "ln_1", "ln_2", "mlp/c_fc", "mlp/c_proj")}
    assert moved == biases | {"wte/embedding"}
    if optimizer == "sgd":
        np.testing.assert_allclose(optax.tree.norm(updates), 0.1 * 0.5, rtol=1e-5)


def test_a_pattern_without_parameters_is_refused(params):
    with pytest.raises(RunError, match=r"--trainable 'lm_head' is in no parameter's path\. There are h_N/.*, wte/emb"):
        make_optimizer(Settings(trainable="lm_head"), params)
    with pytest.raises(ValueError, match=r"--trainable must be a regular expression, got '\(wte'"):
        Settings(trainable="(wte")
