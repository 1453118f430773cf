"""What a run writes of its evaluations: figures as records of metrics.jsonl, and some samples."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fjax.estimators import Estimate
from fjax.evaluation import Evaluation, Exact, figures_of_target
from fjax.runs.folder import CONTEXTS, SAMPLES
from fjax.runs.steps import as_numbers
from fjax.training import JsonlLogger


def as_record(figures: Mapping[str, Estimate], step: int, seconds: float, drawn: int) -> dict:
    """A line of metrics.jsonl."""
    record = {"kind": "evaluation", "step": step, "seconds": seconds, "samples": drawn}
    for name, figure in figures.items():
        record |= as_numbers(name, figure)
    return record


def as_target_record(exact: Exact) -> dict:
    """What p itself is like, under the names that a policy's figures have."""
    record = as_record(figures_of_target(exact), 0, 0.0, 0)
    counts = {"exact_samples": len(exact.scored.texts), "drawn": exact.drawn}
    return record | {"kind": "target"} | counts


def keep_samples(folder: Path, evaluation: Evaluation, step: int) -> None:
    """Some samples, from all contexts; and with contexts, the means of each."""
    samples, features = evaluation.samples, evaluation.samples.features
    count = len(samples.texts)
    with JsonlLogger(folder / SAMPLES) as logger:
        for i in np.linspace(0, count - 1, min(64, count)).astype(int):
            prompt = {"prompt": samples.prompts[i]} if samples.prompts[i] else {}
            record = {"step": step, **prompt, "text": samples.texts[i]}
            logger.log(record | {k: v[i] for k, v in features.items()})
    if evaluation.log_z is None:
        return
    with JsonlLogger(folder / CONTEXTS) as logger:
        means = {k: samples.table(v).mean(axis=1) for k, v in features.items()}
        for i, prompt in enumerate(samples.prompts[:: count // len(evaluation.log_z)]):
            record = {"step": step, "prompt": prompt, "log_z": evaluation.log_z[i]}
            logger.log(record | {k: v[i] for k, v in means.items()})
