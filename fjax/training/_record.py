"""What is saved beside a checkpoint's arrays, and why another one is not restored.

Versions and configuration say who saved it, dtypes and shapes what it holds, and digests whether
that is still what was saved.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax

import fjax
from fjax.training._digests import describe_arrays, digest_text
from fjax.types import PyTree

FORMAT = 1
"""Of a checkpoint. Whoever changes what an older fjax would misread counts it up, and leaves
``format``, ``versions`` and ``sha256`` as they are: they are what that one can say."""


def make_record(
    tree: PyTree, metrics: Mapping[str, float] | None, about: Mapping[str, Any] | None
) -> dict[str, Any]:
    """With a digest of itself, so that a damaged record is not taken for another tree."""
    said = {"format": FORMAT, "versions": versions(), "about": as_plain(about)}
    return sealed(said | {"arrays": describe_arrays(tree), "metrics": metrics})


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its digest, whatever it had before."""
    plain = {key: value for key, value in record.items() if key != "sha256"}
    return plain | {"sha256": digest_text(json.dumps(plain, sort_keys=True))}


def versions() -> dict[str, str]:
    """Of what is running."""
    return {"fjax": fjax.__version__, "jax": jax.__version__}


def as_plain(about: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """As it comes back from a file."""
    return None if about is None else json.loads(json.dumps(about, sort_keys=True))


def too_new(record: Mapping[str, Any]) -> str | None:
    """Why it cannot be read; None if it can. Before there were formats they were the first."""
    found = record.get("format", FORMAT)
    if found <= FORMAT:
        return None
    return (
        f"was saved in format {found} by fjax {record['versions']['fjax']}; this is fjax "
        f"{fjax.__version__}, which reads formats up to {FORMAT}. Take that fjax, or a newer one"
    )


def other_run(record: Mapping[str, Any], about: Mapping[str, Any] | None) -> str | None:
    """Why it is of another run; None if it is not, or either side does not say what it is."""
    there, here = record.get("about"), as_plain(about)
    if there is None or here is None:
        return None
    # What is not there at all was off then.
    asked = {name: value for name, value in here.items() if name in there or value}
    names = [name for name in {**asked, **there} if there.get(name) != here.get(name)]
    differing = [f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in names]
    return f"is of another run ({_first(differing)})" if differing else None


def other_tree(record: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """What it has that the tree asked for has not, dtypes apart, in words; None if nothing."""
    saved = record["arrays"]
    lines = [f"{name} is there, but not asked for" for name in saved if name not in asked]
    lines += [f"{name} is asked for, but not there" for name in asked if name not in saved]
    for name in [name for name in saved if name in asked]:
        old, new = ((str(dtype), tuple(shape)) for dtype, shape in (
            (saved[name]["dtype"], saved[name]["shape"]), (asked[name].dtype, asked[name].shape)
        ))  # fmt: skip
        if old[1] != new[1] or is_key(old[0]) != is_key(new[0]):
            lines.append(f"{name} is {old[0]}{[*old[1]]} there, {new[0]}{[*new[1]]} asked for")
    return f"{_first(lines)}{_other_versions(record)}" if lines else None


def is_key(dtype: str) -> bool:
    """Whether the dtype is one of keys, of which only jax knows what they are made of."""
    return dtype.startswith("key<")


def _first(lines: list[str]) -> str:
    return f"{'; '.join(lines[:8])}{'; …' if lines[8:] else ''}"


def _other_versions(record: Mapping[str, Any]) -> str:
    """What else may be the reason, in a sentence; nothing if it is the same fjax and jax."""
    there, here = record.get("versions"), versions()
    if there is None or there == here:
        return ""
    return f". It was saved by {_listed(there)}, and this is {_listed(here)}"


def _listed(found: Mapping[str, str]) -> str:
    return " with ".join(f"{name} {version}" for name, version in found.items())
