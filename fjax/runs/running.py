"""A run under way: what stays the same from its first step to its last."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from fjax.divergences import FDivergence
from fjax.evaluation import Base, Exact, Metric, TextTarget
from fjax.rollouts import Collector
from fjax.runs.aim import Aim
from fjax.runs.card import FrontMatter
from fjax.runs.display import Display
from fjax.runs.endings import Stop
from fjax.runs.folder import OpenRun
from fjax.runs.resume import Schedule
from fjax.runs.steps import Stepper
from fjax.training import Checkpoints, FanOut
from fjax.types import Params, PRNGKeyArray

EVALUATION_KEY, TARGET_KEY, ADAPTERS_KEY = 2**31 - 1, 2**31 - 2, 2**31 - 3
"""Folded into the run's key, as no step's number is: for evaluations, a target's fit, adapters."""

NO_STEP = 2**31 - 1
"""In place of its number, for samples of the base model that no step's evaluation shares."""


@runtime_checkable
class Model(Protocol):
    """What a run needs of the base model; a `fjax.models.LanguageModel` is one."""

    @property
    def params(self) -> Params:
        """Of the base model."""

    @property
    def save(self) -> Callable[..., None] | None:
        """(folder, params) -> writes a model to a folder that can be loaded again.

        None if nothing is to be exported.
        """


class Kept:
    """What evaluations leave for later ones: samples of the base model, records by step."""

    base: Base | None = None

    def __init__(self):
        self.records: dict[int, dict] = {}


class Run(NamedTuple):
    """What stays the same throughout a run."""

    opened: OpenRun
    title: str
    model: Model
    initial: Params
    policy_of: Callable[[Params], Params]
    save_trained: Callable[[Path, Params], None] | None
    target: TextTarget
    collector: Collector
    stepper: Stepper
    schedule: Schedule
    divergences: Mapping[str, FDivergence]
    aim: Aim
    metrics: Mapping[str, Metric] | None
    exact: Exact | None
    rng_key: PRNGKeyArray
    checkpoints: Checkpoints
    logger: FanOut
    display: Display
    kept: Kept
    stop: Stop
    stop_if_unsaved: bool
    base_card: FrontMatter | None

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.opened.path
