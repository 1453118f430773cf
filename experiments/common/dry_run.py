"""What a run needs of each device, before anything is loaded or computed."""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.stages import Compiled

from fjax import rollouts
from fjax._trees import count_numbers
from fjax.adapters import attach_lora
from fjax.models import LanguageModel
from fjax.rollouts import Contexts
from fjax.runs import Display, RunError
from fjax.runs.display import hardware
from fjax.runs.memory import bytes_per_device
from fjax.runs.programs import collective_bytes, compile_to_inspect, program_memory
from fjax.sharding import devices_of, jit_for
from fjax.training import Rollout, Tuner
from fjax.types import Params, PyTree

from .build import contexts_of, load_model, make_trained, make_tuner, stage_tuner
from .settings import Settings
from .task import Task, Trained

Shape = jax.ShapeDtypeStruct


def dry_run(task: Task, config: Any, display: Display) -> int:
    """Prints parameters, bytes a device by kind, and what XLA says of the compiled programs.

    Raises:
        RunError: for a task that does not draw from a policy.
    """
    settings: Settings = config.settings
    if task.make_stepper is not None:
        raise RunError(f"--dry-run is for tasks that draw samples; {task.name} reads pairs.")
    model = load_model(settings)
    contexts = contexts_of(task, config, model)
    initial = jax.eval_shape(lambda base: _trained(settings, base).initial, model.params)
    tuner = _tuner(settings, model, contexts, Trained(initial))
    state = _placed(model, jax.eval_shape(tuner.init, initial))
    policy = _policy(settings, model, state.params)
    rollout = _rollout(settings, model, contexts)
    display.say(
        f"{count_numbers(model.params):,} parameters, of which {count_numbers(initial):,} numbers "
        f"are trained, on {hardware(model.params)}. Compiling the update and the sampler."
    )
    programs = {
        "update": _update(settings, model, contexts, state, rollout),
        "sampler": _sampler(settings, model, contexts, policy),
    }
    update, sampler = map(program_memory, programs.values())
    parts = {
        "base model": bytes_per_device(model.params),
        "adapters" if settings.lora_rank else "policy": bytes_per_device(state.params),
        **({"policy, merged": bytes_per_device(policy)} if _merges(settings) else {}),
        "optimiser": bytes_per_device(state.opt_state),
        "cache of the sampler": _cache(settings, model, contexts),
        "activations and gradient of an update": update.temporary,
        "update in all, at its peak": update.peak,
        "sampler in all, at its peak": sampler.peak,
    }
    rows = [(name, f"{size / 2**20:,.1f}") for name, size in parts.items()]
    display.table("What each device needs", ["", "MiB"], rows)
    moved = [
        (f"{name}: {kind}", f"{size / 2**20:,.1f}")
        for name, program in programs.items()
        for kind, size in collective_bytes(program).items()
    ]
    if moved:
        display.table("Moved between devices", ["", "MiB"], moved)
    counted = bytes_per_device((state, rollout, model.params if settings.lora_rank else ()))
    display.say(
        f"Arguments of the update: {counted:,} bytes by these shapes, {update.arguments:,} by XLA."
    )
    return 0


def _trained(settings: Settings, base: Params) -> Trained:
    return Trained(base) if settings.lora_rank is None else make_trained(settings, base)


def _merges(settings: Settings) -> bool:
    """Whether the policy is another copy of the weights."""
    return settings.lora_rank is not None and settings.lora_merge


def _policy(settings: Settings, model: LanguageModel, trained: Params) -> Params:
    """What is sampled from, as shapes."""
    if settings.lora_rank is None or settings.lora_merge:
        return model.params
    return _placed(model, jax.eval_shape(attach_lora, model.params, trained))


def _tuner(
    settings: Settings, model: LanguageModel, contexts: Contexts | None, trained: Trained
) -> Tuner:
    """That of the run, or of its last stage."""
    if settings.schedule:
        make = stage_tuner(settings, model, contexts, trained)
        return make(settings.schedule[-1].divergence)
    return make_tuner(settings, model, contexts, trained)


def _placed(model: LanguageModel, tree: PyTree) -> PyTree:
    """Shapes with the places that a run gives them."""
    if model.shardings is None:
        return tree
    return jax.tree.map(
        lambda x, place: Shape(x.shape, x.dtype, sharding=place), tree, model.shardings(tree)
    )


def _columns(
    settings: Settings, model: LanguageModel, contexts: Contexts | None
) -> tuple[int, int]:
    """Of a prompt, and of a whole sequence."""
    prompt = len(model.start_ids) if contexts is None else contexts.training.tokens.shape[1]
    return prompt, prompt + settings.max_new_tokens


def _rollout(settings: Settings, model: LanguageModel, contexts: Contexts | None) -> Rollout:
    _, columns = _columns(settings, model, contexts)
    if settings.schedule:  # a minibatch of the replay has no contexts
        rows, strata = (settings.minibatch_size,), cast(Any, None)
    else:
        each = () if contexts is None else (contexts.per_step,)
        rows = (*each, settings.samples // (each or (1,))[0])
        strata = cast(Any, Shape(rows, jnp.int32))
    ids: Any = None
    if contexts is not None and not contexts.global_z and not settings.schedule:
        ids = Shape(rows[:1], jnp.int32)
    numbers: Any = Shape(rows, jnp.float32)
    tokens: Any = Shape((*rows, columns), jnp.int32)
    where: Any = Shape((*rows, columns), jnp.bool_)
    return Rollout(tokens, where, numbers, numbers, ids, strata)


def _update(
    settings: Settings,
    model: LanguageModel,
    contexts: Contexts | None,
    state: Any,
    rollout: Rollout,
) -> Compiled:
    """Of one update; adapters have the base model beside them."""

    def update(state, rollout, *base):
        trained = _trained(settings, *base) if base else Trained(state.params)
        return _tuner(settings, model, contexts, trained).update(state, rollout)

    base = (model.params,) if settings.lora_rank else ()
    return compile_to_inspect(jit_for(update, state).lower(state, rollout, *base))


def _rows(settings: Settings, contexts: Contexts | None) -> tuple[int, int]:
    """Prompts of the policy's part of a batch, and samples of each."""
    samples = settings.samples - settings.base_samples
    return (samples, 1) if contexts is None else (contexts.per_step, samples // contexts.per_step)


def _sampler(
    settings: Settings, model: LanguageModel, contexts: Contexts | None, policy: Params
) -> Compiled:
    sample_fn: Any = rollouts.make_sample_fn(
        model.decode_fn,
        model.init_cache,
        max_new_tokens=settings.max_new_tokens,
        eos_id=model.eos_ids or model.eos_id,
    )
    columns, _ = _columns(settings, model, contexts)
    prompts, each = _rows(settings, contexts)
    tokens = Shape((prompts, columns), jnp.int32), Shape((prompts, columns), jnp.bool_)
    key = jax.eval_shape(partial(jax.random.key, 0))
    lowered = sample_fn.lower(policy, key, *tokens, Shape((prompts,), jnp.int32), each=each)
    return compile_to_inspect(lowered)


def _cache(settings: Settings, model: LanguageModel, contexts: Contexts | None) -> int:
    """Keys and values, which all axes of a mesh divide."""
    prompts, each = _rows(settings, contexts)
    _, columns = _columns(settings, model, contexts)
    whole = jax.eval_shape(lambda: model.init_cache(prompts * each, columns))
    return bytes_per_device(whole) // len(devices_of(model.params))
