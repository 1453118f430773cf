"""The training step: mean cross-entropy of the next token, Muon for the matrices and AdamW for the
rest."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from fjax.models import gpt2

from .config import Config


class State(NamedTuple):
    """All that the next step needs; the data's position is ``step`` itself."""

    step: jax.Array
    params: gpt2.Params
    opt_state: optax.OptState


def optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
    """Muon on the blocks' kernels, AdamW on embeddings, biases and norms; warm-up and cosine to
    zero; clipped."""

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, total_steps)

    def matrices(params):
        def numbers(path, leaf):
            return MuonDimensionNumbers() if path[-1].key == "kernel" else None

        return jax.tree_util.tree_map_with_path(numbers, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(config.learning_rate),
            weight_decay=config.weight_decay,
            adam_learning_rate=schedule(config.adam_learning_rate),
            muon_weight_dimension_numbers=matrices,
        ),
    )


def token_losses(
    logits: jax.Array, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Nats of every predicted token and the mask of those that count, both ``[B, T-1]``; the last
    end counts."""
    targets = tokens[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets)
    return losses, jnp.arange(targets.shape[1])[None] < lengths[:, None] - 1


def make_step(
    model: gpt2.GPT2Config, tx: optax.GradientTransformation, rng_key: jax.Array
) -> Callable:
    """``(state, tokens, lengths) -> (state, nats a token)``; the state is donated."""
    forward = gpt2.logits_fn(model)
    drops = model.embd_pdrop or model.attn_pdrop or model.resid_pdrop

    def step(state: State, tokens: jax.Array, lengths: jax.Array) -> tuple[State, jax.Array]:
        dropout_key = jax.random.fold_in(rng_key, state.step) if drops else None

        def loss(params):
            # Beyond what every LogitsFn takes, GPT-2's has dropout.
            logits = forward(params, tokens, dropout_key=dropout_key)  # pyright: ignore[reportCallIssue]
            losses, counted = token_losses(logits, tokens, lengths)
            return jnp.mean(losses, where=counted)

        value, grads = jax.value_and_grad(loss)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state), value

    return jax.jit(step, donate_argnums=0)


def make_evaluate(model: gpt2.GPT2Config) -> Callable:
    """``(params, tokens, lengths) -> summed nats`` of one padded batch, without dropout."""
    forward = gpt2.logits_fn(model)

    @jax.jit
    def evaluate(params, tokens, lengths):
        losses, counted = token_losses(forward(params, tokens), tokens, lengths)
        return jnp.sum(losses, where=counted)

    return evaluate
