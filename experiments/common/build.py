"""From settings to what they stand for: model, optimiser, tuner, collector, run. The one place
where a command line becomes values of the library.
"""

import dataclasses
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import fjax
from fjax import rollouts
from fjax._trees import count_numbers, find_leaves, name_leaves
from fjax.adapters import adapt, attach_lora, init_lora, merge_lora
from fjax.divergences import FDivergence, by_name
from fjax.estimators import known_log_z
from fjax.evaluation import TextTarget
from fjax.models import LanguageModel, save_adapters
from fjax.rollouts import Collector, Contexts
from fjax.runs import Display, RunError, Stepper, align, open_run
from fjax.runs.numbered import new_folder, newest_folder
from fjax.runs.running import ADAPTERS_KEY, TARGET_KEY
from fjax.runs.stages import staged
from fjax.sharding import check_rows, make_mesh, place
from fjax.surrogates import self_normalized
from fjax.training import Tuner, ppo_tuner, rloo_tuner
from fjax.types import Params

from . import command
from .cards import base_card
from .exact import exact_of
from .inputs import input_digests
from .prompts import chat_ids, start_id, token_ids
from .settings import Settings, as_json
from .stages import FILTER_LOOK_EVERY, LOOK_EVERY, UPDATES_PER_STEP
from .task import Built, Task, Trained

REPORTED = ("forward_kl", "reverse_kl", "total_variation", "jensen_shannon")
"""The divergences of every evaluation; another one is reported where it is trained on."""

PPO_EPOCHS, PPO_MINIBATCHES = 2, 4
"""Of each batch of samples, with ``--algorithm ppo``."""


def main_of(task: Task) -> Callable[[], int]:
    """Its command."""
    return partial(command.run, task.config, partial(run_task, task), name=task.name)


def run_task(task: Task, config: Any) -> int:
    """Runs a task from the command line's choices to the exported model; returns the exit status.

    Raises:
        RunError: for whatever the user can put right.
    """
    settings: Settings = config.settings
    if settings.dry_run:
        from .dry_run import dry_run  # which is made of what is here

        return dry_run(task, config, Display())
    make_target = task.make_target(config)  # what is wrong with it is said before minutes are spent
    display = Display()
    display.say("Loading the model.")
    model = load_model(settings)
    begun = None if settings.start is None else load_aligned(settings, model, settings.start)
    contexts = contexts_of(task, config, model)
    built = make_built(settings, model, contexts, display, begun=begun)
    values, title = as_json(config) | describe_trained(settings, built), task.title(config)
    folder, ours = choose_folder(settings, task.name, title)
    digests = input_digests(config, model, begun)
    opened = open_run(
        folder,
        values,
        resume=settings.resumes,
        digests=digests,
        command=shlex.join(command.called(task.name)),
        ours=ours,
    )
    with opened as run:
        target = make_target(built)
        stepper = task.make_stepper
        result = align(
            model,
            target,
            stepper(config, built) if stepper else make_mover(built, target, contexts),
            built.collector,
            folder=run,
            steps=settings.all_steps,
            divergences=reported_divergences(settings),
            objective=settings.divergence,
            seed=settings.seed,
            initial=built.trained.initial,
            policy_of=built.trained.policy_of,
            save_trained=save_trained(settings, model),
            proposal_every=settings.proposal_every if settings.proposal == "adaptive" else None,
            overlap=settings.overlap,
            eval_every=settings.eval_every,
            eval_samples=settings.eval_samples,
            checkpoint_every=settings.checkpoint_every,
            stop_below=settings.stop_below,
            patience=settings.patience,
            resume_from=settings.resume_from,
            stop_if_unsaved=settings.stop_if_unsaved,
            exact=exact_of(config, built, target, digests),
            loggers=loggers(settings),
            base_card=base_card(settings.model),
            title=title,
            display=display,
        )
    return result.status


def contexts_of(task: Task, config: Any, model: LanguageModel) -> Contexts | None:
    """The prompts of a run that has some.

    Raises:
        RunError: if they cannot be used, or one more is given that all texts continue.
    """
    contexts = None if task.make_contexts is None else task.make_contexts(config, model)
    for name in ("prefix", "instruction"):
        given = getattr(config.settings, name) is not None
        if given and (contexts is not None or task.make_stepper is not None):
            raise RunError(
                f"--{name} is what all texts continue where there are no prompts; this run of "
                f"{task.name} has some. Leave it out."
            )
    return contexts


