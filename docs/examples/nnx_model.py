"""A Flax NNX model, moved by f-DPG to sentences with a given token.

python docs/examples/nnx_model.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import fjax

VOCABULARY, END, WORD, LENGTH, SAMPLES = 16, 0, 7, 8, 128


class Model(nnx.Module):
    """A recurrent language model: the state of its cell is all that it knows of the past."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, 32, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(32, 32, rngs=rngs), return_carry=True, rngs=rngs)
        self.head = nnx.Linear(32, VOCABULARY, rngs=rngs)

    def __call__(self, tokens, carry):
        """Logits at every column, and the state behind the last."""
        carry, outputs = self.rnn(self.embed(tokens), initial_carry=carry)
        return self.head(outputs), carry


model = Model(nnx.Rngs(0))
model.head.bias[...] = model.head.bias[...].at[WORD].set(-2.0)  # the word is rare
# `params` is what is trained; all else, random states among it, stays in the functions.
graph, base, rest = nnx.split(model, nnx.Param, ...)


def model_of(params):
    """The module with these parameters.

    With a copy of its variables: within the sampler's loop those of the graph would be of another
    trace, which NNX refuses.
    """
    return nnx.merge(graph, params, rest, copy=True)


def empty(rows):
    """The state before the first token."""
    return jnp.zeros((rows, 32))


def logits_fn(params, tokens, where=None, *, start=0):
    """Logits of the next token at every column from ``start`` on."""
    logits, _ = model_of(params)(tokens, empty(len(tokens)))
    return logits[:, start:]


def decode_fn(params, tokens, cache, where=None):
    """Logits after the last column, and the cache with these tokens in it: the cell's state."""
    logits, cache = model_of(params)(tokens, cache)
    return logits[:, -1], cache


prompt = jnp.full((SAMPLES, 1), END)  # a model that starts from nothing is prompted with its end
log_prob_fn = fjax.make_log_prob_fn(logits_fn)
tuner = fjax.fdpg(log_prob_fn, optax.adam(0.01), divergence=fjax.jensen_shannon())


@jax.jit
def draw(params, rng_key):
    """Samples of the policy, as rows of prompt and continuation."""
    samples = fjax.sample(
        decode_fn, params, rng_key, prompt, empty(SAMPLES), max_new_tokens=LENGTH, eos_id=END
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
model = model_of(state.params)  # the trained model, a module again
