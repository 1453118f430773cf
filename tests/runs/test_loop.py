"""A run from Python: what it leaves, how it goes on, and how it ends before its time."""

import re
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fjax
from fjax.adapters import adapt, init_lora, merge_lora
from fjax.estimators import Estimate
from fjax.rollouts import model_collector
from fjax.runs import (
    Progress,
    RunError,
    Stepper,
    align,
    evaluating,
    loop,
    open_run,
    read_metrics,
)
from fjax.runs.aim import Aim
from fjax.runs.reading import is_finished, read_config, read_samples
from fjax.training import Checkpoints, TrainState, ppo_tuner
from tests import bigram
from tests.experiments.commands import TINY

DIVERGENCES = {name: fjax.divergences.by_name(name) for name in ("jensen_shannon", "forward_kl")}
SIZES = {"steps": 4, "eval_every": 2, "eval_samples": 48, "checkpoint_every": 2}


class Records:
    """A logger of one's own."""

    def __init__(self):
        self.taken, self.texts, self.closed = [], [], 0

    def log(self, record):
        self.taken.append(dict(record))

    def log_samples(self, records):
        self.texts += records

    def close(self):
        self.closed += 1


def run(folder, tuner=None, collector=None, **options):
    """A run of the table of words; a step takes milliseconds."""
    given = {"folder": folder, "divergences": DIVERGENCES} | SIZES | options
    tuner, collector = tuner or bigram.tuner(), collector or bigram.collector()
    model, target = given.pop("model", bigram.model()), given.pop("target", bigram.TARGET)
    return align(model, target, tuner, collector, **given)


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def records(folder) -> list[str]:
    """But for the time; NaN is not itself, its name is."""
    kept = ({k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(folder))
    return [repr(record) for record in kept]


def files(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run, with a logger and a metric of its own."""
    folder, logger = tmp_path_factory.mktemp("runs") / "run", Records()
    metrics = {"nines": lambda mine: Estimate(float(sum("w9" in t for t in mine.texts)), 0.0, 1.0)}
    result = run(folder, loggers=[logger], metrics=metrics, title="nines")
    return SimpleNamespace(folder=folder, logger=logger, result=result)


def test_in_about_twenty_lines_a_model_is_aligned(tmp_path):
    model = fjax.from_pretrained(TINY)

    def features(prompts, texts):
        return {"satisfaction": np.array(["w9" in text.split() for text in texts], np.float32)}

    def log_score(log_a, features):
        return np.where(features["satisfaction"] > 0, log_a, -np.inf)

    target = fjax.evaluation.TextTarget(features, log_score, headline="satisfaction")
    log_prob_fn = fjax.make_log_prob_fn(model.logits_fn)
    tuner = fjax.fdpg(log_prob_fn, optax.adam(1e-3), divergence=fjax.jensen_shannon())
    collector = model_collector(model, max_new_tokens=8, samples=32, base_samples=4)
    divergences = {"jensen_shannon": fjax.jensen_shannon()}
    result = align(
        model, target, tuner, collector, folder=tmp_path / "run", steps=4, eval_samples=64,
        divergences=divergences,
    )  # fmt: skip
    assert result.status == 0
    before, after = (r for r in read_metrics(tmp_path / "run") if r["kind"] == "evaluation")
    assert after["satisfaction"] > before["satisfaction"]
    aligned = fjax.from_pretrained(result.folder / "model")
    tokens, where = jnp.array([[0, 9, 9]]), jnp.array([[False, True, True]])
    found, old = (log_prob_fn(m.params, tokens, where) for m in (aligned, model))
    assert found > old


def test_what_a_run_leaves(finished):
    folder, result = finished.folder, finished.result
    assert (result.status, result.step, result.folder) == (0, 4, folder)
    assert is_finished(folder)
    assert {path.name for path in folder.iterdir()} >= {
        *("config.json", "metrics.jsonl", "samples.jsonl", "report.html", "checkpoints", "model"),
        *("training.png", "evaluation.png"),
    }
    config = read_config(folder)
    assert config | SIZES == config
    assert (config["title"], config["samples"], config["seed"]) == ("nines", 32, 0)
    of = {kind: [r["step"] for r in read_metrics(folder) if r["kind"] == kind] for kind in
          ("step", "evaluation")}  # fmt: skip
    assert of == {"step": [1, 2, 3, 4], "evaluation": [0, 2, 4]}
    assert {record["step"] for record in read_samples(folder)} == {0, 2, 4}
    last = read_metrics(folder)[-1]
    assert last["samples"] == 4 * 32
    assert {name: last[name] for name in result.figures} == {
        name: figure.value for name, figure in result.figures.items()
    }
    assert last["nines"] >= 0
    exported = np.load(folder / "model" / "table.npy")
    assert abs(exported - bigram.BASE).max() > 0.1
    np.testing.assert_array_equal(exported, result.params)


def test_a_logger_of_one_s_own_gets_every_record_and_is_closed(finished):
    names = [(record["kind"], record["step"]) for record in finished.logger.taken]
    assert names == [(record["kind"], record["step"]) for record in read_metrics(finished.folder)]
    texts = [record["text"] for record in read_samples(finished.folder)]
    assert [record["text"] for record in finished.logger.texts] == texts
    assert finished.logger.closed == 1


SOFT = bigram.TARGET._replace(
    log_score=lambda log_a, features: (log_a + features["satisfaction"]).astype(np.float32),
    bound=None,
)
"""Positive everywhere, as reverse KL wants it."""


MERGE = partial(merge_lora, bigram.BASE, alpha=6.0)
ADAPTERS = init_lora(bigram.BASE, jax.random.key(0), rank=3)
ADAPTED = fjax.fdpg(
    adapt(bigram.LOG_PROB_FN, MERGE), optax.adam(0.1), divergence=fjax.jensen_shannon()
)


def fast() -> optax.GradientTransformation:
    """With a state of every kind: a schedule's count, and parameters that stay."""
    moves = optax.sgd(optax.linear_schedule(1.0, 0.1, 5))
    return optax.partition({True: moves, False: optax.set_to_zero()}, True)


@pytest.mark.parametrize(
    ("tuner", "options"),
    [
        (bigram.tuner(), {"proposal_every": 2}),
        (bigram.tuner(fast()), {"overlap": True}),
        (
            ppo_tuner(fjax.log_probs.make_token_log_prob_fn(bigram.logits_fn), optax.adam(0.1)),
            {"target": SOFT},
        ),
        (ADAPTED, {"initial": ADAPTERS, "policy_of": MERGE, "proposal_every": 2}),
    ],
    ids=("adaptive", "overlap", "ppo", "adapters"),
)
def test_a_resumed_run_equals_one_that_was_never_stopped(tuner, options, tmp_path):
    """Stopped in the middle between two checks of the proposal."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, tuner, steps=5, **options).status == 0
    assert run(parts, tuner, steps=3, **options).status == 0
    assert run(parts, tuner, steps=5, resume=True, **options).status == 0
    # B18: the evaluation that ended the first part was one more, by which patience stopped
    # elsewhere.
    assert records(whole) == records(parts)
    evaluated = [r["step"] for r in read_metrics(parts) if r["kind"] == "evaluation"]
    assert evaluated == [0, 2, 4, 5]
    for name in ("samples.jsonl", "model/table.npy"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_a_policy_may_be_what_its_parameters_stand_for(tmp_path):
    """An adapter: a change of the base model's table is trained, and the table is exported."""

    def policy_of(change):
        return bigram.BASE + change["by"]

    def log_prob_fn(change, tokens, where):
        return bigram.LOG_PROB_FN(policy_of(change), tokens, where)

    tuner = fjax.fdpg(log_prob_fn, optax.adam(0.1), divergence=fjax.jensen_shannon())
    start = {"by": jnp.zeros_like(bigram.BASE)}
    result = run(tmp_path / "run", tuner, steps=2, initial=start, policy_of=policy_of)
    assert result.status == 0
    first, last = (r for r in read_metrics(tmp_path / "run") if r["kind"] == "evaluation")
    assert first["kl_to_base"] == pytest.approx(0, abs=1e-6)
    assert abs(last["kl_to_base"]) > 1e-3
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        trained = checkpoints.restore({"state": tuner.init(start), "seconds": np.zeros(())})
    exported = np.load(tmp_path / "run" / "model" / "table.npy")
    np.testing.assert_array_equal(exported, policy_of(trained["state"].params))
    np.testing.assert_array_equal(exported, result.params)


def test_adapters_begin_as_the_base_model_and_so_its_rate_is_known(tmp_path):
    """Whether the constraint ever holds is said at step 0, as without adapters."""
    never = bigram.TARGET._replace(
        features=lambda prompts, texts: {"satisfaction": np.zeros(len(texts), np.float32)},
        stop_if_absent=True,
    )
    options = {"target": never, "initial": ADAPTERS, "policy_of": MERGE}
    with pytest.raises(RunError, match="None of 48 samples of the base model satisfies"):
        run(tmp_path / "run", ADAPTED, **options)


def own_stepper(finite=lambda number: True, samples=7):
    """A table that grows by one a step, whatever anybody says of it."""

    def step(progress, number):
        state = progress.state
        moved = state._replace(step=state.step + 1, params=state.params + 1)
        return Progress(moved), {"finite": finite(number), "number": number}

    def begin(params):
        return Progress(TrainState(jnp.zeros((), jnp.int32), jnp.asarray(params), (), ()))

    return Stepper(begin, lambda progress: None, step, samples=samples, unit="pair")


def test_a_stepper_of_one_s_own_is_run_and_resumed(tmp_path, capsys):
    assert run(tmp_path / "run", own_stepper(), steps=1).status == 0
    printed = said(capsys)
    assert "1 step of 7 pairs, from the start" in printed  # and neither "1 steps" nor a share
    assert run(tmp_path / "run", own_stepper(), steps=3, resume=True).status == 0
    assert "3 steps of 7 pairs, going on at step 1" in said(capsys)
    taken = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "step"]
    assert [(r["number"], r["samples"]) for r in taken] == [(0, 7), (1, 14), (2, 21)]
    # All are as far from the target as the base model, to which one number everywhere is nothing.
    exported = np.load(tmp_path / "run" / "model" / "table.npy") - bigram.BASE
    assert exported.round(4).min() == exported.round(4).max() in (1, 2, 3)


def test_a_step_that_is_not_finite_ends_the_run_and_is_saved(tmp_path):
    with pytest.raises(RunError, match="The gradient of step 2 was not finite"):
        run(tmp_path / "run", own_stepper(lambda number: number != 1))
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps[-1] == 2
    assert not (tmp_path / "run" / "model").exists()


def test_without_a_way_to_save_there_is_no_model(tmp_path):
    model = bigram.model()._replace(save=None)
    assert run(tmp_path / "run", own_stepper(), model=model, steps=1).status == 0
    assert not (tmp_path / "run" / "model").exists()
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"objective": "forward_lk"},
            ValueError,
            r"objective must be one of \['jensen_shannon', 'forward_kl'\], got 'forward_lk'",
        ),
        ({"steps": 0}, ValueError, "Counts must be at least 1, got steps=0"),
        ({"eval_every": 0, "patience": 0}, ValueError, "eval_every=0, patience=0"),
        ({"loggers": ["print"]}, RunError, "There is no logger 'print'. There are 'tensorboard'"),
        ({"loggers": ["wandb"]}, RunError, "There is no logger 'wandb'. .*'wandb=PROJECT'"),
        ({"resume": True}, RunError, "holds no run to resume"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run(tmp_path / "run", own_stepper(), **options)
    assert not list(tmp_path.iterdir())


def test_a_logger_s_package_is_asked_for_first(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"tensorboard needs tensorboardX.*pip install tensorboardX"):
        run(tmp_path / "run", own_stepper(), loggers=["tensorboard"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"is not empty. Give resume=True \(--resume\) to go on with the run in it"),
        ({"resume": True, "seed": 1}, r"another configuration \(.*seed: 0 there, 1 now"),
        ({"resume": True, "eval_samples": 49}, "eval_samples: 48 there, 49 now"),
        (
            {"resume": True, "model": bigram.model()._replace(params=bigram.BASE + 1)},
            "begun with different contents of model",
        ),
    ],
    ids=("again", "seed", "size", "model"),
)
def test_another_run_leaves_a_finished_one_as_it_is(finished, options, message):
    before = files(finished.folder)
    with pytest.raises(RunError, match=message):
        run(finished.folder, own_stepper(samples=32), **{"title": "nines"} | options)
    assert files(finished.folder) == before


