"""The gradients of RLHF's objective: right on average to 1e-10, and the rows of the page."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tools.noise import penalties
from experiments.tools.noise.penalties import BETA, Setting
from experiments.tools.noise.world import (
    Task,
    bigram_task,
    mean_by_prefix,
    table,
    tabular_task,
)

PAGE = Path(__file__).parents[2] / "docs" / "noise.md"


@pytest.fixture(params=["table, on the way", "bigrams, adrift"])
def policy(x64, request) -> tuple[Task, jax.Array, Setting]:
    if request.param == "bigrams, adrift":
        task = bigram_task(1, 3)
        params = penalties.adrift(task, 1)
    else:
        task = tabular_task(0)
        params = penalties.on_the_way(task, 0.5)
    return task, params, penalties.make_setting(task, params)


def objective(task: Task, params: jax.Array, reward: float, beta: float) -> jax.Array:
    """reward · E[r] - β KL(π‖a), by its definition."""
    log_pi = task.log_prob_fn(params, *task.space)
    earned = reward * (task.space.tokens == 1).any(axis=1)
    return jnp.exp(log_pi) @ (earned - beta * (log_pi - task.log_a))


@pytest.mark.parametrize(("reward", "beta"), [(0.0, 1.0), (1.0, BETA)])
def test_each_form_is_right_on_average_with_any_baseline_but_the_last(policy, reward, beta):
    task, params, setting = policy
    exact = jax.grad(lambda params: objective(task, params, reward, beta))(params).ravel()
    noise = jax.random.normal(jax.random.key(0), setting.log_ratio.shape)
    made = penalties.forms(setting, reward, beta)
    *right, wrong = made.values()
    for form in right:
        every = penalties.baselines(setting, form)
        for baseline in (0.0, *every.values(), mean_by_prefix(noise, setting.pi, setting.same)):
            found = setting.pi @ penalties.gradients(setting, form, baseline)
            np.testing.assert_allclose(found, exact, atol=1e-10)
    found = setting.pi @ penalties.gradients(setting, wrong, 0.0)
    assert jnp.linalg.norm(found - exact) > 0.02 * jnp.linalg.norm(exact)


def test_the_divergences_of_tokens_sum_to_that_of_the_models(policy):
    task, params, setting = policy
    whole = -objective(task, params, 0.0, 1.0)
    assert float(setting.pi @ setting.token_kl.sum(axis=1)) == pytest.approx(float(whole))
    first, base = (jax.nn.log_softmax(x[0]) for x in (params, task.base))
    np.testing.assert_allclose(setting.token_kl[:, 0], jnp.exp(first) @ (first - base))


def test_the_best_number_is(policy):
    _, _, setting = policy
    form = penalties.forms(setting, 1.0, BETA)["over the vocabulary"]
    best = penalties.baselines(setting, form)["best number"]

    def variance(baseline):
        g = penalties.gradients(setting, form, baseline)
        return float(penalties.covariance(setting, g, g))

    assert variance(best) < min(variance(best - 0.01), variance(best + 0.01))


def test_the_page_has_what_is_summed(x64):
    """Of one policy of four."""
    setting = penalties.make_setting(task := tabular_task(0), penalties.on_the_way(task, 0.5))
    of_kl, of_objective = (penalties.cells(setting, *given) for given in ((0.0, 1.0), (1.0, BETA)))
    lines = [["3 tokens, half the way", n, *of_kl[n], *of_objective[n]] for n in of_kl]
    made = table([""], lines).splitlines()[2:]
    assert "\n".join(made) in PAGE.read_text(encoding="utf-8")
