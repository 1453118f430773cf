"""Samples of the target itself, in a file that all runs of that target share."""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fjax.estimators import Estimate
from fjax.evaluation import Exact, Scored, TextTarget, given_of, prompts_of, references_of
from fjax.rollouts import Collector
from fjax.runs.reading import RunError

ARRAYS = ("tokens", "where", "finished", "log_a", "log_score", "log_z", "drawn", "target")
CONTEXTS = "contexts"
"""Which prompt each row continues, where there are some."""


def write_exact(path: Path, exact: Exact, *, target: str) -> None:
    """Writes the file whole or not at all.

    Args:
        path: of the file, whose folder is made.
        exact: the samples.
        target: what p they are of: whatever tells it from others, such as a digest of base model
            and configuration.

    Raises:
        RunError: if it cannot be written.
    """
    rows = {name: getattr(exact.scored, name) for name in ARRAYS[:5]}
    if exact.scored.contexts is not None:
        rows[CONTEXTS] = exact.scored.contexts
    numbers = {"log_z": np.asarray(exact.log_z, float), "drawn": exact.drawn, "target": target}
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez_compressed(file, **rows, **numbers)
        temporary.replace(path)
    except OSError as error:
        raise RunError(
            f"Cannot keep the exact samples in {path}: {error.strerror}. Give another folder "
            f"(--exact-folder), or do without them (--exact-samples None)."
        ) from error


def read_exact(path: Path, collector: Collector, text_target: TextTarget, *, target: str) -> Exact:
    """What the file has; texts and features are made again, and log P is compared.

    Raises:
        RunError: if it is damaged, or of another target.
    """
    kept = _arrays(path)
    if str(kept["target"]) != target:
        raise RunError(
            f"{path} has samples of another target ({str(kept['target'])[:16]}, not "
            f"{target[:16]}). Delete it, and they are drawn anew."
        )
    if (CONTEXTS in kept) != (collector.contexts is not None):
        raise RunError(f"{path} is of a target with other prompts. Delete it.")
    scored = _scored(kept, collector, text_target)
    _check_score(path, scored, text_target)
    log_z = kept["log_z"]
    numbers: list[Any] = log_z.tolist() if log_z.ndim == 1 else [*log_z]
    return Exact(scored, Estimate(*numbers), int(kept["drawn"]))


def _arrays(path: Path) -> Mapping[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            kept = {name: arrays[name] for name in (*ARRAYS, *({CONTEXTS} & {*arrays.files}))}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(
            f"{path} is damaged ({error}). Delete it, and the samples are drawn anew."
        ) from error
    rows = {len(kept[name]) if kept[name].ndim else None for name in ARRAYS[:5]}
    numbers = kept["log_z"].shape
    if len(rows) > 1 or numbers[:1] != (3,) or len(numbers) != 1 + (CONTEXTS in kept):
        raise RunError(f"{path} is damaged: its arrays do not belong together. Delete it.")
    return kept


def _check_score(path: Path, scored: Scored, target: TextTarget) -> None:
    if not scored.texts:
        return
    found = target.log_score(scored.log_a, scored.features)
    same = np.isclose(found, scored.log_score, rtol=1e-4, atol=1e-3)
    if not same.all():
        i = int(np.argmin(same))
        raise RunError(
            f"{path} has samples of another target: log P of {scored.texts[i]!r:.200} was "
            f"{scored.log_score[i]:.6g} and is {found[i]:.6g} now. Delete it, and they are drawn "
            f"anew."
        )


def _scored(kept: Mapping[str, np.ndarray], collector: Collector, target: TextTarget) -> Scored:
    tokens, where, finished, log_a, log_score = (kept[name] for name in ARRAYS[:5])
    n = len(tokens)
    contexts, unseen = kept.get(CONTEXTS), collector.contexts and collector.contexts.unseen
    texts = collector.decode(tokens, where) if n else []
    features = dict(target.features(given_of(unseen, contexts, n), texts)) if n else {}
    rows = tokens, where, finished, log_a, log_a, log_score, contexts
    prompts, references = (of(unseen, contexts, n) for of in (prompts_of, references_of))
    return Scored(*rows, prompts, texts, references, features)
