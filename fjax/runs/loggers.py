"""Where a run's figures go besides metrics.jsonl.

TensorBoard, Weights & Biases, a logger of your own.
"""

import importlib.util
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from fjax.runs.folder import OpenRun, write_text
from fjax.runs.reading import METRICS, RunError
from fjax.training import FanOut, JsonlLogger, Logger, TensorBoardLogger, WandbLogger

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Loggers that have a name, and the package that each needs."""


def check_loggers(loggers: Sequence[Logger | str]) -> None:
    """Whether what is asked for by name exists and is installed, before anything else is done.

    Raises:
        RunError: if not, with what exists.
    """
    for name in (logger for logger in loggers if isinstance(logger, str)):
        kind, _, project = name.partition("=")
        if kind not in PACKAGES or (kind == "wandb") != bool(project):
            raise RunError(
                f"There is no logger {name!r}. There are 'tensorboard', 'wandb=PROJECT', "
                f"'wandb=PROJECT,offline', and any object with log(record) and close()."
            )
        if importlib.util.find_spec(PACKAGES[kind]) is None:
            package = PACKAGES[kind]
            raise RunError(
                f"{name} needs {package}, which is not installed: pip install {package}, or leave "
                f"{name} out."
            )


def open_loggers(
    loggers: Sequence[Logger | str], run: OpenRun, title: str, *, after_step: int
) -> FanOut:
    """metrics.jsonl and all loggers that are asked for, as one that is closed at the end.

    A resumed run goes on in what is there.

    Args:
        loggers: objects, or names: "tensorboard", "wandb=PROJECT", "wandb=PROJECT,offline".
        run: whose figures they take.
        title: what Weights & Biases calls it.
        after_step: records of later steps are dropped; -1 for a new run.

    Raises:
        RunError: if one cannot be reached.
    """
    with ExitStack() as opened:
        metrics = JsonlLogger(run.path / METRICS, after_step=after_step)
        found: list[Logger] = [opened.enter_context(metrics)]
        for logger in loggers:
            if logger == "tensorboard":
                since = after_step if after_step > 0 else None
                logger = TensorBoardLogger(run.path / "tensorboard", after_step=since)
                found.append(opened.enter_context(logger))
            elif isinstance(logger, str):
                project = logger.partition("=")[2]
                found.append(opened.enter_context(_wandb(project, run.path, title, run.config)))
            else:
                found.append(logger)
        opened.pop_all()  # from here on they are closed by whoever has them
        return FanOut(found)


def _wandb(project: str, folder: Path, title: str, config: Mapping[str, object]) -> WandbLogger:
    project, _, mode = project.partition(",")
    options = {"name": title, "config": dict(config), "mode": mode or "online"}
    try:
        return WandbLogger(project, folder, run_id=_run_id(folder), **options)
    except RuntimeError as error:
        raise RunError(str(error)) from error


def _run_id(folder: Path) -> str:
    """What W&B knows the run by, the same when it is resumed."""
    path = folder / "wandb-id"
    known = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if not known:
        known = secrets.token_hex(8)
        write_text(path, known)
    return known