def make_built(
    settings: Settings,
    model: LanguageModel,
    contexts: Contexts | None,
    display: Display,
    *,
    begun: LanguageModel | None = None,
) -> Built:
    """What there is to make a target with; the policy begins as ``begun``, or as the base model."""
    key = jax.random.fold_in(jax.random.key(settings.seed), TARGET_KEY)
    collector = make_collector(settings, model, contexts)
    trained = make_trained(settings, (begun or model).params)
    return Built(settings, model, collector, key, display, trained)


def make_trained(settings: Settings, params: Params) -> Trained:
    """What a run trains that begins with these parameters: themselves, or adapters of them.

    Raises:
        RunError: if they cannot have such adapters.
    """
    if settings.lora_rank is None:
        return Trained(params)
    key = jax.random.fold_in(jax.random.key(settings.seed), ADAPTERS_KEY)
    pattern = settings.trainable or ""
    try:
        adapters = init_lora(params, key, rank=settings.lora_rank, pattern=pattern)
    except ValueError as error:
        given = f"--lora-rank {settings.lora_rank}" + f", --trainable {pattern}" * bool(pattern)
        raise RunError(f"{given}: {error}") from error
    mesh = mesh_of(settings)
    if mesh is not None:
        adapters = place(adapters, (), mesh)
    merge = partial(jax.jit(merge_lora), params, alpha=settings.lora_alpha)
    attach = partial(attach_lora, params, alpha=settings.lora_alpha)
    return Trained(adapters, merge if settings.lora_merge else attach, attach)


def save_trained(settings: Settings, model: LanguageModel) -> Callable[[Path, Params], None] | None:
    """How a run writes its adapters, in PEFT's format; None for one that trains the weights.

    They are adapters of the model that it begins as.
    """
    if settings.lora_rank is None:
        return None
    name = settings.start or settings.model
    # by its whole path, for whoever reads them from another folder
    base_model = Path(name).resolve() if Path(name).is_dir() else name

    def save(folder: Path, adapters: Params) -> None:
        alpha = settings.lora_alpha
        save_adapters(folder, adapters, model.config, alpha=alpha, base_model=base_model)

    return save


def describe_trained(settings: Settings, built: Built) -> dict[str, int]:
    """How many numbers a run of adapters trains, said and for its config.json; {} of another."""
    if settings.lora_rank is None:
        return {}
    adapters = built.trained.initial
    few, all_of_them = map(count_numbers, (adapters, built.model.params))
    built.display.say(
        f"Adapters of rank {settings.lora_rank} on {len(adapters)} matrices: "
        f"{few:,} of {all_of_them:,} numbers are trained."
    )
    return {"trained_parameters": few}


def choose_folder(settings: Settings, name: str, title: str) -> tuple[Path, bool]:
    """The run's folder, and whether it was made for it just now."""
    if settings.run_folder is not None:
        return settings.run_folder, False
    base = Path("runs") / name
    if settings.resumes:
        return newest_folder(base, title), False
    return new_folder(base, title), True


def loggers(settings: Settings) -> list[str]:
    """By name, as `fjax.runs` opens them."""
    names = ["tensorboard"] if settings.tensorboard else []
    if settings.wandb_project:
        mode = ",offline" if settings.wandb_mode == "offline" else ""
        names.append(f"wandb={settings.wandb_project}{mode}")
    return names


def load_model(settings: Settings, *, prompt_tokens: int = 1) -> LanguageModel:
    """The built-in model, a folder's, or a hub's.

    Raises:
        RunError: if it cannot be loaded, or has fewer positions than are asked for.
    """
    mesh = mesh_of(settings)
    try:
        model = fjax.from_pretrained(
            settings.model,
            dtype=jnp.dtype(settings.dtype),
            param_dtype=jnp.dtype(settings.param_dtype),
            mesh=mesh,
            remat=settings.remat,
            shapes_only=settings.dry_run,
        )
    except (OSError, ValueError) as error:
        raise RunError(f"Cannot load --model {settings.model}: {error}") from error
    model = model._replace(prompt=prompt_of(settings, model.tokenizer))
    check_positions(settings, model, max(prompt_tokens, len(model.start_ids)))
    return model


