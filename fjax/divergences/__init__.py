"""f-divergences ``D_f(π‖p) = E_p[f(π/p)]`` as stable functions of ``log_t = log π - log p``.

f is convex with f(1) = 0. Where p = 0 and π > 0, log_t = +inf, and the functions return their
limits there: f'(∞) from ``derivative`` and ``integrand``. So a hard constraint is an ordinary
input: forward KL, total variation and Jensen–Shannon are finite on it, reverse KL is not, and says
so with inf.

A divergence of your own is one more `FDivergence`, by hand or by `from_generator`; nothing has to
be registered, and `fjax.testing.check_divergence` runs on it what fjax runs on its own.

Source: Go et al. 2023 (f-DPG, arXiv 2302.08215), section 3 and table 1; Csiszár 1967 for the
family.
"""

from .algebra import dual, from_generator, mixture
from .alpha import alpha_divergence, alpha_from_amari, alpha_from_cressie_read, alpha_from_f_dpo
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
from .core import Elementwise, FDivergence, exact_divergence
from .naming import by_name, names

__all__ = [
    "Elementwise",
    "FDivergence",
    "alpha_divergence",
    "alpha_from_amari",
    "alpha_from_cressie_read",
    "alpha_from_f_dpo",
    "by_name",
    "chi2_mix",
    "dual",
    "exact_divergence",
    "forward_kl",
    "from_generator",
    "generalized_jensen_shannon",
    "jeffreys",
    "jensen_shannon",
    "mixture",
    "names",
    "neyman_chi2",
    "pearson_chi2",
    "reverse_kl",
    "squared_hellinger",
    "total_variation",
    "triangular_discrimination",
]
