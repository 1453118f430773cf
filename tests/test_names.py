"""`fjax.divergences.by_name`: the one parser of the names that tables, files and command lines
have."""

import jax
import jax.numpy as jnp
import pytest

from fjax import divergences
from fjax.divergences import by_name, dual, names
from tests.cases import CASES, name, refused

OF_THE_LIBRARY = [case.divergence for case in CASES if name(case) != "half_and_half"]


@pytest.mark.parametrize("divergence", OF_THE_LIBRARY, ids=lambda divergence: divergence.name)
def test_a_name_leads_back_to_its_divergence(divergence):
    """The very same object, so that nothing is compiled twice for it; and so of its dual."""
    assert by_name(divergence.name) is divergence
    assert by_name(dual(divergence).name) is dual(divergence)


def test_every_function_that_makes_one_has_a_name():
    made = {by_name(each).name.partition("=")[0] for each in names()}
    there = {text.removesuffix("_divergence") for text in divergences.__all__}
    assert made <= there
    assert there - made == {
        *("Elementwise", "FDivergence", "by_name", "names", "exact"),
        *("alpha_from_amari", "alpha_from_cressie_read", "alpha_from_f_dpo"),
        *("dual", "from_generator", "mixture"),  # of others, or of a function of one's own
    }
    assert [by_name(each).name for each in names()] == [*names()]


def test_a_parameter_keeps_all_its_digits():
    third = divergences.alpha_divergence(1 / 3)
    assert third.name == "alpha=0.3333333333333333"
    assert by_name(third.name) is third
    assert by_name("alpha=1e-3") is by_name("alpha=0.001") is divergences.alpha_divergence(0.001)
    assert by_name("alpha=-0") is by_name("alpha=0")
    assert by_name("alpha=-0").name == "alpha=0"


def test_a_parameter_that_is_traced_has_no_number():
    found = []

    @jax.jit
    def slope(alpha):
        found.append(divergences.alpha_divergence(alpha).name)
        found.append(divergences.generalized_jensen_shannon(alpha).name)
        return divergences.alpha_divergence(alpha).derivative(jnp.zeros(()))

    slope(0.5)
    assert found == ["alpha", "generalized_jensen_shannon"]


@pytest.mark.parametrize(
    ("wrong", "because"),
    [
        ("forward_lk", "There is no divergence 'forward_lk'"),
        ("", "There is no divergence ''"),
        ("half_and_half", "no divergence 'half_and_half'"),
        ("alpha_divergence=0.5", "no divergence 'alpha_divergence=0.5'"),
        ("Alpha=0.5", "no divergence"),
        ("forward_lk_dual", "no divergence 'forward_lk'"),
        ("forward_kl=1", "forward_kl takes no parameter, got '1'"),
        ("forward_kl=", "forward_kl takes no parameter, got ''"),
        ("alpha", "'alpha' lacks its parameter. It is written alpha=0.5"),
        ("alpha=", "'alpha=' lacks its parameter"),
        ("alpha=half", "'alpha=half': 'half' is no finite number. It is written alpha=0.5"),
        ("alpha=0.5=0.5", "'0.5=0.5' is no finite number"),
        ("alpha=0,5", "'0,5' is no finite number"),
        ("alpha=nan", "'nan' is no finite number"),
        ("alpha=inf", "'inf' is no finite number"),
        ("alpha=-1e999", "'-1e999' is no finite number"),
        ("generalized_jensen_shannon", "lacks its parameter"),
        ("generalized_jensen_shannon=1", "between 0 and 1, both excluded; got 1.0"),
        ("generalized_jensen_shannon=-0.1", "between 0 and 1, both excluded; got -0.1"),
        ("generalized_jensen_shannon=nan", "'nan' is no finite number"),
    ],
)
def test_another_name_is_answered_with_those_that_there_are(wrong, because):
    with refused(because) as refusal:
        by_name(wrong)
    assert all(each in str(refusal.value) for each in names())