def prompt_of(settings: Settings, tokenizer) -> tuple[int, ...]:
    """The tokens of ``--prefix`` or ``--instruction``; none without.

    Raises:
        RunError: if there is no chat template, or the prefix has an end token in it.
    """
    if settings.prefix is not None:
        # Words begin with their space, so one at the end belongs to the continuation.
        (ids,) = token_ids(tokenizer, [settings.prefix.rstrip()])
        return (start_id(tokenizer), *ids)
    if settings.instruction is not None:
        messages = [{"role": "user", "content": settings.instruction}]
        return tuple(chat_ids(tokenizer, messages, "--instruction"))
    return ()


def mesh_of(settings: Settings) -> Mesh | None:
    """The devices of ``--mesh``; None for the first one alone.

    Raises:
        RunError: if there are others than it says, or it does not divide the samples.
    """
    if not settings.mesh:
        return None
    try:
        mesh = make_mesh(settings.mesh)
        base = settings.base_samples
        check_rows(mesh, settings.samples - base, "samples of the policy in a step")
        check_rows(mesh, base, "samples of the base model in a step")
    except ValueError as error:
        raise RunError(
            f"--mesh {settings.mesh}: {error} --samples and --base-fraction say how many there are."
            if "samples" in str(error)
            else f"--mesh {settings.mesh}: {error}"
        ) from error
    return mesh


def load_aligned(settings: Settings, base: LanguageModel, name: str) -> LanguageModel:
    """A model whose probabilities can be compared with the base model's.

    Raises:
        RunError: if it cannot be loaded, or has another shape or tokenizer.
    """
    aligned = load_model(dataclasses.replace(settings, model=name))
    computes_as = getattr(base.config, "computes_as", base.config.__eq__)
    if (
        not computes_as(aligned.config)
        or base.tokenizer.get_vocab() != aligned.tokenizer.get_vocab()
    ):
        raise RunError(
            f"{name} and the base model {settings.model} differ in shape or tokenizer, so that "
            f"their probabilities cannot be compared. Give the base model that it was aligned from."
        )
    return aligned


def longest(model: LanguageModel) -> int:
    """Tokens that the model can read."""
    return sys.maxsize if model.max_length is None else model.max_length


def check_positions(settings: Settings, model: LanguageModel, prompt_tokens: int) -> None:
    """Whether prompts of so many tokens, the start token included, and what follows them have room
    in the model.

    Raises:
        RunError: if not.
    """
    needed, there = prompt_tokens + settings.max_new_tokens, longest(model)
    if needed > there:
        alone = prompt_tokens == 1
        prompt = "the start token" if alone else f"a prompt of {prompt_tokens} tokens"
        raise RunError(
            f"The model has {there} positions, but {prompt} and --max-new-tokens "
            f"{settings.max_new_tokens} need {needed}. Ask for at most "
            f"{max(there - prompt_tokens, 0)} new tokens."
        )


def make_collector(
    settings: Settings, model: LanguageModel, contexts: Contexts | None = None
) -> Collector:
    """How the run draws. Without contexts the prompt is the model's end-of-sequence token, as it
    stands between texts.

    Raises:
        RunError: if samples cannot be shared out among the prompts.
    """
    try:
        return rollouts.model_collector(
            model,
            max_new_tokens=settings.max_new_tokens,
            samples=settings.samples,
            base_samples=settings.base_samples,
            contexts=contexts,
        )
    except ValueError as error:
        raise RunError(f"--{error}" if str(error).startswith("samples") else str(error)) from error


def make_mover(built: Built, target: TextTarget, contexts: Contexts | None) -> Tuner | Stepper:
    """One pass over what is drawn, or stages, of which filter_sft is one."""
    settings, trained = built.settings, built.trained
    if not settings.schedule:
        return make_tuner(settings, built.model, contexts, trained)
    filters = settings.algorithm == "filter_sft"
    return staged(
        stage_tuner(settings, built.model, contexts, trained),
        settings.schedule,
        built.collector,
        target,
        jax.random.key(settings.seed),
        minibatch_size=settings.minibatch_size,
        updates_per_step=UPDATES_PER_STEP,
        policy_of=trained.policy_of,
        share_of_p=1.0 if filters else 0.5,
        look_every=FILTER_LOOK_EVERY if filters else LOOK_EVERY,
    )


