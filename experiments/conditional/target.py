"""The task: prompts, a predicate on (prompt, continuation), and the target of each prompt."""

from collections.abc import Callable, Sequence

import numpy as np

from fjax.evaluation import Features, TextTarget
from fjax.models import LanguageModel
from fjax.rollouts import Contexts, Prompts
from fjax.runs import RunError

from ..common.build import check_positions
from ..common.functions import call, load_function, shown
from ..common.prompts import openings, read_prompts
from ..common.task import Task
from . import predicates
from .config import Config

Predicate = Callable[[str, str], bool]


def make_contexts(config: Config, model: LanguageModel) -> Contexts:
    """The prompts to align on and to evaluate on; what was left out of a file is said."""
    training, unseen = _prompts(config, model)
    longest = max(prompts.tokens.shape[1] for prompts in (training, unseen))
    check_positions(config.settings, model, longest)
    global_z = config.normalizer == "global"
    return Contexts(
        training, unseen, config.prompts_per_step, global_z=global_z, z_samples=config.z_samples
    )


def _prompts(config: Config, model: LanguageModel) -> tuple[Prompts, Prompts]:
    if config.prompts is None:
        return openings(model.tokenizer)
    training, reports = read_prompts(
        config.prompts, model.tokenizer, max_tokens=config.max_prompt_tokens
    )
    if config.unseen_prompts is None:
        kept = np.arange(len(training.texts)) % 4 == 3
        training, unseen = _some(training, ~kept), _some(training, kept)
    else:
        unseen, more = read_prompts(
            config.unseen_prompts, model.tokenizer, max_tokens=config.max_prompt_tokens
        )
        reports += more
    for report in reports:
        print(report)
    known = sorted(set(training.texts) & set(unseen.texts))
    if known:
        raise RunError(
            f"{len(known)} prompts are in both files, {known[0]!r} first. Unseen prompts must not "
            f"be aligned on."
        )
    return training, unseen


def _some(prompts: Prompts, rows: np.ndarray) -> Prompts:
    texts, references = (
        [part[i] for i in np.flatnonzero(rows)] for part in (prompts.texts, prompts.references)
    )
    return Prompts(texts, prompts.tokens[rows], prompts.where[rows], references)


def load_predicate(config: Config) -> Predicate:
    """A built-in predicate, or the user's."""
    built_in = {"turns": predicates.turns, "repeats": predicates.repeats}
    if config.predicate in built_in:
        return built_in[config.predicate]
    return checked(load_function(config.predicate, "--predicate"), config.predicate)


def checked(function: Callable, title: str) -> Predicate:
    """The user's function, whose answer is True or False, or an error that says what it was
    instead."""

    def predicate(prompt: str, continuation: str) -> bool:
        on = f"the prompt {prompt!r:.100} and the continuation {continuation!r:.200}"
        answer = call(function, title, on, prompt, continuation)
        if not _is_one_truth(answer):
            raise RunError(f"{title} must answer True or False: it gave {shown(answer)} for {on}.")
        return bool(answer)

    return predicate


def _is_one_truth(answer: object) -> bool:
    """Whether it is True, False, 0 or 1, be it Python's, NumPy's or JAX's."""
    try:
        given = np.asarray(answer)
        return given.shape == () and given.dtype.kind in "biuf" and bool(given in (0, 1))
    except Exception:  # of the user's type, which may fail in any way
        return False


def make_target(config: Config) -> TextTarget:
    """P_c(x) = a(x|c)·b(x, c)."""
    predicate = load_predicate(config)
    # whatever is wrong with it is said before minutes are spent
    predicate("a prompt", " and a continuation")

    def features(prompts: Sequence[str], texts: Sequence[str]) -> Features:
        return {
            "satisfaction": np.array(
                [predicate(c, x) for c, x in zip(prompts, texts, strict=True)], np.float32
            )
        }

    def log_score(log_a: np.ndarray, features: Features) -> np.ndarray:
        return np.where(features["satisfaction"] > 0, log_a, np.float32(-np.inf))

    return TextTarget(
        features,
        log_score,
        headline="satisfaction",
        bound="satisfaction",
        description=f"p(x|c) ∝ a(x|c)·[{config.predicate}(c, x)]",
    )


def prepare(config: Config):
    """The target, which needs nothing of the run."""
    target = make_target(config)
    return lambda built: target


def title(config: Config) -> str:
    """Predicate and objective."""
    name = config.predicate.replace(":", "-").replace(".", "-")
    global_z = ["global-z"] if config.normalizer == "global" else []
    return "-".join([name, config.settings.title, *global_z])


TASK = Task("conditional", Config, title, prepare, ("satisfaction",), make_contexts)
