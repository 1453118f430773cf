"""A language model of pairs of words, whose parameters are one table: compiled in a moment, for whatever is given a
model as functions. Its probabilities are written down a second time, in NumPy."""

import functools

import numpy as np
import optax

import fjax
from fjax.evaluation import TextTarget
from fjax.models import LanguageModel
from fjax.rollouts import Collector, make_collector, make_sample_fn

WORDS, NEW_TOKENS, END = 12, 6, 0
"""Token 0 stands before a text and ends it; the others are w1 to w11."""

BASE = np.random.default_rng(0).normal(size=(WORDS, WORDS)).astype(np.float32)


def logits_fn(params, tokens, where=None, *, start=0):
    return params[tokens[:, start:]]


def decode_fn(params, tokens, cache, where=None):
    return params[tokens[:, -1]], cache


LOG_PROB_FN = fjax.make_log_prob_fn(logits_fn)
SAMPLE_FN = make_sample_fn(
    decode_fn, lambda rows, columns: (), max_new_tokens=NEW_TOKENS, eos_id=END
)


def log_probs(params, tokens, where) -> np.ndarray:
    """Log π of each row, by its definition."""
    logits = np.asarray(params, float)
    logits = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    tokens, where = np.asarray(tokens), np.asarray(where)
    return (logits[tokens[:, :-1], tokens[:, 1:]] * where[:, 1:]).sum(axis=1)


def decode(tokens, where) -> list[str]:
    pairs = zip(np.asarray(tokens), np.asarray(where), strict=True)
    return [" ".join(f"w{token}" for token in row[keep] if token != END) for row, keep in pairs]


def save(folder, params, dtype=None) -> None:
    folder.mkdir(exist_ok=True)
    np.save(folder / "table.npy", np.asarray(params))


def model() -> LanguageModel:
    functions = logits_fn, decode_fn, lambda rows, columns: ()
    return LanguageModel(None, BASE, None, *functions, bos_id=END, eos_ids=(END,), save=save)


def collector(**options) -> Collector:
    """32 samples a batch, 4 of them of the base model, unless the options say otherwise."""
    given = {"samples": 32, "base_samples": 4} | options
    return make_collector(SAMPLE_FN, LOG_PROB_FN, BASE, decode, start_id=END, **given)


@functools.cache  # what is the same function is not traced again by the next run
def tuner(optimizer: optax.GradientTransformation | None = None) -> fjax.Tuner:
    return fjax.fdpg(LOG_PROB_FN, optimizer or optax.adam(0.1), divergence=fjax.jensen_shannon())


def _features(prompts, texts):
    return {"satisfaction": np.array(["w9" in text.split() for text in texts], np.float32)}


def _log_score(log_a, features):
    return np.where(features["satisfaction"] > 0, log_a, -np.inf).astype(np.float32)


TARGET = TextTarget(_features, _log_score, headline="satisfaction", bound="satisfaction")
"""p ∝ a·[w9 is in it]."""
