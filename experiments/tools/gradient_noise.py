"""Writes docs/noise.md, what each means against noise is worth:
python -m experiments gradient_noise --help.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from fjax.runs.endings import leave
from fjax.runs.folder import write_text

from ..common.arguments import check_numbers, check_output
from ..common.command import run
from .noise.baselines import BATCHES, table_of_baselines
from .noise.penalties import BETA, LONGER, table_of_penalties
from .noise.training import SEEDS, STEPS, table_of_beta, tables_of_alpha
from .noise.world import BASE_SAMPLES, LENGTH, SAMPLES, tabular_task


@dataclass(frozen=True)
class Config:
    """Variance of the gradient per sample drawn, with each baseline, control variate, estimate of Z
    and of KL; and whole runs with means of parameters, and with an α or β that moves.

    Examples:

        python -m experiments gradient_noise
        python -m experiments gradient_noise --output docs/noise.md
    """

    output: Path | None = None
    """The page is written here; without it, printed."""
    seed: int = 0
    """Seed of the base model, and of the batches that are drawn."""

    def __post_init__(self):
        check_numbers(self)


def page(config: Config) -> str:
    """The whole document."""
    seed = config.seed
    with jax.enable_x64(True):
        task = tabular_task(seed)
        rate = float(jnp.exp(task.log_a)[jnp.isfinite(task.log_p)].sum())
        averages, alphas = tables_of_alpha(seed)
        return PAGE.format(
            space=len(task.log_a), rate=100 * rate, samples=SAMPLES, base=BASE_SAMPLES,
            batches=BATCHES, seed=seed, beta=BETA, length=LENGTH, longer=LONGER, steps=STEPS,
            seeds=SEEDS, drawn=STEPS * SAMPLES, baselines=table_of_baselines(seed),
            penalties=table_of_penalties(seed), averages=averages, alphas=alphas,
            betas=table_of_beta(seed),
        )  # fmt: skip


def gradient_noise(config: Config) -> int:
    """Prints or writes the page."""
    check_output(config.output, "--output")
    text = page(config)
    if config.output is None:
        print(text, end="")
    else:
        write_text(config.output, text)
        print(f"Written to {config.output}.")
    return 0


PAGE = """# How noisy is the gradient?

How many samples does it take until the standard error of the gradient is as long as the gradient
itself? That is N tr Cov[ĝ]/‖∇D‖², the variance per sample drawn. Here it is over all {space}
sequences of a small space: a target a·b whose constraint the base model meets {rate:.1f} % of the
time, {samples} samples a batch of which {base} are of the base model, a tabular policy that is the
base model or half the way to the target (seed {seed}, float64).

{baselines}

Rows are with fixed numbers of both parts and the true Z unless they say otherwise. A bias is that
of the mean, in percent of the gradient; rows without one have none. Leave-one-out, self-normalised
and estimated Z are measured on {batches:,} batches (variances to about 2 %, biases to about a
percent where the variance is 100); all others are sums, and exact.

What it says, for seed 0:

- **Being nearer to the target is what helps**: half the way a sample tells nearly ten times as much
  as at the base model. Whatever the baseline, what is rare is a sample with P > 0.
