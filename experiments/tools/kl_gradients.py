"""Writes docs/kl_gradients.md, "Is your KL gradient right?":
python -m experiments kl_gradients --help.

Nothing is sampled: each loss form is summed over every sequence of a small space, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax import divergences, enumeration, policy_gradients
from fjax.runs.endings import leave
from fjax.runs.folder import write_text

from ..common.arguments import check_numbers, check_output
from ..common.command import run

Loss = Callable[..., jax.Array]
"""(log_pi, log_a, log_q) of samples -> one loss a sample."""

LARGEST = 2**12
"""Sequences that are listed."""


@dataclass(frozen=True)
class Config:
    """Sum the gradients of popular KL losses over a small space and compare them with the true
    ones.

    Examples:

        python -m experiments kl_gradients
        python -m experiments kl_gradients --output docs/kl_gradients.md
    """

    output: Path | None = None
    """The page is written here; without it, printed."""
    vocab_size: int = 3
    """Tokens, the end of the sequence among them."""
    max_tokens: int = 3
    """Longest sequence."""
    seed: int = 0
    """Seed of policy, base model and the distribution that off-policy samples are from."""

    def __post_init__(self):
        check_numbers(self)
        if self.vocab_size**self.max_tokens > LARGEST:
            raise ValueError(
                f"--vocab-size {self.vocab_size} and --max-tokens {self.max_tokens} make a space "
                f"that is too large to list: take sizes with vocab_size ** max_tokens up to "
                f"{LARGEST}."
            )


class World(NamedTuple):
    """A policy, its base model and an older policy, over a space listed whole."""

    log_prob_fn: Callable
    params: jax.Array
    space: enumeration.Space
    log_a: jax.Array
    log_q: jax.Array


def make_world(config: Config) -> World:
    """Logits of scale 1 for the base, of ½ for the policy's way from it, and of ¼ for the old
    policy's from the new."""
    rng = np.random.default_rng(config.seed)
    space = enumeration.sequences(config.vocab_size, config.max_tokens, eos_id=0)
    log_prob_fn, prefixes = enumeration.tabular_log_prob_fn(config.vocab_size, config.max_tokens)
    base, policy, old = (
        jnp.asarray(rng.normal(size=(prefixes, config.vocab_size))) for _ in range(3)
    )
    params = base + 0.5 * policy
    log_a, log_q = (log_prob_fn(logits, *space) for logits in (base, params + 0.25 * old))
    return World(log_prob_fn, params, space, log_a, log_q)


def k(name: str) -> Loss:
    """The estimators as they stand in loss functions: differentiable."""
    forms = {
        "k1": lambda log_pi, log_a: log_pi - log_a,
        "k2": lambda log_pi, log_a: 0.5 * (log_pi - log_a) ** 2,
        "k3": lambda log_pi, log_a: jnp.expm1(log_a - log_pi) - (log_a - log_pi),
    }
    return lambda log_pi, log_a, log_q: forms[name](log_pi, log_a)


def with_ratio(loss: Loss) -> Loss:
    """Times π/q, through which the gradient passes."""
    return lambda log_pi, log_a, log_q: jnp.exp(log_pi - log_q) * loss(log_pi, log_a, log_q)


def in_reward(loss: Loss, *, ratio: bool) -> Loss:
    """As a cost in the reward: stopped, before the log-probability, off-policy with the stopped
    ratio."""

    def scored(log_pi, log_a, log_q):
        weight = jnp.exp(log_pi - log_q) if ratio else 1.0
        return jax.lax.stop_gradient(weight * loss(log_pi, log_a, log_q)) * log_pi

    return scored


def penalty(divergence: divergences.FDivergence, *, off_policy: bool) -> Loss:
    """What fjax offers."""

    def loss(log_pi, log_a, log_q):
        return policy_gradients.divergence_penalty(
            log_pi, log_a, log_q if off_policy else None, divergence=divergence
        )

    return loss


def expected(world: World, loss: Loss, *, off_policy: bool) -> jax.Array:
    """The gradient of the loss, summed over the space."""
    log_q = (
        world.log_q
        if off_policy
        else jax.lax.stop_gradient(world.log_prob_fn(world.params, *world.space))
    )

    @jax.jit
    def gradient(log_a, log_q):
        return enumeration.expected_gradient(loss, *world[:3], log_a, log_q)

    return gradient(world.log_a, log_q)


def of(world: World, divergence: divergences.FDivergence) -> jax.Array:
    """The true gradient."""
    return enumeration.exact_gradient(*world[:3], world.log_a, divergence=divergence)


def error(found: jax.Array, true: jax.Array) -> str:
    """The norm of the difference, in percent of the true gradient's."""
    relative = float(jnp.linalg.norm(found - true) / jnp.linalg.norm(true))
    return "0" if relative < 1e-9 else f"{100 * relative:.0f} %"


