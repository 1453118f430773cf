"""Trees of parameters by the paths of their leaves, such as ``h_0/attn/c_attn/kernel``."""

import re
from collections.abc import Iterable
from typing import Any

import jax

from fjax.types import PyTree


def name_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by their paths, such as ``state/params/wte``, in the order of the tree.

    The same for a NamedTuple and a dict of its fields.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    # A key with a slash in it may spell another's path; what is longer cannot be mistaken.
    return (
        named
        if len(named) == len(leaves)
        else {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    )


def find_leaves(tree: PyTree, pattern: str, *, name: str) -> dict[str, Any]:
    """The leaves whose path has the regular expression in it.

    Args:
        tree: of parameters.
        pattern: the expression; "" is in every path.
        name: what the caller's users know the pattern by.

    Raises:
        ValueError: if there is none, with the paths that there are; or the pattern is none.

    >>> tree = {"h_0": {"bias": 1, "kernel": 2}, "h_1": {"bias": 3, "kernel": 4}}
    >>> find_leaves(tree, "h_1.*bias", name="pattern")
    {'h_1/bias': 3}
    >>> find_leaves(tree, "wte", name="pattern")
    Traceback (most recent call last):
    ValueError: pattern 'wte' is in no parameter's path. There are h_N/bias, h_N/kernel.
    """
    named = name_leaves(tree)
    try:
        found = {path: leaf for path, leaf in named.items() if re.search(pattern, path)}
    except re.error as error:
        raise ValueError(
            f"{name} must be a regular expression, got {pattern!r}: {error}."
        ) from error
    if not found:
        raise ValueError(
            f"{name} {pattern!r} is in no parameter's path. There are {list_paths(named)}."
        )
    return found


def count_numbers(tree: PyTree) -> int:
    """In all leaves together."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def same_numbers(tree: PyTree, other: PyTree) -> bool:
    """Whether two trees of the same shapes hold the same numbers."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return tree is other or all(bool((x == y).all()) for x, y in pairs)


def list_paths(paths: Iterable[str]) -> str:
    """For a message: blocks that differ in their number alone are one."""
    return ", ".join(sorted({re.sub(r"\d+", "N", path, count=1) for path in paths}))
