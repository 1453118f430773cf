"""What every experiment's command line has in common, and the objects that those choices stand for."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import optax

import fjax

BUILT_IN = Path(__file__).parent / "assets" / "reviews-gpt2"

DIVERGENCES = {
    "forward_kl": fjax.forward_kl,
    "reverse_kl": fjax.reverse_kl,
    "total_variation": fjax.total_variation,
    "jensen_shannon": fjax.jensen_shannon,
}


@dataclass(frozen=True)
class Settings:
    """Model, objective, optimiser and run folder: the same for all experiments."""

    model: str = "built-in"
    """The model to align: built-in (3.8M parameters, film-review sentences), a local folder, or a name on the Hugging
    Face hub such as gpt2, distilgpt2, gpt2-xl."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation. Parameters and reductions are float32 either way; bfloat16 is for GPUs and TPUs."""
    divergence: Literal["forward_kl", "reverse_kl", "total_variation", "jensen_shannon"] = "jensen_shannon"
    """What is minimised, from the policy to the target. Reverse KL is infinite on a hard constraint: add --clip."""
    clip: tuple[float, float] | None = None
    """Bounds (lowest highest) on f'. They bias the gradient, and make reverse KL usable on a hard constraint: the
    highest is what a violation costs, the lowest what a hit can earn. Try -8 8."""
    steps: int = 200
    """Gradient steps."""
    samples: int = 256
    """Samples a step."""
    base_fraction: float = 0.125
    """Share of them that is drawn from the base model. It keeps log Z right when the policy no longer covers the target,
    by bounding the importance weights; the off-policy form keeps the gradient exact. 0 draws from the policy alone."""
    max_new_tokens: int = 40
    """Longest sample, in tokens; a sentence that has not ended by then counts as it stands."""
    learning_rate: float = 5e-4
    """Peak rate of Adam. 1e-5 is right for the real GPT-2; the small built-in model takes more."""
    warmup_steps: int = 10
    """Steps over which the rate rises from 0; constant after that, so that --resume may ask for more steps."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm when it is longer."""
    microbatch_size: int | None = None
    """Samples that go through the policy at once in the update. Smaller needs less memory; the result is the same."""
    seed: int = 0
    """Of everything random."""
    eval_every: int = 50
    """Steps between evaluations on fresh samples."""
    eval_samples: int = 1024
    """Fresh samples of an evaluation, rounded up to whole batches."""
    checkpoint_every: int = 50
    """Steps between checkpoints. Ctrl-C and SIGTERM save one, too."""
    stop_below: float | None = None
    """Stop once the divergence, as evaluated on fresh samples, is below this."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a new lowest divergence."""
    run_folder: Path | None = None
    """All that the run writes. Without it a new folder under runs/ is made up, or with --resume the newest one taken."""
    resume: bool = False
    """Go on with an interrupted run of the same configuration (--steps may be larger)."""

    def __post_init__(self):
        for name in ("steps", "samples", "max_new_tokens", "eval_every", "eval_samples", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"--patience must be at least 1, got {self.patience}.")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"--divergence must be one of {', '.join(DIVERGENCES)}; got {self.divergence!r}.")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning-rate must be positive, got {self.learning_rate}.")
        if self.samples < 2:
            raise ValueError("--samples must be at least 2: the leave-one-out baseline compares samples with others.")
        if not 0 <= self.base_fraction <= 0.9:
            raise ValueError(f"--base-fraction must be in [0, 0.9], got {self.base_fraction}.")

    @property
    def base_samples(self) -> int:
        """Samples of a step that come from the base model; the policy has the rest."""
        return round(self.base_fraction * self.samples)


def make_divergence(settings: Settings) -> fjax.FDivergence:
    """The f of ``--divergence``."""
    return DIVERGENCES[settings.divergence]()


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Adam after a warm-up, on the clipped gradient."""
    schedule = optax.linear_schedule(0.0, settings.learning_rate, settings.warmup_steps)
    # The first step is taken at a rate above zero.
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm), optax.adam(lambda count: schedule(count + 1), b2=0.98)
    )


def as_json(config) -> dict:
    """A configuration as plain values, nested settings included."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in _flat(dataclasses.asdict(config)).items()}


def _flat(nested: dict) -> dict:
    flat = {}
    for key, value in nested.items():
        flat |= _flat(value) if isinstance(value, dict) else {key: list(value) if isinstance(value, tuple) else value}
    return flat
