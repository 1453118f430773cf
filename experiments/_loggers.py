"""Where a run's figures go: metrics.jsonl always, TensorBoard and W&B where they are asked for."""

import importlib.util
import secrets
from contextlib import ExitStack
from pathlib import Path

from fjax.training import FanOut, JsonlLogger, Logger, TensorBoardLogger, WandbLogger

from ._run_folder import RunError, write_text
from ._settings import Settings


def check_loggers(settings: Settings) -> None:
    """Whether what is asked for is installed, before anything else is done.

    Raises:
        RunError: if it is not.
    """
    asked = {
        "tensorboardX": ("tensorboard", settings.tensorboard),
        "wandb": ("wandb-project", settings.wandb_project),
    }
    for package, (flag, wanted) in asked.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise RunError(
                f"--{flag} needs {package}, which is not installed: pip install {package}, or "
                f"leave --{flag} out."
            )


def open_loggers(
    settings: Settings, config: dict, folder: Path, title: str, *, after_step: int
) -> FanOut:
    """All of them as one, to be closed; a resumed run goes on in what is there.

    Raises:
        RunError: if W&B cannot be reached.
    """
    with ExitStack() as opened:
        loggers: list[Logger] = [
            opened.enter_context(JsonlLogger(folder / "metrics.jsonl", after_step=after_step))
        ]
        if settings.tensorboard:
            since = after_step if after_step > 0 else None
            loggers.append(
                opened.enter_context(TensorBoardLogger(folder / "tensorboard", after_step=since))
            )
        if settings.wandb_project:
            try:
                wandb = WandbLogger(
                    settings.wandb_project,
                    folder,
                    run_id=_run_id(folder),
                    name=title,
                    config=config,
                    mode=settings.wandb_mode,
                )
            except RuntimeError as error:
                raise RunError(str(error)) from error
            loggers.append(opened.enter_context(wandb))
        opened.pop_all()  # from here on they are closed by whoever has them
        return FanOut(loggers)


def _run_id(folder: Path) -> str:
    """What W&B knows the run by, the same when it is resumed."""
    path = folder / "wandb-id"
    known = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if not known:
        known = secrets.token_hex(8)
        write_text(path, known)
    return known
