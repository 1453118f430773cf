"""A plain function of arrays as the model, moved by f-DPG to sentences with a given token.

python docs/examples/plain_function.py
"""

import jax
import jax.numpy as jnp
import optax

import fjax

VOCABULARY, END, WORD, LENGTH, SAMPLES = 16, 0, 7, 8, 128


def logits_fn(params, tokens, where=None, *, start=0):
    """Logits of the next token at every column from ``start`` on, here from one token alone."""
    return jnp.tanh(params["embedding"][tokens[:, start:]]) @ params["head"] + params["bias"]


def decode_fn(params, tokens, cache, where=None):
    """Logits after the last column. Nothing but that column matters, so there is no cache."""
    return logits_fn(params, tokens)[:, -1], cache


first, second = jax.random.split(jax.random.key(0))
base = {
    "embedding": jax.random.normal(first, (VOCABULARY, 32)),
    "head": 0.1 * jax.random.normal(second, (32, VOCABULARY)),
    "bias": jnp.zeros(VOCABULARY).at[WORD].set(-2.0),  # the word is rare
}
prompt = jnp.full((SAMPLES, 1), END)  # a model that starts from nothing is prompted with its end
log_prob_fn = fjax.make_log_prob_fn(logits_fn)
tuner = fjax.fdpg(log_prob_fn, optax.adam(0.02), divergence=fjax.jensen_shannon())


@jax.jit
def draw(params, rng_key):
    """Samples of the policy, as rows of prompt and continuation."""
    samples = fjax.sample(
        decode_fn, params, rng_key, prompt, None, max_new_tokens=LENGTH, eos_id=END
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
for _ in range(100):
    state, info = step(state, jax.random.key(2))
before, after = share(base), share(state.params)
print(
    f"with the word: {before:.2f} before, {after:.2f} after; JS {float(info.divergence.value):.2f}"
)
