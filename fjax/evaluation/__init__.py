"""How near a policy is to a target over texts, from fresh samples of it.

Every figure is an estimate, with its standard error and effective sample size.
"""

from fjax.evaluation.exact import Exact, draw_exact, figures_of_target
from fjax.evaluation.figures import METRICS, Evaluation, Metric, evaluate, known_contexts, measure
from fjax.evaluation.scored import (
    Base,
    Features,
    Scored,
    TextTarget,
    contexts_used,
    draw_base,
    draw_batches,
    draw_scored,
    given_of,
    make_base,
    prompts_of,
    references_of,
    score,
)

__all__ = [
    "METRICS",
    "Base",
    "Evaluation",
    "Exact",
    "Features",
    "Metric",
    "Scored",
    "TextTarget",
    "contexts_used",
    "draw_base",
    "draw_batches",
    "draw_exact",
    "draw_scored",
    "evaluate",
    "figures_of_target",
    "given_of",
    "known_contexts",
    "make_base",
    "measure",
    "prompts_of",
    "references_of",
    "score",
]