def test_a_folder_in_use_is_refused(tmp_path):
    with open_run(tmp_path / "run"):
        with pytest.raises(RunError, match="is in use by process"):
            run(tmp_path / "run", own_stepper())
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(finished, tmp_path, capsys):
    """To the same end, bit for bit; and when none is whole, it says so. Nothing is in its files
    twice."""
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    whole, samples = records(folder), (folder / "samples.jsonl").read_bytes()
    exported = (folder / "model" / "table.npy").read_bytes()
    (folder / "checkpoints" / "4" / "tree" / "manifest.ocdbt").write_bytes(b"")
    shutil.rmtree(folder / "model")
    options = {"title": "nines", "resume": True}
    options["metrics"] = {"nines": lambda mine: Estimate(0.0, 0.0, 1.0)}
    with pytest.raises(
        RunError, match=r"checkpoint of step 4 .* is damaged: .*\(--resume-from 2\)"
    ):
        run(folder, **options)
    assert records(folder) == whole  # nothing was changed
    run(folder, resume_from=2, **options)
    aside = folder / "checkpoints" / "aside-4"
    assert f"Going on from step 2; the checkpoint of step 4 is now {aside}" in said(capsys)
    assert [re.sub(r"'nines[^,}]*", "", r) for r in records(folder)] == [
        re.sub(r"'nines[^,}]*", "", r) for r in whole
    ]
    assert (folder / "samples.jsonl").read_bytes() == samples
    assert (folder / "model" / "table.npy").read_bytes() == exported
    for path in (folder / "checkpoints").glob("[0-9]*/record/data.json"):
        path.write_bytes(b"{}")
    with pytest.raises(RunError, match=f"All checkpoints of {folder} are damaged. Delete it"):
        run(folder, **options)


