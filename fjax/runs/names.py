"""What tables and plots call the figures of an evaluation."""

NAMES = {
    "win_rate": "win rate over the base",
    "exact_samples": "exact samples of p",
    "pareto_k": "Pareto k̂ of P/q",
    "known": "contexts with a known Z",
    "log_z": "log Z",
    "forward_kl": "KL(p‖π)",
    "reverse_kl": "KL(π‖p)",
    "total_variation": "TV(π, p)",
    "jensen_shannon": "JS(π, p)",
    "alpha": "α-divergence",
    "kl_to_base": "KL(π‖a)",
    "entropy": "entropy of π",
    "perplexity": "perplexity under a",
    "length": "tokens a sample",
    "ended": "samples that end",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "self_bleu": "self-BLEU-4",
    "bleu": "BLEU of references",
    "rouge_l": "ROUGE-L of references",
}
"""What is not here is a feature of the task, or another divergence, and keeps its name."""


def title_of(figure: str) -> str:
    """What a figure is called."""
    return NAMES.get(figure, figure)
