"""The same by hand: draw, score, update, evaluate."""

import jax
import numpy as np
import optax

import fjax
from fjax import evaluation, rollouts

model = fjax.from_pretrained("built-in")


def features(prompts, texts):
    return {"satisfaction": np.array(["great" in text.split() for text in texts], np.float32)}


def log_score(log_a, features):
    return np.where(features["satisfaction"] > 0, log_a, -np.inf)


target = evaluation.TextTarget(features, log_score)
collector = rollouts.model_collector(model, max_new_tokens=40, samples=128, base_samples=16)
log_prob_fn = fjax.make_log_prob_fn(model.logits_fn, start=1)
tuner = fjax.fdpg(log_prob_fn, optax.adam(5e-4), divergence=fjax.jensen_shannon())
update = jax.jit(tuner.update, donate_argnums=0)

key, state = jax.random.key(0), tuner.init(model.params)
for step in range(90):
    batch = collector.draw(state.params, jax.random.fold_in(key, step))
    found = target.features([""] * 128, collector.decode(batch.tokens, batch.where))
    scores = target.log_score(np.asarray(batch.log_a), found)
    state, info = update(state, rollouts.to_rollout(batch, scores))

drawn = evaluation.draw_scored(collector, state.params, target, jax.random.key(1), 512)
divergences = {"jensen_shannon": fjax.jensen_shannon()}
figures = evaluation.evaluate(collector, state.params, target, drawn, divergences=divergences)
print(figures["satisfaction"], figures["jensen_shannon"])