def stage_tuner(
    settings: Settings, model: LanguageModel, contexts: Contexts | None, trained: Trained
) -> Callable[[FDivergence], Tuner]:
    """f -> what updates in a stage that descends it."""
    start = len(model.start_ids) if contexts is None else contexts.start
    logits_fn = adapt(model.logits_fn, trained.in_training)
    return partial(
        _stage_tuner,
        settings,
        fjax.make_log_prob_fn(logits_fn, start=start),
        make_optimizer(settings, trained.initial),
    )


def _stage_tuner(settings, log_prob_fn, optimizer, divergence: FDivergence) -> Tuner:
    filters = settings.algorithm == "filter_sft"
    return fjax.fdpg(
        log_prob_fn,
        optimizer,
        divergence=divergence,
        baseline=0.0 if filters else self_normalized,  # likelihood has none
        log_z=known_log_z(),
        clip=settings.clip,
        microbatch_size=settings.microbatch_size,
    )


def make_tuner(
    settings: Settings,
    model: LanguageModel,
    contexts: Contexts | None = None,
    trained: Trained | None = None,
) -> fjax.Tuner:
    """What ``--algorithm`` stands for."""
    start = len(model.start_ids) if contexts is None else contexts.start
    trained = trained or Trained(model.params)
    optimizer = make_optimizer(settings, trained.initial)
    microbatch_size = settings.microbatch_size
    num_contexts = None
    if contexts is not None and not contexts.global_z:
        num_contexts = len(contexts.training.texts)
    logits_fn = adapt(model.logits_fn, trained.in_training)
    log_prob_fn = fjax.make_log_prob_fn(logits_fn, start=start)
    if settings.algorithm == "rloo":
        return rloo_tuner(
            log_prob_fn, optimizer, microbatch_size=microbatch_size, num_contexts=num_contexts
        )
    if settings.algorithm == "ppo":
        return ppo_tuner(
            fjax.log_probs.make_token_log_prob_fn(logits_fn, start=start),
            optimizer,
            epochs=PPO_EPOCHS,
            minibatches=PPO_MINIBATCHES,
            microbatch_size=microbatch_size,
            num_contexts=num_contexts,
        )
    return fjax.fdpg(
        log_prob_fn,
        optimizer,
        divergence=by_name(settings.divergence),
        clip=settings.clip,
        microbatch_size=microbatch_size,
        num_contexts=num_contexts,
    )


def reported_divergences(settings: Settings) -> dict[str, FDivergence]:
    """Name -> f of those that evaluations report: the usual ones, and what is trained on."""
    names = dict.fromkeys((*REPORTED, settings.divergence))
    return {name: by_name(name) for name in names}


def make_optimizer(settings: Settings, params: Params) -> optax.GradientTransformation:
    """Adam or SGD after a warm-up, on the clipped gradient of what is trainable.

    Raises:
        RunError: if nothing is.
    """
    # the first step has the whole rate either way
    peak, warmup = settings.learning_rate, max(settings.warmup_steps, 1)
    schedule = optax.linear_schedule(0.0, peak, warmup)
    if settings.decay:
        begin, updates = falling_updates(settings, warmup)
        fall = optax.linear_schedule(peak, 0.0, max(updates + 1 - begin, 1))
        schedule = optax.join_schedules([schedule, fall], [begin])
    # The first step is taken at a rate above zero.
    optimizer = optax.sgd if settings.optimizer == "sgd" else partial(optax.adam, b2=0.98)
    descend = optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optimizer(lambda count: schedule(count + 1)),
    )
    if settings.trainable is None or settings.lora_rank is not None:
        return descend  # of adapters, all are
    return optax.partition(
        {"moves": descend, "stays": optax.set_to_zero()}, _labels(settings.trainable, params)
    )


def falling_updates(settings: Settings, warmup: int) -> tuple[int, int]:
    """Where in a run the rate begins to fall, and the last update."""
    if settings.schedule:
        stages = [stage.updates for stage in settings.schedule]
        return max(sum(stages[:-1]), warmup), sum(stages)
    each = PPO_EPOCHS * PPO_MINIBATCHES if settings.algorithm == "ppo" else 1
    return warmup, settings.steps * each


def _labels(pattern: str, params: Params) -> Params:
    """Whether each parameter moves or stays: does its path have the pattern in it."""
    try:
        moving = find_leaves(params, pattern, name="--trainable")
    except ValueError as error:
        raise RunError(str(error)) from error
    labels = ["moves" if path in moving else "stays" for path in name_leaves(params)]
    return jax.tree.structure(params).unflatten(labels)
