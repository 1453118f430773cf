"""Every f of `tests.cases.CASES` and its slope, as in a textbook, to fifty digits and without an
end to the exponents.

So weights can be compared with what they are at log_t = ±10^4, where neither e^log_t nor f' is a
number of the machine.
"""

from collections.abc import Callable
from decimal import Context, Decimal, localcontext

from tests.cases import Case, name

HALF, ONE = Decimal("0.5"), Decimal(1)
WIDE = Context(prec=50)
BEYOND = Decimal(400_000)  # stands for infinity: e to it is 10^173717


def _alpha(a: str):
    a = Decimal(a)
    if a == 0:
        return lambda t: t - 1 - t.ln(), lambda t: 1 - 1 / t
    if a == 1:
        return lambda t: t * t.ln() - t + 1, lambda t: t.ln()
    return (
        lambda t: (t**a - 1 - a * (t - 1)) / (a * (a - 1)),
        lambda t: (t ** (a - 1) - 1) / (a - 1),
    )


def _skew(w: str):
    w = Decimal(w)

    def f(t):
        m = w * t + 1 - w
        # Where t is large the two logarithms are alike to fifty digits, which have to be the
        # difference's.
        return w * t * (t / m).ln() - (1 - w) * m.ln()

    return f, lambda t: w * (t / (w * t + 1 - w)).ln()


def _chi2_mix_dual(t):
    return HALF * (t - 1) ** 2 / t - t.ln()


def _half_and_half(t):
    return HALF * (t.sqrt() - 1) ** 2 - t.ln() / 4


EXACT: dict[str, tuple[Callable, Callable]] = {
    "forward_kl": (lambda t: -t.ln(), lambda t: -1 / t),
    "reverse_kl": (lambda t: t * t.ln(), lambda t: t.ln() + 1),
    "total_variation": (lambda t: HALF * abs(t - 1), lambda t: HALF * ((t > 1) - (t < 1))),
    "jensen_shannon": _skew("0.5"),
    "generalized_jensen_shannon=0.1": _skew("0.1"),
    "generalized_jensen_shannon=0.8": _skew("0.8"),
    "jeffreys": (lambda t: (t - 1) * t.ln(), lambda t: t.ln() + 1 - 1 / t),
    "pearson_chi2": (lambda t: (t - 1) ** 2, lambda t: 2 * (t - 1)),
    "neyman_chi2": (lambda t: (t - 1) ** 2 / t, lambda t: 1 - 1 / t**2),
    "squared_hellinger": (lambda t: (t.sqrt() - 1) ** 2, lambda t: 1 - 1 / t.sqrt()),
    "triangular_discrimination": (lambda t: (t - 1) ** 2 / (t + 1), lambda t: 1 - 4 / (t + 1) ** 2),
    "chi2_mix": (lambda t: HALF * (t - 1) ** 2 + t * t.ln(), lambda t: t + t.ln()),
    **{f"alpha={a}": _alpha(a) for a in ("-0.5", "0", "0.3", "0.75", "1", "1.25", "2.5")},
    "chi2_mix_dual": (_chi2_mix_dual, lambda t: HALF * (1 - 1 / t**2) - 1 / t),
    "half_and_half": (_half_and_half, lambda t: HALF * (1 - 1 / t.sqrt()) - 1 / (4 * t)),
}


def exactly(case: Case, log_pi: float, log_p: float, log_q: float) -> tuple[float, float, float]:
    """(f', (π/q) f', (p/q) f) of t = π/p, as float64: ±inf or 0 where it is no such number."""
    f, slope = EXACT[name(case)]
    infinite = -float("inf") in (log_pi, log_p)

    def limit(x):
        # What grows with log t alone is not far from 0 at BEYOND.
        return x if not infinite or abs(x) < BEYOND / 1000 else x * Decimal("inf")

    with localcontext(WIDE):
        log_pi, log_p, log_q = (
            max(Decimal(x), -BEYOND) if x > -float("inf") else -BEYOND
            for x in (log_pi, log_p, log_q)
        )
        t = (log_pi - log_p).exp()
        if t > 1:
            ratio = (log_pi - log_q).exp()
            return (
                float(limit(slope(t))),
                float(limit(slope(t)) * ratio),
                float(limit(f(t) / t) * ratio),
            )
        ratio = (log_p - log_q).exp()
        return (
            float(limit(slope(t))),
            float(limit(t * slope(t)) * ratio),
            float(limit(f(t)) * ratio),
        )