def test_checkpoints_of_another_tree_are_told_apart(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, {"another": np.zeros(3)}, wait=True)
    with pytest.raises(RunError, match="another is there, but not asked for"):
        run(folder, own_stepper(samples=32), title="nines", resume=True)


def test_files_are_read_as_often_in_a_long_run_as_in_a_short_one(tmp_path, monkeypatch):
    """At the beginning, for the card and the report, but at no save and no evaluation: each would take
    longer than the one before."""
    reads, read_bytes = [], type(tmp_path).read_bytes
    monkeypatch.setattr(
        type(tmp_path), "read_bytes", lambda path: reads.append(path.name) or read_bytes(path)
    )
    assert run(tmp_path / "run", own_stepper(), steps=6).status == 0
    assert reads.count("metrics.jsonl") <= 5
    assert reads.count("samples.jsonl") == 2


def test_a_damaged_best_checkpoint_is_not_exported(bare):
    """After all the work there is a model, and a word about which."""
    warned = []

    def restore(like, *, step):
        raise OSError(f"The checkpoint of step {step} is damaged.")

    values = {2: 0.1, 4: 0.2}
    run = SimpleNamespace(
        aim=Aim(objective="jensen_shannon"),
        kept=SimpleNamespace(records={k: {"jensen_shannon": v} for k, v in values.items()}),
        checkpoints=SimpleNamespace(steps=[2, 4], restore=restore),
        display=SimpleNamespace(warn=warned.append),
    )
    last = Progress(SimpleNamespace(params={"w": 4}))
    assert loop._nearest_params(run, last, 4) == (4, {"w": 4})
    assert warned == [
        "The checkpoint of step 2 is damaged. The model is that of the last step, 4, though it was "
        "nearer at step 2."
    ]


