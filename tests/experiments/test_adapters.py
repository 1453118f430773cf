"""`--lora-rank`: a run of adapters, from the command line to a whole model."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fjax
from experiments.common.build import (
    load_aligned,
    load_model,
    make_built,
    make_trained,
    make_tuner,
)
from experiments.common.settings import Settings, as_json
from experiments.lexical_constraint.__main__ import main
from fjax.adapters import merge_attached
from fjax.models import load_adapters
from fjax.runs import Display, RunError
from fjax.runs.folder import check_same
from fjax.runs.reading import read_config
from fjax.training import Checkpoints

from .commands import SMALL, TINY, run

SETTINGS = {
    "model": str(TINY), "max_new_tokens": 8, "samples": 16, "lora_rank": 2, "lora_alpha": 4.0,
    "trainable": "attn",
}  # fmt: skip
FLAGS = "--word", "w9", *SMALL, "--lora-rank", 2, "--lora-alpha", 4, "--trainable", "attn"


@pytest.fixture(scope="module")
def model():
    return load_model(Settings(model=str(TINY), max_new_tokens=8))


def test_the_pattern_chooses_and_the_policy_begins_where_it_should(model):
    """As the base model, or as the one of --start; α counts."""
    trained = make_trained(Settings(**SETTINGS), model.params)
    assert trained.initial
    assert all("attn" in path and "kernel" in path for path in trained.initial)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)  # noqa: E731
    same(trained.policy_of(trained.initial), model.params)
    start = model._replace(params=jax.tree.map(lambda x: x + 1, model.params))
    built = make_built(Settings(**SETTINGS), model, None, Display(), begun=start)
    same(built.trained.policy_of(built.trained.initial), start.params)
    ones = jax.tree.map(jnp.ones_like, trained.initial)
    path = "h_0/attn/c_attn/kernel"
    change = trained.policy_of({path: ones[path]})["h_0"]["attn"]["c_attn"]["kernel"]
    before = model.params["h_0"]["attn"]["c_attn"]["kernel"]
    np.testing.assert_allclose(change - before, 4 / 2 * 2, rtol=1e-5)


def test_all_adapters_move_whatever_the_pattern(model):
    """It chooses matrices, and no adapter's path has to have it in it."""
    settings = Settings(**SETTINGS | {"trainable": "attn.*kernel$"})
    trained = make_trained(settings, model.params)
    tuner = make_tuner(settings, model, trained=trained)
    state = tuner.init(trained.initial)
    tokens, where = jnp.ones((16, 4), int), jnp.arange(16 * 4).reshape(16, 4) % 4 > 0
    tokens = tokens.at[:, 1:].set(jnp.arange(48).reshape(16, 3) % 7)
    log_q = fjax.make_log_prob_fn(model.logits_fn)(model.params, tokens, where)
    log_score = jnp.where(tokens[:, 1] == 3, log_q, -jnp.inf)
    state, info = jax.jit(tuner.update)(state, fjax.Rollout(tokens, where, log_q, log_score))
    assert info.finite
    assert all(adapter["up"].any() for adapter in state.params.values())


def state_of(settings, model, folder, step):
    """Of a run that begins as the base model."""
    trained = make_trained(settings, model.params)
    like = make_tuner(settings, model, trained=trained).init(trained.initial)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        found = checkpoints.restore({"state": like, "seconds": np.zeros(())}, step=step)
    return found["state"]


def test_a_run_without_another_copy_of_the_weights(monkeypatch, tmp_path, model):
    """Its policy has the base model's own arrays, and is exported as a whole and as adapters, which
    are a model for --start and other commands."""
    folder = tmp_path / "run"
    arguments = *FLAGS, "--no-lora-merge", "--run-folder", folder
    assert run(monkeypatch, main, *arguments, "--steps", 2) == 0
    settings = Settings(**SETTINGS, lora_merge=False)
    adapters = state_of(settings, model, folder, 2).params
    policy = make_trained(settings, model.params).policy_of(adapters)
    kernel = policy["h_0"]["attn"]["c_attn"]["kernel"]
    assert kernel.matrix is model.params["h_0"]["attn"]["c_attn"]["kernel"]
    assert kernel.up.any()
    found, alpha = load_adapters(folder / "adapters", model.params, model.config)
    jax.tree.map(np.testing.assert_array_equal, found, adapters)
    assert alpha == 4
    as_adapters = load_aligned(settings, model, str(folder / "adapters")).params
    whole = fjax.from_pretrained(folder / "model").params
    for params in (as_adapters, whole):
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
        jax.tree.map(close, params, merge_attached(policy))
    # Whether they are added up may change on the way: it is the same policy.
    other = *FLAGS, "--lora-merge", "--run-folder", folder
    assert run(monkeypatch, main, *other, "--steps", 3, "--resume") == 0


def test_a_run_exports_a_whole_model_and_saves_adapters_alone(monkeypatch, tmp_path, model):
    folder = tmp_path / "run"
    assert run(monkeypatch, main, *FLAGS, "--steps", 2, "--run-folder", folder) == 0
    settings = Settings(**SETTINGS)
    trained = make_trained(settings, model.params)
    numbers = sum(x.size for x in jax.tree.leaves(trained.initial))
    assert read_config(folder)["trained_parameters"] == numbers
    state = state_of(settings, model, folder, 2)
    record = json.loads((folder / "checkpoints/2/record/data.json").read_text())
    saved = sum(int(np.prod(array["shape"])) for array in record["arrays"].values())
    assert 3 * numbers < saved < 3 * numbers + 20  # Adam's two, counts, log Z
    exported = fjax.from_pretrained(folder / "model")
    policy = trained.policy_of(state.params)
    tokens = jnp.array([[0, 3, 1, 4, 1], [0, 5, 9, 2, 6]])
    log_probs = [
        fjax.make_log_prob_fn(model.logits_fn)(params, tokens, tokens > 0)
        for params in (exported.params, policy, model.params)
    ]
    np.testing.assert_array_equal(log_probs[0], log_probs[1])
    assert not np.allclose(log_probs[0], log_probs[2])


def test_a_run_from_before_there_were_adapters_goes_on(tmp_path):
    old = {k: v for k, v in as_json(Settings()).items() if not k.startswith("lora")}
    (tmp_path / "config.json").write_text(json.dumps(old))
    check_same(tmp_path, as_json(Settings()))
    with pytest.raises(RunError, match="lora_rank: None there, 2 now"):
        check_same(tmp_path, as_json(Settings(lora_rank=2)))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"lora_rank": 500}, r"--lora-rank 500: rank must be from 1 to the smaller side"),
        ({"lora_rank": 1, "trainable": "ln_f"}, r"--lora-rank 1, --trainable ln_f: .* no matrix"),
        ({"lora_rank": 1, "trainable": "lm_head"}, r"lm_head' is in no parameter's path\. There"),
    ],
)
def test_adapters_that_cannot_be_are_answered_in_a_sentence(chosen, message, model):
    with pytest.raises(RunError, match=message):
        make_trained(Settings(**chosen), model.params)


def test_alpha_is_for_adapters():
    with pytest.raises(ValueError, match="--lora-alpha is for adapters: give --lora-rank"):
        Settings(lora_alpha=2.0)
