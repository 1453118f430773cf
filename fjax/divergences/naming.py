"""Every divergence by what it is called: one parser of names, for every command line."""

import math

from .algebra import dual
from .alpha import alpha_divergence
from .catalogue import (
    chi2_mix,
    forward_kl,
    generalized_jensen_shannon,
    jeffreys,
    jensen_shannon,
    neyman_chi2,
    pearson_chi2,
    reverse_kl,
    squared_hellinger,
    total_variation,
    triangular_discrimination,
)
from .core import FDivergence

_PLAIN = {
    make.__name__: make
    for make in (
        forward_kl,
        reverse_kl,
        total_variation,
        jensen_shannon,
        jeffreys,
        pearson_chi2,
        neyman_chi2,
        squared_hellinger,
        triangular_discrimination,
        chi2_mix,
    )
}
# An example of a parameter shows how it is written.
_WITH_NUMBER = {
    "alpha": (alpha_divergence, "0.5"),
    "generalized_jensen_shannon": (generalized_jensen_shannon, "0.1"),
}
_DUAL = "_dual"


def by_name(name: str) -> FDivergence:
    """The divergence of that name: ``"forward_kl"``, or with a parameter ``"alpha=0.5"``.

    The inverse of ``FDivergence.name`` for every f of the library: `names` lists them, and each may
    have ``_dual`` behind it. The same name gives the same object, which `jax.jit` takes as a static
    argument without compiling anew. Divergences made of others or by hand have no name here.

    Args:
        name: as a command line has it.

    Raises:
        ValueError: for a name that does not exist, or a parameter that is missing, superfluous or
            out of range, with the names that exist.

    >>> by_name("alpha=0.5") is alpha_divergence(0.5)
    True
    >>> by_name("jensen_shannon").name, by_name("chi2_mix_dual").name
    ('jensen_shannon', 'chi2_mix_dual')

    Source: the names are those of Go et al. 2023, table 1, and of each divergence's own source.
    """
    if name.endswith(_DUAL):
        return dual(by_name(name.removesuffix(_DUAL)))
    kind, equals, parameter = name.partition("=")
    if kind in _PLAIN and not equals:
        return _PLAIN[kind]()
    if kind in _PLAIN:
        raise ValueError(f"{kind} takes no parameter, got {parameter!r}. {_there_are()}")
    if kind not in _WITH_NUMBER:
        raise ValueError(f"There is no divergence {name!r}. {_there_are()}")
    make, example = _WITH_NUMBER[kind]
    try:
        return make(_number(parameter))
    except ValueError as error:
        given = f"{name!r}: {error}" if parameter else f"{name!r} lacks its parameter."
        raise ValueError(f"{given} It is written {kind}={example}. {_there_are()}") from None


def names() -> tuple[str, ...]:
    """The names that `by_name` knows; of a family one member, as an example.

    >>> names()[:2], names()[-2:]
    (('forward_kl', 'reverse_kl'), ('alpha=0.5', 'generalized_jensen_shannon=0.1'))

    Source: the functions of `fjax.divergences`.
    """
    families = (f"{kind}={example}" for kind, (_, example) in _WITH_NUMBER.items())
    return (*_PLAIN, *families)


def _there_are() -> str:
    *most, last = names()
    return f"There are {', '.join(most)} and {last}; the last two take any number in their range."


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is no finite number.")
    return number
