"""Which target is meant: that of a run's folder, of a task with its options, or of a word."""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fjax.evaluation import TextTarget
from fjax.models import LanguageModel
from fjax.rollouts import Collector, Contexts, Prompts
from fjax.runs import Display, RunError
from fjax.runs.folder import MODEL, read_config

from ..common.arguments import parse
from ..common.build import make_built, make_collector
from ..common.contexts import PromptOptions, load_file
from ..common.settings import Settings
from ..common.task import Built, Task
from ..lexical_constraint.config import Config as Lexical
from ..tasks import TASKS

BASE_FRACTION = 0.25
"""Of what is drawn, for Z alone: samples of the aligned model show too small a one, where it does
not cover the target."""


class Wanted(NamedTuple):
    """A task, its configuration, the base model's settings among it, and the aligned model."""

    task: Task
    config: Any
    model: str

    @property
    def settings(self) -> Settings:
        """Of the task, on one device and without anything that is about training."""
        return self.config.settings

    def instead(self, model: str | None, base: str | None, max_new_tokens: int | None) -> "Wanted":
        """With other models or lengths, where they are given."""
        given = {"model": base, "max_new_tokens": max_new_tokens}
        others = {name: value for name, value in given.items() if value is not None}
        settings = dataclasses.replace(self.settings, **others)
        config = dataclasses.replace(self.config, settings=settings)
        return self._replace(config=config, model=model or self.model)


def of_run(folder: Path) -> Wanted:
    """What a run was after, by the command in its config.json.

    Raises:
        RunError: if it is no run's folder, or its command is none of these tasks'.
    """
    words = shlex.split(str(read_config(folder, "command")["command"]))
    tasks = {task.name: task for task in TASKS}
    for i, word in enumerate(words):
        task = tasks.get(word.rpartition(".")[-1])
        if task is not None:
            return _parsed(folder, task, words[i + 1 :])
    raise RunError(
        f"{folder} is a run of {shlex.join(words[:3])} …, which is none of the tasks "
        f"{', '.join(tasks)}. Name the task and its options behind those of generate."
    )


def _parsed(folder: Path, task: Task, arguments: list[str]) -> Wanted:
    try:
        config = parse(task.config, f"{task.name} (the command of {folder})", arguments)
    except (SystemExit, ValueError) as error:
        raise RunError(
            f"The command in {folder}/config.json is none that this version of fjax reads: "
            f"{task.name} {shlex.join(arguments)}."
        ) from error
    return of_task(config)._replace(model=str(folder / MODEL))


def of_task(config: Any) -> Wanted:
    """A task by its configuration."""
    (task,) = (task for task in TASKS if isinstance(config, task.config))
    settings: Settings = config.settings
    alone = {"mesh": "", "distributed": False, "run_folder": None, "resume": False}
    alone |= {"coordinator": None, "processes": None, "process": None, "resume_from": None}
    alone |= {"lora_rank": None, "lora_alpha": None, "dry_run": False}
    return Wanted(
        task, dataclasses.replace(config, settings=dataclasses.replace(settings, **alone)), ""
    )


def of_word(word: str) -> Wanted:
    """That of lexical_constraint, for the built-in model."""
    return of_task(Lexical(word=word))


def make_wanted(
    wanted: Wanted,
    make_target: Callable[[Built], TextTarget],
    base: LanguageModel,
    prompts: Path | None,
) -> tuple[TextTarget, Contexts | None]:
    """The target, and the prompts to continue as those to evaluate on. What a target is fitted to
    is drawn as in the run, so that it is the same.

    Raises:
        RunError: if there are prompts for a task that has none.
    """
    make_contexts = wanted.task.make_contexts
    contexts = None if make_contexts is None else make_contexts(wanted.config, base)
    target = make_target(make_built(wanted.settings, base, contexts, Display()))
    if prompts is None:
        return target, contexts
    if contexts is None or not isinstance(wanted.config, PromptOptions):
        raise RunError(
            f"--prompts are for a target of prompts, and this one of {wanted.task.name} has none."
        )
    return target, contexts._replace(unseen=load_file(wanted.config, prompts, base.tokenizer))


def proposing(
    wanted: Wanted, base: LanguageModel, contexts: Contexts | None, batch_size: int, most: int
) -> Collector:
    """How to draw proposals, a share of them from the base model; of one prompt at a time, of the
    first ``most`` of those to evaluate on."""
    settings = Settings(
        model=wanted.settings.model,
        samples=max(batch_size, 2),
        base_fraction=BASE_FRACTION,
        max_new_tokens=wanted.settings.max_new_tokens,
    )
    if contexts is None:
        return make_collector(settings, base)
    texts, tokens, where, references, given = contexts.unseen
    given = None if given is None else given[:most]
    some = Prompts(texts[:most], tokens[:most], where[:most], references[:most], given)
    return make_collector(settings, base, Contexts(some, some, 1))
