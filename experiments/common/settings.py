"""What can be set on the command line of every experiment."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fjax import divergences
from fjax.runs.stages import Stage

from .arguments import FolderOrName, check_numbers
from .stages import count_steps, parse_filter_stage, parse_stages

ASSETS = Path(__file__).parents[1] / "assets"
BUILT_IN = ASSETS / "reviews-gpt2"

MINIMISED = {"rloo": "reverse_kl", "ppo": "reverse_kl", "filter_sft": "forward_kl"}
"""What the other algorithms are for."""


@dataclass(frozen=True)
class Settings:
    """Model, objective, optimiser and run folder: the same for all experiments."""

    model: FolderOrName = "built-in"
    """The model to align: built-in (3.8M parameters, film-review sentences), a local folder, or a
    name on the Hugging Face hub: a GPT-2, Llama, Mistral, Qwen2, Qwen3 or Gemma."""
    prefix: str | None = None
    """What every text continues, where there are no prompts; only what follows it is scored."""
    instruction: str | None = None
    """The same for a model that answers: what a user asks of it, by its chat template. Its answers
    are the texts."""
    start: FolderOrName | None = None
    """Where the policy begins, if not as the base model: a model aligned from it, such as the
    folder that a run exported. A model near another target of the same kind needs fewer steps to
    this one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation. Parameters and reductions are float32 either way; bfloat16 is for GPUs
    and TPUs."""
    mesh: str = ""
    """How several devices share the work, as in data=4,fsdp=2: rows of a batch are divided along
    data and fsdp; the matrices of the model, and what the optimiser keeps of them, along fsdp, for
    models that one device cannot hold; heads and hidden units along tensor. One size may be -1, for
    the devices that are left. Without it the first device does everything. A run may be resumed on
    another mesh."""
    distributed: bool = False
    """Join the processes that SLURM, Open MPI, Kubernetes or Cloud TPU has started, one or more a
    host. Each runs this command; together they need --mesh, and a --run-folder that all can
    reach."""
    coordinator: str | None = None
    """The same where none of these has started them: host:port of the first process, with
    --processes and --process."""
    processes: int | None = None
    """How many processes there are, with --coordinator."""
    process: int | None = None
    """The number of this one, from 0, with --coordinator."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters. In bfloat16 they, their gradient and what Adam keeps take half the memory,
    and changes below half a unit of a weight are lost."""
    remat: bool = False
    """Compute each block of the model again for its gradient rather than keep what is in it: a
    third more work in the update, for the memory of one block in place of all."""
    dry_run: bool = False
    """Load no weights and compute nothing: print parameters, the bytes that each device needs, and
    what the compiler says of the update and the sampler."""
    divergence: str = "jensen_shannon"
    """What is minimised, from the policy to the target: forward_kl, reverse_kl, total_variation,
    jensen_shannon, alpha=0.5 (0 is forward, 1 reverse KL, ½ twice the squared Hellinger distance),
    or any other of the library by its name. Reverse KL is infinite on a hard constraint: add
    --clip."""
    algorithm: Literal["fdpg", "rloo", "ppo", "filter_sft"] = "fdpg"
    """fdpg descends any divergence. rloo (REINFORCE with a leave-one-out baseline) and ppo (without
    a critic) maximise E[r] - β KL(π‖a), which is reverse KL to the target, on samples of the policy
    alone: what RLHF libraries do. filter_sft draws all its samples from the base model first, keeps
    what the target would (hits, or each by its weight exp(r/β)), and fine-tunes on that, until the
    likelihood of those held out no longer rises: forward KL. It draws as many samples as --steps of
    --samples would, and makes as many updates as --steps at most, or what a single one of --stages
    says."""
    clip: tuple[float, float] | None = None
    """Bounds (lowest highest) on f'. They bias the gradient, and make reverse KL usable on a hard
    constraint: the highest is what a violation costs, the lowest what a hit can earn. Try -8 8."""
    stages: tuple[str, ...] = ()
    """Draw in stages and learn many times from all that was drawn, each stage a word
    DIVERGENCE:SAMPLES:UPDATES, as in forward_kl:9600:80 forward_kl:6400:80 jensen_shannon:9600:120.
    Cover first, draw again from where that led, sharpen last. --divergence is what is reported and
    picks the model. Without stages every sample is used once, in one of --steps."""
    minibatch_size: int = 128
    """Samples of an update with --stages or filter_sft, from all that was drawn so far."""
    steps: int = 200
    """Gradient steps; --stages have a number of their own."""
    samples: int = 256
    """Samples a step."""
    base_fraction: float = 0.125
    """Share of them that is drawn from the base model. It keeps log Z right when the policy no
    longer covers the target, by bounding the importance weights; the off-policy form keeps the
    gradient exact. 0 draws from the policy alone; above 0 the base model has at least one sample,
    of every prompt where there are prompts."""
    proposal: Literal["policy", "adaptive"] = "policy"
    """Where the other samples come from: the policy, or a copy of it that is renewed only when the
    policy has come closer to the target by forward KL (KL-adaptive DPG, for --algorithm fdpg)."""
    proposal_every: int = 10
    """Steps between those checks, on the samples drawn since the last."""
    overlap: bool = False
    """Score each batch in Python while the device draws the next one, which is then of the policy
    one step back; the off-policy weights keep the gradient exact (for --algorithm fdpg). Worth it
    if scoring takes as long as drawing."""
    max_new_tokens: int = 40
    """Longest sample, in tokens; a sentence that is cut off there counts as it stands."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """sgd, without momentum, is for a target near the base: Adam moves every weight alike, by noise
    where there is no signal, which may cost more nats than the constraint itself."""
    learning_rate: float = 5e-4
    """Peak rate. With Adam, 1e-5 suits the real GPT-2; the small built-in model takes more."""
    warmup_steps: int = 10
    """Steps over which the rate rises from 0; with 0 or 1 the first step has the full rate."""
    decay: bool = False
    """Let the rate fall linearly to 0 at --steps, or over the last of --stages, which averages the
    noise of the last steps away. Without it the rate stays constant, and --resume may ask for more
    steps."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm when it is longer."""
    trainable: str | None = None
    """Only the parameters whose path has this regular expression in it move: "wte" the token
    embeddings, "h_3|ln_f" the last block of the built-in model, "bias" all biases. Without it all
    do. Fewer directions take up less noise. With --lora-rank: only those have adapters."""
    lora_rank: int | None = None
    """Train adapters of this rank (LoRA) in place of the weights: a change of low rank for each
    matrix, to which --trainable applies too. The exported model is whole. Adam wants about four
    times the rate: try --learning-rate 2e-3."""
    lora_alpha: float | None = None
    """The change counts this many times over the rank; without it, once."""
    lora_merge: bool = True
    """Add adapters up into a second copy of the weights, to sample, score and evaluate with. With
    --no-lora-merge they stay beside the weights, of which there is then one copy for policy and
    base model together; for models of a hundred million parameters and more it takes no longer."""
    microbatch_size: int | None = None
    """Samples that go through the policy at once in the update. Smaller needs less memory; the
    result is the same."""
    seed: int = 0
    """Seed of everything random."""
    eval_every: int = 50
    """Steps between evaluations on fresh samples."""
    eval_samples: int = 1024
    """Fresh samples of the policy in an evaluation, with prompts rounded up to the same number of
    each; those of the base model that log Z and the divergences also need come on top."""
    exact_samples: int | None = 256
    """Samples of the target itself to measure by, where they can be drawn: base samples that
    satisfy a constraint, or are accepted by a reward that has a bound. Then no figure rests on
    weights that may be wrong. Drawn once for a target, and never trained on; with prompts shared
    out among those that are evaluated on. None does without."""
    exact_draws: int = 32_768
    """Samples of the base model that they may take, at most."""
    exact_folder: Path = Path("runs/exact")
    """Where they are kept for all runs of the same target."""
    checkpoint_every: int = 50
    """Steps between checkpoints. Ctrl-C and SIGTERM save one, too."""
    stop_if_unsaved: bool = False
    """End the run when a checkpoint cannot be written, for the disk is full, say. Without it that
    is reported, and the run goes on: the next checkpoint may find room again."""
    stop_below: float | None = None
    """Stop once the divergence, as evaluated on fresh samples, is below this."""
    patience: int | None = None
    """Evaluations in a row without a new lowest divergence after which the run stops."""
    run_folder: Path | None = None
    """Where the run writes everything. Without it a new folder under runs/ is chosen, or with
    --resume the newest one is taken."""
    tensorboard: bool = False
    """Write all figures for TensorBoard too, and samples as a table, into the run folder."""
    wandb_project: str | None = None
    """Send all figures, and samples as a table, to this project of Weights & Biases, too."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline keeps them in the run folder, for `wandb sync`."""
    resume: bool = False
    """Go on with an interrupted run of the same configuration (--steps may be larger)."""
    resume_from: int | None = None
    """Go on from the checkpoint of this step in place of the newest, when that is damaged, say.
    Later ones are set aside, and what was written of later steps comes again. Needs no --resume
    beside it."""

    def __post_init__(self):
        check_numbers(self)
        try:
            divergences.by_name(self.divergence)
        except ValueError as error:
            raise ValueError(f"--divergence: {error}") from error
        if self.samples < 2:
            raise ValueError(
                "--samples must be at least 2: the leave-one-out baseline compares samples with "
                "others."
            )
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(
                f"--clip is the lowest and then the highest f', got {self.clip[0]:g} "
                f"{self.clip[1]:g}."
            )
        try:
            re.compile(self.trainable or "")
        except re.error as error:
            raise ValueError(
                f"--trainable must be a regular expression, got {self.trainable!r}: {error}."
            ) from error
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError("--lora-alpha is for adapters: give --lora-rank, or leave it out.")
        if self.prefix is not None and self.instruction is not None:
            raise ValueError("--prefix and --instruction both say what comes first; give one.")
        self._check_algorithm()
        self._check_stages()
        self._check_processes()

    def _check_processes(self):
        given = [self.coordinator, self.processes, self.process]
        if any(x is not None for x in given) and None in given:
            raise ValueError(
                "--coordinator, --processes and --process are given together: host:port of the "
                "first process, how many there are, and which this is, from 0."
            )
        if self.processes is not None and not 0 <= (self.process or 0) < self.processes:
            raise ValueError(
                f"--process counts from 0 to --processes - 1, got {self.process} of "
                f"{self.processes}."
            )
        if self.is_distributed and not (self.mesh and self.run_folder):
            raise ValueError(
                "Several processes need --mesh, such as data=-1 for all their devices, and a "
                "--run-folder that all of them can reach."
            )

    @property
    def is_distributed(self) -> bool:
        """Whether there are several processes."""
        return self.distributed or self.coordinator is not None

    def _check_algorithm(self):
        if self.algorithm != "fdpg":
            self._check_other()
        if self.overlap and self.proposal == "adaptive":
            raise ValueError("--overlap and --proposal adaptive cannot be combined; leave one out.")

    def _check_other(self):
        """What the other algorithms are for, and what they cannot have."""
        minimised, filters = MINIMISED[self.algorithm], self.algorithm == "filter_sft"
        if self.divergence != minimised:
            raise ValueError(
                f"--algorithm {self.algorithm} minimises {minimised.replace('_kl', ' KL')}: give "
                f"--divergence {minimised}, or take fdpg for {self.divergence}."
            )
        needs = "draws once, from the base model" if filters else "needs the policy's own samples"
        for name, value in (
            ("clip", self.clip),
            ("overlap", self.overlap),
            ("proposal adaptive", self.proposal == "adaptive"),
            ("stages", self.stages and not filters),
        ):
            if value:
                raise ValueError(f"--{name} is for --algorithm fdpg; {self.algorithm} {needs}.")
        if filters and self.start is not None:
            raise ValueError(
                "--algorithm filter_sft draws from the base model and begins as it: leave --start "
                "out."
            )

    def _check_stages(self):
        adaptive = self.proposal == "adaptive"
        if self.schedule and (self.overlap or adaptive):
            raise ValueError(
                f"--stages say what is drawn from and when: leave out "
                f"{'--proposal adaptive' if adaptive else '--overlap'}."
            )

    @property
    def resumes(self) -> bool:
        """Whether the run goes on with what is there."""
        return self.resume or self.resume_from is not None

    @property
    def schedule(self) -> tuple[Stage, ...]:
        """The stages of the run; none if every sample is used once."""
        if self.algorithm == "filter_sft":
            return (parse_filter_stage(self.stages, self.steps * self.samples, self.steps),)
        return parse_stages(self.stages)

    @property
    def all_steps(self) -> int:
        """Steps of the whole run, of whatever kind."""
        stages = self.schedule
        return count_steps(stages, self.samples) if stages else self.steps

    @property
    def base_samples(self) -> int:
        """Samples of a step that come from the base model, at least one where any are asked for;
        the policy has the rest."""
        if self.algorithm != "fdpg" or self.base_fraction == 0:
            return 0
        return min(max(round(self.base_fraction * self.samples), 1), self.samples - 1)

    @property
    def objective(self) -> str:
        """What is optimised, in a word."""
        return self.divergence if self.algorithm == "fdpg" else self.algorithm

    @property
    def title(self) -> str:
        """The same as part of a folder's name."""
        return self.objective.replace("=", "-")


def as_json(config) -> dict:
    """A configuration as plain values, nested settings included."""
    return {
        k: str(v) if isinstance(v, Path) else v
        for k, v in _flat(dataclasses.asdict(config)).items()
    }


def _flat(nested: dict) -> dict:
    flat = {}
    for key, value in nested.items():
        flat |= (
            _flat(value)
            if isinstance(value, dict)
            else {key: list(value) if isinstance(value, tuple) else value}
        )
    return flat