def divergence_by_step(folder) -> dict:
    return {
        r["step"]: r["jensen_shannon"] for r in read_metrics(folder) if r["kind"] == "evaluation"
    }


def test_the_last_step_can_be_the_best(tmp_path, capsys):
    """B17: where the steps were a multiple of checkpoint_every it was saved before it was evaluated,
    and never exported."""
    folder, sizes = tmp_path / "run", {"eval_samples": 256}
    run(folder, **sizes)
    evaluated = divergence_by_step(folder)
    assert evaluated[4] < evaluated[2]
    assert "The model is that of step" not in said(capsys)
    # And it stays so, when the run goes on from there and gets worse.
    run(folder, steps=10, resume=True, **sizes)
    evaluated = divergence_by_step(folder)
    best = min((step for step in evaluated if step), key=evaluated.__getitem__)
    assert (folder / "checkpoints" / str(best)).is_dir()
    assert best == 10 or f"The model is that of step {best}" in said(capsys)


def test_a_signal_while_evaluating_saves_what_there_is(monkeypatch, tmp_path, capsys):
    """At the first evaluation, in the middle, and at the last: a save each time, and the run goes
    on to its end."""
    folder, measure = tmp_path / "run", evaluating.measure

    def and_signal(*given, **options):
        signal.raise_signal(signal.SIGTERM)
        return measure(*given, **options)

    for saved, before in ((0, 0), (2, 1), (4, 1)):
        calls = iter([measure] * before + [and_signal])
        monkeypatch.setattr(
            evaluating, "measure", lambda *a, calls=calls, **k: next(calls)(*a, **k)
        )
        result = run(folder, resume=saved > 0)
        assert (result.status, result.step, result.figures) == (143, saved, {})
        moved = abs(np.asarray(result.params) - bigram.BASE).max() > 0
        assert moved == (saved > 0)
        assert f"Stopped and saved at step {saved}." in said(capsys)
        assert (folder / "checkpoints" / str(saved)).is_dir()
    monkeypatch.setattr(evaluating, "measure", measure)
    (folder / ".model-killed").mkdir()
    (folder / ".model-killed" / "model.safetensors").write_bytes(b"half")
    assert run(folder, resume=True).status == 0
    taken = [record["step"] for record in read_metrics(folder) if record["kind"] == "step"]
    assert taken == [1, 2, 3, 4]
    assert (folder / "model" / "table.npy").is_file()
    assert not (folder / ".model-killed").exists()
