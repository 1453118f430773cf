"""The task: steps on the pairs of a file, and how the model fares against the base on other
prompts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.markup import escape

import fjax
from fjax import preferences
from fjax.adapters import adapt
from fjax.divergences import by_name
from fjax.evaluation import Features, TextTarget
from fjax.hosts import say
from fjax.models import LanguageModel
from fjax.rollouts import Contexts
from fjax.runs import Progress, RunError, Stepper
from fjax.runs.steps import as_record
from fjax.sharding import jit_update
from fjax.targets import reward_tilted
from fjax.training import preference_tuner

from ..common.build import check_positions, longest, make_optimizer
from ..common.prompt_files import read_prompt_file
from ..common.prompts import openings, read_prompts
from ..common.rewards import make_answer_reward
from ..common.task import Built, Task
from .config import Config
from .data import batch_at, read_pairs, to_batch


def make_loss(config: Config) -> Callable:
    """What ``--loss`` stands for."""
    losses = {
        "dpo": preferences.dpo,
        "f_dpo": partial(preferences.f_dpo, divergence=by_name(config.f)),
        "chi_po": preferences.chi_po,
        "ipo": preferences.ipo,
        "exo": preferences.exo_pair,
    }
    return partial(losses[config.loss], beta=config.beta)


def make_stepper(config: Config, built: Built) -> Stepper:
    """Steps on pairs; each is a function of the seed and its number alone."""
    settings, model = built.settings, built.model
    pairs, reports = read_pairs(config.pairs, skip_bad=config.skip_bad_lines)
    to_evaluate = built.collector.contexts.unseen.texts if built.collector.contexts else []
    unseen = set(to_evaluate) & {pair.shown.strip() for pair in pairs}
    if unseen:
        raise RunError(
            f"{len(unseen)} prompts to evaluate on are in {config.pairs} too, {min(unseen)!r} "
            f"first. Give others with "
            "--unseen-prompts."
        )
    score = partial(jax.jit(fjax.make_log_prob_fn(model.logits_fn)), model.params)
    batch, more = to_batch(
        pairs, model.tokenizer, score, max_tokens=longest(model), ends=model.eos_ids
    )
    for report in [*reports, *more]:
        built.display.warn(report)
    epoch = len(batch.chosen_tokens) // config.pairs_per_step
    built.display.say(
        escape(f"{len(batch.chosen_tokens)} pairs of {config.pairs}: an epoch has {epoch} steps.")
    )
    # too few pairs are said at once
    batch_at(batch, 0, batch_size=config.pairs_per_step, seed=settings.seed)
    log_prob_fn = fjax.make_log_prob_fn(adapt(model.logits_fn, built.trained.in_training))
    tuner = preference_tuner(
        log_prob_fn,
        make_optimizer(settings, built.trained.initial),
        loss=make_loss(config),
        microbatch_size=settings.microbatch_size,
    )
    update = jit_update(tuner.update)

    def step(progress: Progress, number: int) -> tuple[Progress, dict]:
        state, info = update(
            progress.state,
            batch_at(batch, number, batch_size=config.pairs_per_step, seed=settings.seed),
        )
        return Progress(state), as_record(info) | {"epoch": (number + 1) / epoch}

    def begin(params) -> Progress:
        return Progress(tuner.init(params))

    return Stepper(begin, lambda progress: None, step, config.pairs_per_step, unit="pair")


def make_contexts(config: Config, model: LanguageModel) -> Contexts:
    """The prompts to evaluate on; those to align on are in the pairs."""
    if config.unseen_prompts is None:
        _, unseen = openings(model.tokenizer)
    else:
        unseen, reports = read_prompts(
            config.unseen_prompts, model.tokenizer, max_tokens=longest(model)
        )
        for report in reports:
            say(report)
    check_positions(config.settings, model, unseen.tokens.shape[1])
    return Contexts(unseen, unseen, config.prompts_per_batch)


def make_target(config: Config) -> TextTarget:
    """P_c(x) = a(x|c)·exp(r(c, x)/β), and the win rate by that reward."""
    path = config.unseen_prompts
    asked = [] if path is None else read_prompt_file(path)[0]
    reward = make_answer_reward(config.reward, config.reward_folder, config.corpora, asked)

    def features(prompts: Sequence[Any], texts: Sequence[str]) -> Features:
        values = reward(prompts, texts)
        return {"reward": values, "positive": (values > 0).astype(np.float32)}

    def log_score(log_a: np.ndarray, features: Features) -> np.ndarray:
        return np.asarray(
            reward_tilted(
                jnp.asarray(log_a), jnp.asarray(features["reward"]), beta=config.reward_beta
            )
        )

    description = f"p(x|c) ∝ a(x|c)·exp(r(c, x)/{config.reward_beta:g}), r = {config.reward}"
    return TextTarget(
        features, log_score, headline="reward", wins="reward", description=description
    )


def prepare(config: Config):
    """The target, which needs nothing of the run."""
    target = make_target(config)
    return lambda built: target


def title(config: Config) -> str:
    """Loss and β."""
    loss = f"{config.loss}-{config.f}" if config.loss == "f_dpo" else config.loss
    return f"{loss}-beta-{config.beta:g}"


TASK = Task("preference_pairs", Config, title, prepare, ("win_rate",), make_contexts, make_stepper)
