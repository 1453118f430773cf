"""An Equinox model without a cache, moved by f-DPG to sentences with a given token.

python docs/examples/equinox_model.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import fjax

VOCABULARY, END, WORD, LENGTH, SAMPLES = 16, 0, 7, 8, 128


class Model(eqx.Module):
    """One causal layer of attention over a single sequence."""

    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCABULARY, 32, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(2, 32, key=keys[1])
        self.head = eqx.nn.Linear(32, VOCABULARY, key=keys[2])

    def __call__(self, tokens):
        """Logits at every column."""
        x = jax.vmap(self.embed)(tokens)
        causal = jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))
        return jax.vmap(self.head)(x + self.attention(x, x, x, mask=causal))


model = Model(jax.random.key(0))
rare = model.head.bias.at[WORD].set(-2.0)
model = eqx.tree_at(lambda model: model.head.bias, model, rare)
# `params` is the arrays of floats; all else stays in the functions.
base, rest = eqx.partition(model, eqx.is_inexact_array)


def logits_fn(params, tokens, where=None, *, start=0):
    """Logits of the next token at every column from ``start`` on. The module takes one sequence."""
    return jax.vmap(eqx.combine(params, rest))(tokens)[:, start:]


def decode_fn(params, tokens, cache, where=None):
    """Logits after the last column, and what was said so far, which is read anew each time.

    Behind it stand zeros, which a causal model does not see.
    """
    said, length = cache
    said = jax.lax.dynamic_update_slice(said, tokens, (0, length))
    length = length + tokens.shape[1]
    return logits_fn(params, said)[:, length - 1], (said, length)


prompt = jnp.full((SAMPLES, 1), END)  # a model that starts from nothing is prompted with its end
empty = jnp.zeros((SAMPLES, 1 + LENGTH), int), jnp.int32(0)
log_prob_fn = fjax.make_log_prob_fn(logits_fn)
tuner = fjax.fdpg(log_prob_fn, optax.adam(0.01), divergence=fjax.jensen_shannon())


@jax.jit
def draw(params, rng_key):
    """Samples of the policy, as rows of prompt and continuation."""
    samples = fjax.sample(
        decode_fn, params, rng_key, prompt, empty, max_new_tokens=LENGTH, eos_id=END
    )
    return samples, *fjax.log_probs.pack(prompt, samples.tokens, where=samples.where)


def has_word(tokens, where):
    """b(x): whether the token is in the continuation."""
    return ((tokens == WORD) & where).any(1)


@jax.jit
def step(state, rng_key):
    """One update on fresh samples, towards p(x) ∝ a(x)·b(x)."""
    samples, tokens, where = draw(state.params, jax.random.fold_in(rng_key, state.step))
    log_score = fjax.pointwise(log_prob_fn(base, tokens, where), has_word(tokens, where))
    rollout = fjax.Rollout(tokens, where, samples.sequence_log_probs, log_score)
    return tuner.update(state, rollout)


def share(params):
    """How many of the samples have the word."""
    _, tokens, where = draw(params, jax.random.key(1))
    return float(has_word(tokens, where).mean())


state = tuner.init(base)
for _ in range(60):
    state, info = step(state, jax.random.key(2))
before, after = share(base), share(state.params)
print(
    f"with the word: {before:.2f} before, {after:.2f} after; JS {float(info.divergence.value):.2f}"
)
model = eqx.combine(state.params, rest)  # the trained model, a module again
