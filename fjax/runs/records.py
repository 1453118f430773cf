"""What a run writes of its evaluations: figures as records of metrics.jsonl, and some samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from fjax.estimators import Estimate
from fjax.evaluation import Evaluation, Exact, figures_of_target
from fjax.runs.reading import CONTEXTS, SAMPLES
from fjax.runs.steps import as_numbers
from fjax.training import JsonlLogger

T = TypeVar("T")


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


def spread(things: Sequence[T], most: int) -> list[T]:
    """As many as that at most, from all of them: with contexts they are of different ones.

    >>> spread("abcdefg", 3)
    ['a', 'd', 'g']
    """
    count = len(things)
    return [things[i] for i in np.linspace(0, count - 1, min(most, count)).astype(int)]


def sample_records(evaluation: Evaluation, step: int) -> list[dict]:
    """Some samples, from all contexts, each with what the target says of it."""
    samples, features = evaluation.samples, evaluation.samples.features
    records = []
    for i in spread(range(len(samples.texts)), 64):
        prompt = {"prompt": samples.prompts[i]} if samples.prompts[i] else {}
        record = {"step": step, **prompt, "text": samples.texts[i]}
        records.append(record | {k: v[i] for k, v in features.items()})
    return records


def keep_samples(folder: Path, evaluation: Evaluation, step: int) -> list[dict]:
    """Writes some samples, and with contexts the means of each; returns the samples."""
    samples, records = evaluation.samples, sample_records(evaluation, step)
    with JsonlLogger(folder / SAMPLES) as logger:
        for record in records:
            logger.log(record)
    if evaluation.log_z is None:
        return records
    with JsonlLogger(folder / CONTEXTS) as logger:
        means = {k: samples.table(v).mean(axis=1) for k, v in samples.features.items()}
        count = len(samples.texts) // len(evaluation.log_z)
        for i, prompt in enumerate(samples.prompts[::count]):
            record = {"step": step, "prompt": prompt, "log_z": evaluation.log_z[i]}
            logger.log(record | {k: v[i] for k, v in means.items()})
    return records
