"""The step as fjax takes it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fjax
from fjax._trees import count_numbers
from fjax.adapters import adapt
from fjax.estimators import known_log_z
from fjax.models import LanguageModel
from fjax.runs.memory import keep_freed_memory
from fjax.sharding import jit_update
from fjax.training import Rollout
from fjax.types import Params

from ...common.build import make_trained
from ...common.settings import Settings
from ...common.task import Trained
from .work import BETAS, LEARNING_RATE, MAX_GRAD_NORM, Side, Work


def make(work: Work, *, lora_merge: bool | None = None) -> Side:
    """All parameters are trained; or adapters, added up to draw and to score, or never."""
    keep_freed_memory()  # as every command does, before JAX computes anything
    model = fjax.from_pretrained(work.model)
    trained = _trained(work, model.params, lora_merge)
    log_prob_fn = fjax.make_log_prob_fn(adapt(model.logits_fn, trained.in_training), start=1)
    optimizer = optax.chain(
        optax.clip_by_global_norm(MAX_GRAD_NORM),
        optax.adam(LEARNING_RATE, b1=BETAS[0], b2=BETAS[1]),
    )
    tuner = fjax.fdpg(
        log_prob_fn,
        optimizer,
        divergence=fjax.jensen_shannon(),
        baseline=0.0,
        log_z=known_log_z(),
    )
    step = jit_update(tuner.update)
    # a copy, since an update takes the arrays of its state for its own
    held = [tuner.init(jax.tree.map(jnp.copy, trained.initial))]
    draw_rows = jax.jit(partial(_draw, model, work))
    score_rows = jax.jit(fjax.make_log_prob_fn(model.logits_fn, start=1))
    where = np.arange(1 + work.new_tokens)[None, :].repeat(work.samples, 0) > 0

    def draw() -> np.ndarray:
        return np.asarray(draw_rows(trained.policy_of(held[0].params), jax.random.key(0)))

    def score(tokens: np.ndarray) -> np.ndarray:
        both = (model.params, trained.policy_of(held[0].params))
        return np.stack([score_rows(params, tokens, where) for params in both])

    def update(tokens: np.ndarray, log_score: np.ndarray, log_q: np.ndarray) -> float:
        rollout = Rollout(*map(jnp.asarray, (tokens, where, log_q, log_score)))
        held[0], info = step(held[0], rollout)
        return float(jax.block_until_ready((held[0], info))[1].loss)

    def numbers() -> tuple[int, int]:
        return count_numbers(trained.initial), count_numbers(model.params)

    return Side(draw, score, update, numbers)


def _trained(work: Work, params: Params, lora_merge: bool | None) -> Trained:
    if lora_merge is None:
        return Trained(params)
    settings = Settings(lora_rank=work.lora_rank, trainable=work.trainable, lora_merge=lora_merge)
    return make_trained(settings, params)


def _draw(model: LanguageModel, work: Work, params: Params, rng_key: jax.Array) -> jax.Array:
    """No row ends, so that all sides draw the same number of tokens."""
    ends = jnp.array(model.eos_ids)
    start = model.eos_id if model.bos_id is None else model.bos_id
    prompt = jnp.full((work.samples, 1), start, jnp.int32)
    drawn = fjax.sample(
        model.decode_fn,
        params,
        rng_key,
        prompt,
        model.init_cache(work.samples, 1 + work.new_tokens),
        max_new_tokens=work.new_tokens,
        eos_id=model.eos_ids,
        transform=lambda logits: logits.at[..., ends].set(-jnp.inf),
    )
    return jnp.concatenate([prompt, drawn.tokens], axis=1)
