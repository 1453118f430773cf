"""Aligns the built-in model to a word, from Python: what `fjax lexical_constraint` does."""

import jax
import numpy as np
import optax

import fjax
from fjax import evaluation, rollouts, runs

model = fjax.from_pretrained("built-in")  # or a folder, or gpt2


def features(prompts, texts):
    return {"satisfaction": np.array(["great" in text.split() for text in texts], np.float32)}


def log_score(log_a, features):  # log P = log a + log b: the base model, restricted to the word
    return np.where(features["satisfaction"] > 0, log_a, -np.inf)


target = evaluation.TextTarget(features, log_score, headline="satisfaction", bound="satisfaction")
collector = rollouts.model_collector(model, max_new_tokens=40, samples=128, base_samples=16)
log_prob_fn = fjax.make_log_prob_fn(model.logits_fn, start=1)
tuner = fjax.fdpg(log_prob_fn, optax.adam(5e-4), divergence=fjax.jensen_shannon())
divergences = {"jensen_shannon": fjax.jensen_shannon()}
result = runs.align(
    model, target, tuner, collector, folder="runs/great", steps=90, divergences=divergences
)
print(result.figures["satisfaction"])
batch = collector.draw(result.params, jax.random.key(1))  # of the aligned model
print(*collector.decode(batch.tokens, batch.where)[:3], sep="\n")
