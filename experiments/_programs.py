"""The compiled programs of a run: draw, score under the base, update. Each is compiled once."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fjax
from fjax._typing import LogProbFn, Params
from fjax.estimators import log_mixture
from fjax.models import PretrainedModel

from ._run_folder import RunError
from ._settings import BUILT_IN, Settings, make_divergence, make_optimizer

AnyArray = Any
"""A `jax.Array`, perhaps still on its way, or an `np.ndarray` on the host."""


class Batch(NamedTuple):
    """Samples of the policy, then some of the base model, and what both say of each; on the device or the host."""

    tokens: AnyArray
    where: AnyArray
    finished: AnyArray
    log_pi: AnyArray
    log_a: AnyArray
    log_q: AnyArray
    from_policy: int


class Programs(NamedTuple):
    """What the loop calls.

    draw: (policy's params, key) -> Batch of ``samples`` rows, of which ``base_samples`` are of the base model.
    score: (params, tokens, where) -> log-probability of each row.
    tuner: init, and update compiled and donating its state.
    decode: Batch -> texts.
    """

    draw: Callable[[Params, jax.Array], Batch]
    score: LogProbFn
    tuner: fjax.Tuner
    decode: Callable[[Batch], list[str]]


def hardware() -> str:
    """What this runs on, in words."""
    device = jax.devices()[0]
    return f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else f"{jax.device_count()} × {device.device_kind}"


def load_model(settings: Settings) -> PretrainedModel:
    """The built-in model, a folder's, or a hub's.

    Raises:
        RunError: if it cannot be had, or has fewer positions than are asked for.
    """
    name = BUILT_IN if settings.model == "built-in" else settings.model
    try:
        model = fjax.from_pretrained(name, dtype=jnp.dtype(settings.dtype))
    except (OSError, ValueError) as error:
        raise RunError(f"Cannot load --model {settings.model}: {error}") from error
    needed = 1 + settings.max_new_tokens
    if needed > model.config.n_positions:
        raise RunError(
            f"The model has {model.config.n_positions} positions, but the start token and --max-new-tokens "
            f"{settings.max_new_tokens} need {needed}. Ask for at most {model.config.n_positions - 1} new tokens."
        )
    return model


def make_programs(settings: Settings, model: PretrainedModel) -> Programs:
    """Unconditional generation: the prompt is the model's end-of-sequence token, as it stands between texts."""
    log_prob_fn = fjax.make_log_prob_fn(model.logits_fn)
    score = jax.jit(log_prob_fn)
    draw_rows = _make_draw(settings, model)
    from_base = settings.base_samples
    from_policy = settings.samples - from_base
    # By the counts, not by the fraction asked for: what was drawn is what log q has to be of.
    mix = jax.jit(partial(log_mixture, base_fraction=from_base / settings.samples))

    def draw(params, rng_key):
        samples, tokens, where = draw_rows(params, rng_key, from_policy)
        log_pi, log_a = samples.sequence_log_probs, score(model.params, tokens, where)
        if from_base == 0:
            return Batch(tokens, where, samples.finished, log_pi, log_a, log_pi, from_policy)
        # Row ids go on counting, so that no row of the base shares its key with one of the policy.
        more, more_tokens, more_where = draw_rows(model.params, rng_key, from_base, from_policy)
        log_pi = jnp.concatenate([log_pi, score(params, more_tokens, more_where)])
        log_a = jnp.concatenate([log_a, more.sequence_log_probs])
        return Batch(
            jnp.concatenate([tokens, more_tokens]),
            jnp.concatenate([where, more_where]),
            jnp.concatenate([samples.finished, more.finished]),
            log_pi,
            log_a,
            mix(log_pi, log_a),
            from_policy,
        )

    tuner = fjax.fdpg(
        log_prob_fn,
        make_optimizer(settings),
        divergence=make_divergence(settings),
        clip=settings.clip,
        microbatch_size=settings.microbatch_size,
    )
    tuner = fjax.Tuner(tuner.init, jax.jit(tuner.update, donate_argnums=0))
    return Programs(draw, score, tuner, lambda batch: decode(model, batch.tokens, batch.where))


def _make_draw(settings: Settings, model: PretrainedModel) -> Callable:
    eos_id = model.eos_id

    @partial(jax.jit, static_argnames=("rows", "first_row"))
    def draw_rows(params, rng_key, rows, first_row=0):
        prompt = jnp.full((rows, 1), eos_id, jnp.int32)
        samples = fjax.sample(
            model.decode_fn,
            params,
            rng_key,
            prompt,
            model.init_cache(rows, 1 + settings.max_new_tokens),
            max_new_tokens=settings.max_new_tokens,
            eos_id=eos_id,
            row_ids=first_row + jnp.arange(rows),
        )
        return samples, *fjax.log_probs.pack(prompt, samples.tokens, where=samples.where)

    return draw_rows


def decode(model: PretrainedModel, tokens: AnyArray, where: AnyArray) -> list[str]:
    """The texts of the tokens that count, without the end-of-sequence token."""
    rows = [row[keep].tolist() for row, keep in zip(np.asarray(tokens), np.asarray(where), strict=True)]
    return model.tokenizer.batch_decode(rows, skip_special_tokens=True)


def export(folder: Path, params: Params, model: PretrainedModel) -> None:
    """The aligned model as a Hugging Face folder."""
    fjax.save_pretrained(folder, params, model.config, model.tokenizer)
