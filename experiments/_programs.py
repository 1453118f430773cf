"""The compiled programs of a run: draw, score under the base, update. Each is compiled once."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fjax
from fjax.models import PretrainedModel

from ._run_folder import RunError
from ._settings import BUILT_IN, Settings, make_divergence, make_optimizer


class Batch(NamedTuple):
    """Samples and what the device knows about them. ``log_a`` may still be on its way."""

    samples: fjax.Samples
    tokens: jax.Array
    where: jax.Array
    log_a: jax.Array


class Programs(NamedTuple):
    """
    draw: (policy params, key) -> Batch of ``samples`` rows.
    tuner: init and (compiled, donating) update.
    decode: Batch -> texts.
    """

    draw: Callable[[fjax.models.gpt2.Params, jax.Array], Batch]
    tuner: fjax.Tuner
    decode: Callable[[Batch], list[str]]


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
    eos_id, rows = model.eos_id, settings.samples
    log_prob_fn = fjax.make_log_prob_fn(model.logits_fn)

    @jax.jit
    def draw(params, rng_key):
        prompt = jnp.full((rows, 1), eos_id, jnp.int32)
        cache = model.init_cache(rows, 1 + settings.max_new_tokens)
        samples = fjax.sample(
            model.decode_fn, params, rng_key, prompt, cache, max_new_tokens=settings.max_new_tokens, eos_id=eos_id
        )
        return samples, *fjax.log_probs.pack(prompt, samples.tokens, where=samples.where)

    score = jax.jit(log_prob_fn)

    def draw_and_score(params, rng_key):
        samples, tokens, where = draw(params, rng_key)
        return Batch(samples, tokens, where, score(model.params, tokens, where))

    tuner = fjax.fdpg(
        log_prob_fn,
        make_optimizer(settings),
        divergence=make_divergence(settings),
        clip=settings.clip,
        microbatch_size=settings.microbatch_size,
    )
    tuner = fjax.Tuner(tuner.init, jax.jit(tuner.update, donate_argnums=0))
    return Programs(draw_and_score, tuner, lambda batch: decode(model, batch.samples))


def decode(model: PretrainedModel, samples: fjax.Samples) -> list[str]:
    """The texts of samples, without the end-of-sequence token."""
    tokens, where = np.asarray(samples.tokens), np.asarray(samples.where)
    rows = [row[keep].tolist() for row, keep in zip(tokens, where, strict=True)]
    return model.tokenizer.batch_decode(rows, skip_special_tokens=True)


def export(folder: Path, params: fjax.models.gpt2.Params, model: PretrainedModel) -> None:
    """The aligned model as a Hugging Face folder."""
    fjax.save_pretrained(folder, params, model.config, model.tokenizer)
