"""The task: prompts, a predicate on (prompt, continuation), and the target of each prompt."""

from collections.abc import Callable, Sequence

import numpy as np

from fjax.evaluation import Features, TextTarget
from fjax.models import LanguageModel
from fjax.rollouts import Contexts
from fjax.runs import RunError

from ..common import contexts
from ..common.functions import call, load_function, shown, taken_by
from ..common.prompt_files import Prompt, choose_columns
from ..common.task import Task
from . import predicates
from .config import Config

Predicate = Callable[[Prompt, str], bool]

BUILT_IN = {"turns": predicates.turns, "repeats": predicates.repeats}


def make_contexts(config: Config, model: LanguageModel) -> Contexts:
    """The prompts to align on and to evaluate on; what was left out of a file is said."""
    return contexts.make_contexts(config, config.settings, model)


def make_predicate(config: Config, prompts: Sequence[Prompt]) -> Predicate:
    """A built-in predicate, or the user's, which is tried on the first prompt.

    Raises:
        RunError: if it cannot be loaded, asks for a column that is not there, or does not answer.
    """
    built_in = BUILT_IN.get(config.predicate)
    if built_in is not None:
        return lambda prompt, text: built_in(prompt.text, text)
    function = load_function(config.predicate, "--predicate")
    taken, title = taken_by(function), config.predicate
    names = choose_columns(taken, prompts, title, but=taken.leading[:2])
    asked = checked(function, title)

    def predicate(prompt: Prompt, text: str) -> bool:
        return asked(prompt.given, text, **{name: prompt.columns.get(name) for name in names})

    # whatever is wrong with it is said before minutes are spent
    predicate(prompts[0], " and a continuation")
    return predicate


def checked(function: Callable, title: str) -> Callable[..., bool]:
    """The user's function, whose answer is True or False, or an error that says what it was
    instead."""

    def predicate(prompt: object, continuation: str, **columns: object) -> bool:
        on = f"the prompt {prompt!r:.100} and the continuation {continuation!r:.200}"
        answer = call(function, title, on, prompt, continuation, **columns)
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
    predicate = make_predicate(config, contexts.read_all(config))

    def features(prompts: Sequence[Prompt], texts: Sequence[str]) -> Features:
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
