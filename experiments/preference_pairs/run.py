"""The task: steps on the pairs of a file, and how the model fares against the base on other
prompts."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from rich.markup import escape

import fjax
from experiments._evaluate import Features, Target
from experiments._loop import Prepared, align
from experiments._programs import Contexts, check_positions
from experiments._prompts import openings, read_prompts
from experiments._run_folder import RunError
from experiments._settings import DIVERGENCES, make_optimizer
from experiments._steps import Progress, Stepper, as_record
from experiments.sentiment_reward.config import Config as RewardConfig
from experiments.sentiment_reward.run import make_reward
from fjax import preferences
from fjax.models import PretrainedModel
from fjax.targets import reward_tilted
from fjax.training import preference_tuner

from .config import Config
from .data import batch_at, read_pairs, to_batch


def make_loss(config: Config) -> Callable:
    """What ``--loss`` stands for."""
    losses = {
        "dpo": preferences.dpo,
        "f_dpo": partial(preferences.f_dpo, divergence=DIVERGENCES[config.f]()),
        "chi_po": preferences.chi_po,
        "ipo": preferences.ipo,
        "exo": preferences.exo_pair,
    }
    return partial(losses[config.loss], beta=config.beta)


def make_stepper(config: Config, prepared: Prepared) -> Stepper:
    """Steps on pairs; each is a function of the seed and its number alone."""
    settings, model = prepared.settings, prepared.model
    pairs, reports = read_pairs(config.pairs, skip_bad=config.skip_bad_lines)
    to_evaluate = prepared.programs.unseen.texts if prepared.programs.unseen else []
    unseen = set(to_evaluate) & {pair.prompt.strip() for pair in pairs}
    if unseen:
        raise RunError(
            f"{len(unseen)} prompts to evaluate on are in {config.pairs} too, {min(unseen)!r} "
            f"first. Give others with "
            "--unseen-prompts."
        )
    score = partial(jax.jit(fjax.make_log_prob_fn(model.logits_fn)), model.params)
    batch, more = to_batch(pairs, model.tokenizer, score, max_tokens=model.config.n_positions)
    for report in [*reports, *more]:
        prepared.display.warn(report)
    epoch = len(batch.chosen_tokens) // config.pairs_per_step
    prepared.display.say(
        escape(f"{len(batch.chosen_tokens)} pairs of {config.pairs}: an epoch has {epoch} steps.")
    )
    # too few pairs are said at once
    batch_at(batch, 0, batch_size=config.pairs_per_step, seed=settings.seed)
    log_prob_fn = fjax.make_log_prob_fn(model.logits_fn)
    tuner = preference_tuner(
        log_prob_fn,
        make_optimizer(settings, model.params),
        loss=make_loss(config),
        microbatch_size=settings.microbatch_size,
    )
    update = jax.jit(tuner.update, donate_argnums=0)

    def step(progress: Progress, number: int) -> tuple[Progress, dict]:
        state, info = update(
            progress.state,
            batch_at(batch, number, batch_size=config.pairs_per_step, seed=settings.seed),
        )
        return Progress(state), as_record(info) | {"epoch": (number + 1) / epoch}

    return Stepper(Progress, lambda progress: None, step, config.pairs_per_step)


def make_contexts(config: Config, model: PretrainedModel) -> Contexts:
    """The prompts to evaluate on; those to align on are in the pairs."""
    if config.unseen_prompts is None:
        _, unseen = openings(model.tokenizer)
    else:
        unseen, reports = read_prompts(
            config.unseen_prompts, model.tokenizer, max_tokens=model.config.n_positions
        )
        for report in reports:
            print(report)
    check_positions(config.settings, model, unseen.tokens.shape[1])
    return Contexts(unseen, unseen, config.prompts_per_batch)


def make_target(config: Config) -> Target:
    """P_c(x) = a(x|c)·exp(r(c, x)/β), and the win rate by that reward."""
    reward = make_reward(
        RewardConfig(
            reward=config.reward, reward_folder=config.reward_folder, corpora=config.corpora
        )
    )

    def features(prompts: Sequence[str], texts: Sequence[str]) -> Features:
        values = reward([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
        return {"reward": values, "positive": (values > 0).astype(np.float32)}

    def log_score(log_a: np.ndarray, features: Features) -> np.ndarray:
        return np.asarray(
            reward_tilted(
                jnp.asarray(log_a), jnp.asarray(features["reward"]), beta=config.reward_beta
            )
        )

    return Target(features, log_score, headline="reward", wins="reward")


def main(config: Config) -> int:
    """Runs it; the exit status is 0 for a whole run, 128 + signal for one that was stopped."""
    target = make_target(config)
    loss = f"{config.loss}-{config.f}" if config.loss == "f_dpo" else config.loss
    return align(
        config.settings,
        lambda _: target,
        config=config,
        experiment="preference_pairs",
        title=f"{loss}-beta-{config.beta:g}",
        make_contexts=lambda model: make_contexts(config, model),
        make_stepper=lambda prepared: make_stepper(config, prepared),
    )