- **Some baseline is needed, and any number will do.** Half the way, forward KL has 2.4 times the
  variance without. Leave-one-out, the running mean and the self-normalised one are all within a few
  percent of the E[f'] that they estimate, and that one of the best number there is.
- **Fixed numbers of both parts, and control variates of the mixture, are worth nothing here**:
  π/q - 1 and a/q - 1 are one control variate, and B, which is multiplied by π/q, has done its work.
- **A Z of the same batch need not be cross-fitted.** Half the way it costs 5 to 14 % in variance,
  and at the base model it takes some away, as its error and the gradient's go together. Its bias,
  up to 9 % in so small batches, a running estimate does not have. Cross-fitted it costs more, and
  half a batch often has no hit: then there is no Z, and no gradient.
- **A critic is worth a quarter, at the most.** A baseline of each prefix leaves the gradient
  unbiased whatever it says, off-policy too, for the ratio is that of the whole sequence. With the
  exact mean of f' after the prefix, which is what a critic on the hidden states learns, 22 to 26 %
  of the variance go; with the best numbers there are, 26 %. (With seed 1 it is 35 %.) A critic that
  has yet to learn has less, and it is one more thing to train.

At the base model every f has the same direction for a constraint, for π/p is Z or infinite there:
centred, the columns are one.

## The penalty of RLHF, token by token

KL(π‖a) is the expected sum of KL(π(·|x_<t)‖a(·|x_<t)), and the sum over the whole vocabulary is
there at every prefix that is sampled. Most of the noise of its gradient can be taken away with it:
what is left is Σ_t ∇KL_t, and for the effect of a token on later prefixes (Σ_(s>t) KL_s)·∇log π_t.

What does that do for J = E[r] - β KL(π‖a), with r = 1 where the constraint is met and β = {beta}?
Variances are of one sample of the policy, in units of the square of the gradient that the column is
of. The policies: tables of {length} tokens as above and bigrams of {longer}, on the way to the
target a·exp(r/β), which a table can be and bigrams cannot; and bigrams that have drifted from the
base in a direction that the reward does not know. The baseline is the best number, or the mean
after each prefix, which a critic learns. All are sums, and exact.

{penalties}

What it says, for seed 0:

- **Of KL's own noise, nine tenths go**: half the way 11.1 becomes 1.21, and 8.41 for the reward to
  go.
- **J's gets larger**: half the way six times, at 90 % a hundred times, of the bigrams three times.
  Where π = p, r - β log π/a is one number for all sequences. On the way there log π/a is high where
  r is, and the noise of the one takes away that of the other; who estimates KL without noise keeps
  all of the reward's. (In the table log π/a has two values as r has, so both gradients have the
  same direction and their first rows are equal.)
- **The reward to go has the same fault with one number for a baseline**: the log-ratio before the
  token is missed. With a critic it is the whole sequence's, digit for digit.
- **Where the policy has drifted, the sum over the vocabulary takes away 4 to 8 %** of J's noise
  (with seed 1, 14 to 18 %).
- **The prefix held fixed**, as where KL per token is simply a term of the loss, is a bias of 11 to
  83 % of ∇KL.

So fjax has no such estimator. Take -β log π/a of the whole sequence in the reward, as
`fjax.training` does, or `divergence_penalty` of whole sequences, of the same samples as the reward.

## Means of parameters, and a rate that falls

{steps} steps of Adam with {samples} samples each, {drawn:,} together; leave-one-out that is told
the strata, and the true Z. How far above the least there is does the divergence end, by a sum? For
the table the least is 0, for bigrams it is not. The columns of KL descend forward KL, those of D_½
the α-divergence of ½. Mean ± standard error of {seeds} seeds, at the best of the rates 0.01, 0.03,
0.1 and 0.3.

{averages}

- **Where the policy cannot be the target, noise stays**, and at a constant rate it keeps moving.
  The mean of the last half of the steps leaves 40 % of the excess, a rate that falls to 0 about
  half, and both are no better than one. A falling rate is there: `--decay`.
- **Where it can be, neither pays.** There the noise goes by itself: at π = p all f'(π/p) that are
  drawn are equal, and a baseline takes them away. What is left is the way, and both make it longer.

## An α or a β that moves

The last parameters of the same runs, beside those of an α that is 0 for a quarter of the steps, and
in the next half moves to ½. Each at the best of the rates, constant or falling:

{alphas}

For RLHF's objective, KL(π‖p) with p ~ a·exp(r/β), the table at constant rates:

{betas}

- **An α that moves gains nothing that the errors do not cover.** In the table it ends within two
  standard errors of both that stay, and with bigrams within two of α = ½ by the measure of that.
- **A β that falls helps who learns too slowly.** At a rate of 0.03 it leaves 57 %. At the best rate
  it ends 2.5 times as far away: the steps that went to other targets are missing at the end.

    python -m experiments gradient_noise --output docs/noise.md

makes this page.
"""


main = partial(run, Config, gradient_noise, name="gradient_noise")

if __name__ == "__main__":
    leave(main())
