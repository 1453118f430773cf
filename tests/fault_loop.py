"""Runs killed at random moments, and started again until they end: python -m tests.fault_loop --kills 50.

SIGKILL leaves a process no chance to tidy up. Whatever it hits, a save, an evaluation or the export,
the next process must go on from the newest whole checkpoint, and in the end nothing may tell the
run from one that was never killed: not a bit of the parameters, the optimiser, the proposal or the
replay, and not a line of metrics.jsonl. Anything else is an AssertionError.

Two kinds of runs of the table of words take turns: one whose proposal adapts, and one in stages on a
replay. All processes are forked from one that has imported everything but not begun to compute, so
that a kill hits the work of the run and seldom an import.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import optax

import fjax
from fjax.estimators import known_log_z
from fjax.runs import align, read_metrics
from fjax.runs.reading import MODEL, current_step, is_begun
from fjax.runs.stages import Stage, staged
from tests import bigram

KINDS = ("adaptive", "staged")
SIZES = {"eval_every": 5, "eval_samples": 48, "checkpoint_every": 2}
STEPS = 24
MOST = 7
"""Kills of one run; then it is left alone, to end."""
LIMIT = 900.0
"""Seconds within which a process must get where it is to be killed, or end: one that hangs is
noticed too."""


class Kill(NamedTuple):
    """What was there when a process was killed.

    Attributes:
        kind: of the run.
        step: the last one in metrics.jsonl.
        amid: what was half done, as far as files tell.
    """

    kind: str
    step: int
    amid: str


def go(folder: Path, kind: str) -> None:
    """What each process does: begins the run, or goes on with it, to its end."""
    sys.stdout = sys.stderr = folder.with_suffix(".log").open("a", encoding="utf-8")
    divergences = {name: fjax.divergences.by_name(name) for name in ("jensen_shannon",)}
    options = {"proposal_every": 3} if kind == "adaptive" else {}
    result = align(
        bigram.model(),
        bigram.TARGET,
        bigram.tuner() if kind == "adaptive" else _stages(),
        bigram.collector(),
        folder=folder,
        steps=STEPS,
        divergences=divergences,
        resume=is_begun(folder),
        **SIZES,
        **options,
    )
    sys.stdout.flush()
    os._exit(result.status)  # what a forked process would tidy up belongs to the first one


def _stages() -> fjax.runs.Stepper:
    """12 steps that draw and 12 that learn, in two stages."""
    import jax  # what computes begins after the fork

    def make_tuner(divergence: fjax.FDivergence) -> fjax.Tuner:
        return fjax.fdpg(
            bigram.LOG_PROB_FN,
            optax.adam(0.05),
            divergence=divergence,
            baseline=fjax.surrogates.self_normalized,
            log_z=known_log_z(),
        )

    stages = (Stage(fjax.forward_kl(), 192, 12), Stage(fjax.jensen_shannon(), 192, 12))
    given = make_tuner, stages, bigram.collector(), bigram.TARGET, jax.random.key(0)
    return staged(*given, minibatch_size=16, updates_per_step=2)


def loop(folder: Path, kills: int, seed: int) -> list[Kill]:
    """Runs of both kinds until there were so many kills, each compared with one of no kills.

    Raises:
        AssertionError: if a process fails, or a run differs from the one of its kind.
    """
    source, found, number = random.Random(seed), [], 0
    for kind in KINDS:
        _run_to_its_end(folder / f"{kind}-whole", kind)
    while len(found) < kills:
        kind = KINDS[number % len(KINDS)]
        path, whole = folder / f"{kind}-{number}", folder / f"{kind}-whole"
        # Half of a few, so that both kinds have their share.
        for _ in range(min(MOST, kills - len(found), max(1, kills // len(KINDS)))):
            if (kill := _killed(path, kind, source)) is None:
                break
            found.append(kill)
        _run_to_its_end(path, kind)
        assert left(path) == left(whole), f"{path} is not as {whole}"
        number += 1
        print(f"{path.name}: {len(found)} kills so far, as one that was never killed", flush=True)
    return found


def _killed(path: Path, kind: str, source: random.Random) -> Kill | None:
    """Starts the run, or goes on with it, and kills it: soon, or at some step that is to come.

    None if it was faster, and came to its end.
    """
    soon = source.random() < 0.2
    step = 0 if soon else source.randint(min(current_step(path) + 1, STEPS), STEPS)
    delay = source.uniform(0, 4.0 if soon else 0.5)
    process, begun = _start(path, kind), time.monotonic()
    while current_step(path) < step and process.exitcode is None:
        assert time.monotonic() - begun < LIMIT, f"{path} hangs: see {path.with_suffix('.log')}"
        time.sleep(0.002)
    process.join(delay)
    if process.exitcode is not None:
        _check_ended(process, path)
        return None
    process.kill()
    process.join()
    return Kill(kind, *_seen(path))


def _run_to_its_end(path: Path, kind: str) -> None:
    process = _start(path, kind)
    process.join(LIMIT)
    _check_ended(process, path)


def _start(path: Path, kind: str):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fjax.runs", "tests.bigram"])
    process = context.Process(target=go, args=(path, kind))
    process.start()
    return process


def _check_ended(process, path: Path) -> None:
    """Whether it came to a good end by itself."""
    log = path.with_suffix(".log")
    said = log.read_text(encoding="utf-8") if log.exists() else "nothing"
    assert process.exitcode == 0, f"{path} ended with {process.exitcode}:\n{said[-3000:]}"


def _seen(path: Path) -> tuple[int, str]:
    """The step, and what was half done."""
    if not is_begun(path):
        return 0, "before the run was begun"
    metrics = path / "metrics.jsonl"
    steps = [r["step"] for r in read_metrics(path)] if metrics.is_file() else []
    if any(path.glob("checkpoints/*tmp*")):
        amid = "a save"
    elif (path / MODEL).is_dir():
        amid = "pictures and report"
    elif not steps:
        amid = "restoring or compiling"
    else:
        amid = "steps and evaluations"
    return max(steps, default=0), amid


def left(path: Path) -> dict:
    """Of what a run leaves, all that must not depend on where it was killed."""
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(path)]
    steps = [record["step"] for record in records if record["kind"] == "step"]
    assert steps == [*range(1, len(steps) + 1)], f"{path / 'metrics.jsonl'} has the steps {steps}"
    newest = max(int(p.name) for p in path.glob("checkpoints/*") if p.name.isdecimal())
    record = json.loads((path / "checkpoints" / str(newest) / "record" / "data.json").read_text())
    arrays = {k: v["sha256"] for k, v in record["arrays"].items() if k != "seconds"}
    files = {name: (path / name).read_bytes() for name in ("samples.jsonl", f"{MODEL}/table.npy")}
    # NaN is not itself, its name is.
    return {"records": repr(records), "newest": newest, "arrays": arrays, **files}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder) / "compiled"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        found = loop(Path(folder), chosen.kills, chosen.seed)
    for what, count in Counter(f"{kill.kind}, amid {kill.amid}" for kill in found).most_common():
        print(f"{count:4} {what}")
    seconds = time.monotonic() - begun
    print(f"{len(found)} kills, every run as if there had been none; {seconds:.0f} s.")


if __name__ == "__main__":
    main()
