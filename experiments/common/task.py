"""What a task is: a configuration, a target, and what it is called."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fjax.evaluation import TextTarget
from fjax.models import LanguageModel
from fjax.rollouts import Collector, Contexts
from fjax.runs import Display, Stepper
from fjax.types import Params

from .settings import Settings


class Trained(NamedTuple):
    """What a run trains: the policy's parameters, or adapters of them.

    initial: what it begins with.
    policy_of: (what is trained) -> parameters of the policy, to sample, score and save.
    in_training: the same for its gradient, where adapters are not added up.
    """

    initial: Params
    policy_of: Callable[[Params], Params] = lambda params: params
    in_training: Callable[[Params], Params] = lambda params: params


class Built(NamedTuple):
    """What there is to make a target with, before the first step.

    settings: those that all tasks share.
    model: the base model.
    collector: how to draw.
    rng_key: for samples that a target is fitted to.
    display: where it is shown.
    trained: what the run trains.
    """

    settings: Settings
    model: LanguageModel
    collector: Collector
    rng_key: jax.Array
    display: Display
    trained: Trained


class Task(NamedTuple):
    """An experiment, of which `experiments.tasks` lists all.

    name: of its folder, and of its command.
    config: what can be set, with the settings that all share in ``settings``.
    title: (config) -> what a run of it is called.
    make_target: (config) -> how to make the target once the model is loaded; whatever is wrong with
        the configuration is said by the first call, which takes no time.
    headlines: figures that it is about, first in tables and curves; none where the user names them,
        and each run's config.json has them.
    make_contexts: (config, model) -> the prompts of a conditional target; None for one without.
    make_stepper: (config, built) -> how to move, if not by samples of the policy.
    """

    name: str
    config: type
    title: Callable[[Any], str]
    make_target: Callable[[Any], Callable[[Built], TextTarget]]
    headlines: tuple[str, ...]
    make_contexts: Callable[[Any, LanguageModel], Contexts | None] | None = None
    make_stepper: Callable[[Any, Built], Stepper] | None = None
