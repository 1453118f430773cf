"""RLHF's J = E[r] - β KL(π‖a): the variance of its gradient, by how KL is estimated.

The divergence of two models is the expected sum of those of their next-token distributions, which
are known without noise. All is summed over a small space, with samples of the policy.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax.estimators import log_mixture

from .world import (
    LENGTH,
    Task,
    bigram_task,
    digits,
    mean_by_prefix,
    same_prefix,
    table,
    tabular_task,
    token_log_probs,
)

BETA = 0.2
LONGER = 5


class Setting(NamedTuple):
    """A policy and its base model, with a reward of 1 for what meets the constraint.

    Attributes:
        pi: probability of each sequence, ``[S]``.
        rewards: r, ``[S]``.
        log_ratio: log π/a of each token, ``[S, T]``, 0 after the end.
        scores: ∇log π of each token, ``[S, T, P]``.
        token_kl: KL(π(·|x_<t)‖a(·|x_<t)), over the whole vocabulary, ``[S, T]``.
        token_kl_gradients: its gradient, the prefix held fixed, ``[S, T, P]``.
        same: see `same_prefix`.
    """

    pi: jax.Array
    rewards: jax.Array
    log_ratio: jax.Array
    scores: jax.Array
    token_kl: jax.Array
    token_kl_gradients: jax.Array
    same: jax.Array


class Form(NamedTuple):
    """A gradient Σ_t c_t ∇log π(x_t|x_<t) + d of one sample.

    Attributes:
        charges: c, ``[S, T]``.
        direct: d, ``[S, P]``.
    """

    charges: jax.Array
    direct: jax.Array


def rewards_of(task: Task) -> jax.Array:
    """1 for what meets the constraint."""
    return jnp.isfinite(task.log_p).astype(task.log_a.dtype)


def on_the_way(task: Task, way: float) -> jax.Array:
    """Parameters of (1 - way) a + way p with p ~ a exp(r/β), or as near to it as can be."""
    log_p = jax.nn.log_softmax(task.log_a + rewards_of(task) / BETA)
    return task.nearest(log_mixture(task.log_a, log_p, base_fraction=way))


def adrift(task: Task, seed: int) -> jax.Array:
    """Parameters that left the base model in no direction that the reward knows."""
    return task.base + 0.5 * np.random.default_rng(seed + 1).normal(size=task.base.shape)


def make_setting(task: Task, params: jax.Array) -> Setting:
    """One policy."""
    token_log_pi = partial(token_log_probs, task.log_prob_fn, space=task.space)
    token_log_a, same = token_log_pi(task.base), same_prefix(task.space)

    def token_kl(params):
        found = token_log_pi(params)
        return mean_by_prefix(found - token_log_a, jnp.exp(found.sum(axis=1)), same)

    log_pi = token_log_pi(params)
    flat = (*log_pi.shape, -1)
    scores, of_kl = (jax.jacfwd(f)(params).reshape(flat) for f in (token_log_pi, token_kl))
    pi, log_ratio = jnp.exp(log_pi.sum(axis=1)), log_pi - token_log_a
    return Setting(pi, rewards_of(task), log_ratio, scores, token_kl(params), of_kl, same)


def to_go(values: jax.Array) -> jax.Array:
    """Of each position the sum from it on."""
    return jnp.cumsum(values[:, ::-1], axis=1)[:, ::-1]


def forms(setting: Setting, reward: float, beta: float) -> dict[str, Form]:
    """Name -> gradient of reward · E[r] - β KL, whose estimates are all right on average but the
    last."""
    earned = reward * jnp.broadcast_to(setting.rewards[:, None], setting.log_ratio.shape)
    whole = setting.log_ratio.sum(axis=1, keepdims=True)
    later = to_go(setting.token_kl) - setting.token_kl
    pathwise = -beta * setting.token_kl_gradients.sum(axis=1)
    nothing = jnp.zeros_like(pathwise)
    return {
        "log π/a of the sequence": Form(earned - beta * whole, nothing),
        "log π/a from the token on": Form(earned - beta * to_go(setting.log_ratio), nothing),
        "over the vocabulary": Form(earned - beta * later, pathwise),
        "over the vocabulary, prefix held fixed": Form(earned, pathwise),
    }


def gradients(setting: Setting, form: Form, baseline) -> jax.Array:
    """Of one sample each, ``[S, P]``; the baseline is a number, or ``[S, T]``."""
    counted = form.charges - baseline
    return jnp.einsum("st,stp->sp", counted, setting.scores) + form.direct


def covariance(setting: Setting, x: jax.Array, y: jax.Array) -> jax.Array:
    """Its trace, of one sample."""
    of_x, of_y = (z - (setting.pi @ z)[None] for z in (x, y))
    return jnp.sum(setting.pi @ (of_x * of_y))


def baselines(setting: Setting, form: Form) -> dict[str, jax.Array]:
    """The number of the smallest variance, and the mean of the charges after each prefix."""
    plain, pulls = gradients(setting, form, 0.0), setting.scores.sum(axis=1)
    number = covariance(setting, plain, pulls) / covariance(setting, pulls, pulls)
    by_prefix = mean_by_prefix(form.charges, setting.pi, setting.same)
    return {"best number": number, "critic": by_prefix}


def cells(setting: Setting, reward: float, beta: float) -> dict[str, list[str]]:
    """Name of the form -> its variance with each baseline, in units of the true gradient's square;
    the bias is that of the mean."""
    made = forms(setting, reward, beta)
    true = setting.pi @ gradients(setting, made["log π/a of the sequence"], 0.0)
    square, shown = jnp.sum(true**2), {}
    for name, form in made.items():
        found = [gradients(setting, form, b) for b in baselines(setting, form).values()]
        bias = float(jnp.sqrt(jnp.sum((setting.pi @ found[0] - true) ** 2) / square))
        note = f", bias {100 * bias:.0f} %" if bias > 1e-9 else ""
        shown[name] = [digits(float(covariance(setting, g, g) / square)) + note for g in found]
    return shown


def table_of_penalties(seed: int) -> str:
    """Markdown."""
    short, longer = tabular_task(seed), bigram_task(seed, LONGER)
    settings = {
        f"{LENGTH} tokens, half the way": make_setting(short, on_the_way(short, 0.5)),
        f"{LENGTH} tokens, 90 % of it": make_setting(short, on_the_way(short, 0.9)),
        f"{LONGER} tokens, half the way": make_setting(longer, on_the_way(longer, 0.5)),
        f"{LONGER} tokens, adrift": make_setting(longer, adrift(longer, seed)),
    }
    lines = []
    for place, setting in settings.items():
        of_kl, of_objective = cells(setting, 0.0, 1.0), cells(setting, 1.0, BETA)
        lines += [[place, name, *of_kl[name], *of_objective[name]] for name in of_kl]
    kinds = [f"{what}, {b}" for what in ("∇KL", "∇J") for b in ("best number", "critic")]
    return table(["policy", "KL by", *kinds], lines)
