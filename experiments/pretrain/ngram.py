"""An interpolated 5-gram with modified Kneser–Ney smoothing: the yardstick the built-in GPT-2 has
to beat.

    p(w | h) = max(c(h w) - D, 0) / c(h) + γ(h) p(w | h')        h' = h without its first token

with true counts at the highest order, continuation counts (in how many different contexts was it
seen) below, three discounts an order, and the uniform distribution at the bottom. Source: Chen &
Goodman 1999, section 3; James 2000.
"""

import math
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np


class _Order(NamedTuple):
    counts: dict[tuple, int]  # n-gram -> (continuation) count
    totals: dict[tuple, int]  # context -> sum of its counts
    kinds: dict[tuple, list[int]]  # context -> how many of its n-grams have count 1, 2, 3+
    discounts: tuple[float, float, float]


class NGram(NamedTuple):
    orders: list[_Order]  # unigram first
    vocab_size: int


def fit(rows: list[np.ndarray], *, order: int, vocab_size: int) -> NGram:
    """Counts every n-gram of ``rows``; each row begins with its start token, which is context but
    never predicted."""
    highest = Counter()
    for row in rows:
        tokens = (int(row[0]),) * (order - 2) + tuple(row.tolist())
        highest.update(tokens[i : i + order] for i in range(len(tokens) - order + 1))
    counts = [highest]
    while len(counts) < order:
        # Continuation count: each distinct longer n-gram lends one to the n-gram it ends with.
        counts.append(Counter(gram[1:] for gram in counts[-1]))
    return NGram([_summarise(c) for c in reversed(counts)], vocab_size)


def _summarise(counts: Counter) -> _Order:
    totals, kinds = defaultdict(int), defaultdict(lambda: [0, 0, 0])
    for gram, count in counts.items():
        totals[gram[:-1]] += count
        kinds[gram[:-1]][min(count, 3) - 1] += 1
    n1, n2, n3, n4 = (max(sum(c == k for c in counts.values()), 1) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    # Tiny corpora can push the closed forms out of range; a discount must stay between 0 and the
    # count it is taken from.
    raw = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    d1, d2, d3 = (min(max(d, 0.0), k) for k, d in enumerate(raw, start=1))
    return _Order(dict(counts), dict(totals), dict(kinds), (d1, d2, d3))


def probability(model: NGram, context: tuple[int, ...], token: int) -> float:
    """p(token | context); sums to one over the vocabulary for every context."""
    p = 1 / model.vocab_size
    for n, order in enumerate(model.orders):
        history = context[len(context) - n :] if n else ()
        total = order.totals.get(history)
        if total is None:
            break  # never seen: no longer context was either
        count = order.counts.get((*history, token), 0)
        discount = order.discounts[min(count, 3) - 1] if count else 0.0
        kept = sum(d * k for d, k in zip(order.discounts, order.kinds[history], strict=True))
        p = (count - discount) / total + kept / total * p
    return p


def negative_log_likelihood(model: NGram, rows: list[np.ndarray]) -> float:
    """Nats over all tokens of ``rows`` after the first of each, the end token included."""
    order, nats = len(model.orders), 0.0
    for row in rows:
        tokens = (int(row[0]),) * (order - 2) + tuple(row.tolist())
        for i in range(order - 1, len(tokens)):
            nats -= math.log(probability(model, tokens[i - order + 1 : i], tokens[i]))
    return nats
