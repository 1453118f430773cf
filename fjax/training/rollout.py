"""What one update is made of: samples, and two numbers about each."""

from typing import NamedTuple

from fjax._typing import Array, Bool, Float, Int


class Rollout(NamedTuple):
    """N samples of one target, or of each of C contexts, as arrays.

    Attributes:
        tokens: prompt and completion, contiguous, padded on the right (`fjax.log_probs.pack`).
        where: tokens that count: the completion up to and including its end-of-sequence token.
        log_q: log-probability of each completion under the distribution it was really drawn from, in nats.
        log_score: log P(x) under the unnormalised target; -inf where it is ruled out.
        contexts: which contexts the C rows of samples are of, each at most once; needed for one Z a context.
        strata: which part of the sampling distribution each sample was drawn from, where their numbers were fixed: 0 for the
            policy (or its proposal), 1 for the base model. None: all of one distribution, log q, or of a mixture by chance.
    """

    tokens: Int[Array, "*c N T"]
    where: Bool[Array, "*c N T"]
    log_q: Float[Array, "*c N"]
    log_score: Float[Array, "*c N"]
    contexts: Int[Array, "C"] | None = None
    strata: Int[Array, "*c N"] | None = None