def both(world: World, true: jax.Array, make: Callable[[bool], Loss]) -> tuple[str, str]:
    """Errors of what ``make(off_policy)`` gives, on-policy and off-policy."""
    on, off = (
        error(expected(world, make(off_policy), off_policy=off_policy), true)
        for off_policy in (False, True)
    )
    return on, off


def rows(world: World) -> list[tuple[str, str, str]]:
    """(form, error on-policy, error off-policy), against ∇KL(π‖a)."""
    true = of(world, divergences.reverse_kl())
    table = []
    for name in ("k1", "k2", "k3"):
        plain, ratio = k(name), with_ratio(k(name))
        table.append((f"{name}, differentiated", *both(world, true, lambda _, loss=plain: loss)))
        table.append(
            (f"{name} × π/q, differentiated", *both(world, true, lambda _, loss=ratio: loss))
        )
    for name in ("k1", "k2", "k3"):
        found = both(
            world, true, lambda off_policy, loss=k(name): in_reward(loss, ratio=off_policy)
        )
        table.append((f"{name} in the reward", *found))
    found = both(
        world, true, lambda off_policy: penalty(divergences.reverse_kl(), off_policy=off_policy)
    )
    return [*table, ("`fjax.policy_gradients.divergence_penalty`", *found)]


def other_divergences(world: World) -> list[tuple[str, str, str]]:
    """The penalty for other f, each against its own true gradient."""
    made = (
        divergences.forward_kl(),
        divergences.jensen_shannon(),
        divergences.total_variation(),
        divergences.squared_hellinger(),
        divergences.alpha_divergence(0.3),
    )
    return [
        (
            f.name,
            *both(world, of(world, f), lambda off_policy, f=f: penalty(f, off_policy=off_policy)),
        )
        for f in made
    ]


def table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """Markdown."""
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in [header, ("---",) * len(header), *lines]
    )


def page(config: Config) -> str:
    """The whole document."""
    with jax.enable_x64(True):
        world = make_world(config)
        k3_is_forward = error(
            expected(world, k("k3"), off_policy=False), of(world, divergences.forward_kl())
        )
        first, second = rows(world), other_divergences(world)
    columns = ("loss", "samples from π", "samples from an older q")
    return PAGE.format(
        space=len(world.space.tokens),
        vocab_size=config.vocab_size,
        max_tokens=config.max_tokens,
        seed=config.seed,
        kl=table(columns, first),
        k3_is_forward=k3_is_forward,
        others=table(("f", *columns[1:]), second),
    )


def kl_gradients(config: Config) -> int:
    """Prints or writes the page."""
    check_output(config.output, "--output")
    text = page(config)
    if config.output is None:
        print(text, end="")
    else:
        write_text(config.output, text)
        print(f"Written to {config.output}.")
    return 0


PAGE = """# Is your KL gradient right?

RLHF adds a penalty for leaving the base model, β KL(π‖a), and estimates it from samples by one of

    k1 = log π/a        k2 = ½ (log π/a)²        k3 = a/π - 1 - log a/π

As *values* under x ~ π, k1 and k3 are unbiased. As *losses* they are something else: a sample's
distribution depends on the parameters as well, and differentiating the estimate does not see that.
What their gradients are on average can be summed exactly on a small space. Here are their errors,
the norm of the difference in percent of the norm of the true ∇KL(π‖a), over all {space} sequences
of {vocab_size} tokens of length at most {max_tokens} (tabular policy, seed {seed}, float64):

{kl}

"Differentiated" is what a loss does whose KL term is the estimator. "In the reward" subtracts it,
stopped, from the reward of a policy-gradient loss, off-policy with the importance ratio. An error
of 100 % for k1 is a gradient of exactly zero.

- **k1 as a loss does nothing**: its expected gradient is E_π[∇log π] = 0. In the reward it is
  exact.
- **k2 as a loss is right on-policy only.** Its value is biased, its gradient is not; with a ratio,
  off-policy, it is wrong.
- **k3 as a loss, on-policy, is the gradient of the *other* KL**, ∇KL(a‖π): against that its error
  is {k3_is_forward}. So the published GRPO objective covers modes of the base where it means to
  stay near it. In the reward it is wrong, too.
- **With a ratio that is differentiated**, k1 and k3 are right, wherever the samples are from.
- **Without a ratio, off-policy, none is.** That is every step after the first on one batch.

One line does it for every f, on- and off-policy: stop[(π/q) f'(π/a)]·log π, which is
`fjax.surrogate_loss` with p = a. With the value of the never negative estimator to go with it, it
is `fjax.policy_gradients.divergence_penalty`. For other f, each against its own true gradient:

{others}

    python -m experiments kl_gradients --output docs/kl_gradients.md

makes this page; `tests/test_catalogue_gradients.py::test_26_*` asserts it to 1e-10.
"""


main = partial(run, Config, kl_gradients, name="kl_gradients")

if __name__ == "__main__":
    leave(main())
