"""Quasi-rejection of prompts against their listed continuations: what is accepted is of p_β of its
own prompt, and rate and bound are what they should be."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fjax
from experiments.tools.quasi_rejection import beta_of_rate, collect, estimate, propose
from fjax.evaluation import TextTarget
from fjax.rollouts import Contexts, Prompts, make_collector, make_sample_fn

WORDS, TOKENS, END = 4, 2, 0
"""Token 0 ends a text; continuations have up to two tokens, so that there are 13 of each prompt."""

BASE, POLICY = (
    np.random.default_rng(seed).normal(size=(WORDS, WORDS)).astype(np.float32) for seed in (0, 1)
)
TEXTS = ["", *map(str, range(1, WORDS))]
TEXTS += [f"{a} {b}" for a, b in itertools.product(range(1, WORDS), repeat=2)]
TEXTS += [f"{a}." for a in range(1, WORDS)]
"""All of them: ended at once, after one token, cut off after two; "1." is one that ended."""


def logits_fn(params, tokens, where=None, *, start=0):
    return params[tokens[:, start:]]


def decode(tokens, where):
    """With a full stop where the end was drawn behind a word, so that texts are sequences."""
    rows = [row[keep].tolist() for row, keep in zip(np.asarray(tokens), np.asarray(where), strict=True)]  # fmt: skip
    texts = [" ".join(str(token) for token in row if token != END) for row in rows]
    return [f"{text}." * bool(text) if row[-1] == END else text for text, row in zip(texts, rows, strict=True)]  # fmt: skip


def features(prompts, texts):
    """Twice as good without the prompt's word, and impossible at once."""
    return {"new": np.array([float(c not in x) for c, x in zip(prompts, texts, strict=True)]),
            "some": np.array([float(bool(x)) for x in texts])}  # fmt: skip


def log_score(log_a, features):
    with np.errstate(divide="ignore"):
        return log_a + np.log(1 + features["new"]) + np.log(features["some"])


TARGET = TextTarget(features, log_score)


@pytest.fixture(scope="module")
def collector():
    prompts = Prompts(["1", "2"], np.array([[1], [2]], np.int32), np.ones((2, 1), bool), ["", ""])
    sample_fn = make_sample_fn(
        lambda params, tokens, cache, where=None: (params[tokens[:, -1]], cache),
        lambda rows, columns: (),
        max_new_tokens=TOKENS,
        eos_id=END,
    )
    given = sample_fn, fjax.make_log_prob_fn(logits_fn), BASE, decode
    contexts = Contexts(prompts, prompts, 1)
    return make_collector(*given, start_id=END, samples=4000, base_samples=1000, contexts=contexts)


def listed(params, prompt: int) -> dict[str, float]:
    """Text -> log-probability, by its definition."""
    logs = np.asarray(jax.nn.log_softmax(jnp.asarray(params)), float)
    found = {"": logs[prompt, END]}
    for a in range(1, WORDS):
        found[f"{a}."] = logs[prompt, a] + logs[a, END]
        found |= {f"{a} {b}": logs[prompt, a] + logs[a, b] for b in range(1, WORDS)}
    return found


@pytest.mark.parametrize("context", [0, 1])
def test_what_is_accepted_is_of_p_beta_of_its_prompt(collector, context):
    """Frequencies, rate and bound within 5 standard errors of those summed over all texts."""
    prompt = context + 1
    log_q, log_a = listed(POLICY, prompt), listed(BASE, prompt)
    texts = list(log_q)
    q, a = (np.exp([logs[text] for text in texts]) for logs in (log_q, log_a))
    of = features([str(prompt)] * len(texts), texts)
    p = a * (1 + of["new"]) * of["some"]
    assert q.sum() == pytest.approx(1, abs=1e-6)
    found = collect(
        propose(collector, TARGET, POLICY, 0, context),
        jax.random.key(1),
        samples=10**6,
        max_proposals=24_000,
        choose=partial(beta_of_rate, acceptance_rate=0.5),
    )
    beta = np.exp(found.log_beta)
    p_beta = np.minimum(p, beta * q)
    assert found.proposals == 24_000
    assert 0 < (p > beta * q).sum() < len(p) - 1
    counts = np.array([found.texts.count(text) for text in texts])
    wanted = p_beta / p_beta.sum()
    n = counts.sum()
    np.testing.assert_array_less(np.abs(counts / n - wanted), 5 * np.sqrt(wanted * (1 - wanted) / n) + 1e-9)  # fmt: skip
    rate, bound = estimate(found)
    assert abs(float(rate.value) - p_beta.sum() / beta) < 5 * float(rate.std_error)
    assert abs(float(bound.value) - (1 - p_beta.sum() / p.sum())) < 5 * float(bound.std_error)
    assert float(bound.std_error) < 0.05


def test_what_is_impossible_is_given_up_at_once(collector):
    nothing = TARGET._replace(log_score=lambda log_a, features: np.full(len(log_a), -np.inf))
    found = collect(
        propose(collector, nothing, POLICY, 0, 0),
        jax.random.key(1),
        samples=1,
        max_proposals=10**6,
        choose=partial(beta_of_rate, acceptance_rate=0.5),
    )
    assert np.isnan(found.log_beta)
    assert (found.texts, found.proposals) == ([], 3000)
