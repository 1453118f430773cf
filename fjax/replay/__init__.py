"""Samples used many times, each with the density of what it was drawn from at the time.

A replay is a tree of arrays with a row for each sample. Batches b, each drawn from a proposal q_b
of its own, are combined by weights c_b. Rows of the training part, drawn from it by s, are a
`fjax.Rollout` as any other:

    Σ_b c_b · mean over the rows of b of g/q_b  =  E_{i~s}[u_i g_i/q_i],    u_i = (c_b/n_b)/s_i

The weight u is folded into log q, which is all that a tuner has to know of it, and the scores are
normalised: `fjax.fdpg` with ``log_z=known_log_z()`` does the rest, for any f.

Two rules keep this exact. A row's log q is of its own proposal and never of a mixture of all: later
proposals were trained on these very samples, and their densities know which were drawn. And whether
a row is held out is settled when it is added, or what is estimated from held-out rows has been
trained on.

For given proposals and fixed weights the sum has no bias. What remains is that Z is itself
estimated, and that a policy trained on rows for long learns them by heart: that is what the
held-out part is there to show.

Source: Owen 2013, sections 9.1 and 9.2; several proposals, each sample weighted by its own: scheme
N1 of Elvira et al. 2019 (arXiv 1511.03095).
"""

from .draws import draw_probabilities, minibatch, replay_part
from .rows import Replay, add_to_replay, init_replay, replay_bytes
from .weights import replay_log_z, weights_by_count, weights_by_ess

__all__ = [
    "Replay",
    "add_to_replay",
    "draw_probabilities",
    "init_replay",
    "minibatch",
    "replay_bytes",
    "replay_log_z",
    "replay_part",
    "weights_by_count",
    "weights_by_ess",
]
