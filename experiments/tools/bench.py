"""Time of each phase on this machine: python -m experiments bench --help.

Alternatives are timed in turn, round by round, so that a busy machine slows all of them alike;
medians are shown, and ratios only between what ran in the same rounds.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from fjax import make_log_prob_fn, rollouts
from fjax.evaluation import TextTarget
from fjax.runs import RunError, online
from fjax.runs.display import hardware
from fjax.runs.endings import leave
from fjax.sampling import categorical, top_k, top_p

from ..common.arguments import FolderOrName, check_numbers
from ..common.build import load_model, make_collector, make_tuner
from ..common.command import run
from ..common.settings import BUILT_IN, Settings
from .sides import processes
from .sides.work import Work, rows_of

Phase = Literal["draw", "filter", "step", "overlap", "accuracy"]
Timed = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Config:
    """Time the phases of an alignment step, and the alternatives that the sampler was chosen from.

    Examples:

        python -m experiments bench
        python -m experiments bench --phases draw --vocabulary 50257 --rows 64
        python -m experiments bench --phases step --model gpt2 --samples 64
        python -m experiments bench --phases overlap --scoring-ms 500
        python -m experiments bench --phases accuracy --model gpt2
        python -m experiments bench --against torch --model my_folder \\
            --samples 16 --max-new-tokens 32
        python -m experiments bench --against lora lora_merged --model my_folder \\
            --samples 16 --max-new-tokens 32
    """

    phases: tuple[Phase, ...] = ("draw", "filter", "step")
    """draw: one token a row, three ways. filter: top-k and top-p, against a sort. step: an
    alignment step, in parts. overlap: a step whose texts are scored elsewhere, with and without
    drawing the next batch meanwhile. accuracy: how far this device's log-probabilities are from
    one another and from products in full float32, and whether a gradient comes twice the same."""
    against: tuple[Literal["torch", "lora", "lora_merged"], ...] = ()
    """In place of --phases: a step of f-DPG in float32 by fjax, and by others in turn on the same
    tokens, each in a process of its own; and whether their losses are the same. torch: by torch and
    transformers. lora: of adapters, with one copy of the weights. lora_merged: of adapters that are
    added up into a second copy, to draw and to score."""
    lora_rank: int = 8
    """Of adapters."""
    trainable: str | None = None
    """Only matrices whose path has this regular expression in it have adapters."""
    rows: int = 256
    """Rows of logits, for draw and filter."""
    vocabulary: int = 2560
    """Columns of logits, for draw and filter."""
    rounds: int = 7
    """Each alternative is timed once a round; the median over rounds is shown."""
    model: FolderOrName = "built-in"
    """The model, for step and --against: built-in, a local folder, or a name on the hub."""
    samples: int = 128
    """Samples a step."""
    max_new_tokens: int = 40
    """Longest sample."""
    scoring_ms: int = 500
    """How long the score of overlap is waited for: a service's answer, during which Python has
    nothing to compute."""

    def __post_init__(self):
        check_numbers(self)


def gumbel(rng_key, logits):
    """The usual way: the largest of the logits plus a Gumbel each, and the log-probability of what
    it is."""
    token = jax.random.categorical(rng_key, logits)
    return token, jax.nn.log_softmax(logits)[token]


def running_sum(rng_key, logits):
    """The inverse of one running sum over the whole vocabulary."""
    cumulative = jnp.cumsum(jnp.exp(logits - logits.max()))
    token = jnp.searchsorted(cumulative, jax.random.uniform(rng_key) * cumulative[-1], side="right")
    return token, logits[token] - logits.max() - jnp.log(cumulative[-1])


def make_draws(config: Config) -> Timed:
    """One token a row from the same logits."""
    logits = jax.random.normal(jax.random.key(0), (config.rows, config.vocabulary)) * 3
    keys = jax.random.split(jax.random.key(1), config.rows)
    ways = {
        "blocks (fjax)": categorical.draw,
        "Gumbel an entry": gumbel,
        "one running sum": running_sum,
    }
    timed: Timed = {
        name: partial(jax.jit(jax.vmap(way)), keys, logits) for name, way in ways.items()
    }
    return timed | {
        "log-sum-exp alone": partial(jax.jit(lambda x: jax.nn.logsumexp(x, axis=-1)), logits)
    }


def by_sort(logits, p):
    """Top-p as it is mostly written: sort, running sum, cut."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    lowest = jnp.min(jnp.where(before < p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def make_filters(config: Config) -> Timed:
    """Logits in, filtered logits out."""
    logits = jax.random.normal(jax.random.key(0), (config.rows, config.vocabulary)) * 3
    ways = {
        "top-p 0.9 (fjax)": top_p(0.9),
        "top-p 0.9 by a sort": partial(by_sort, p=0.9),
        "top-k 50 (fjax)": top_k(50),
    }
    return {name: partial(jax.jit(way), logits) for name, way in ways.items()}


def make_phases(config: Config) -> Timed:
    """The parts of one step of f-DPG, and the whole."""
    settings = Settings(
        model=config.model, samples=config.samples, max_new_tokens=config.max_new_tokens
    )
    model = load_model(settings)
    collector, tuner = make_collector(settings, model), make_tuner(settings, model)
    compiled = jax.jit(tuner.update, donate_argnums=0)
    batch = collector.draw(model.params, jax.random.key(0))
    rollout = rollouts.to_rollout(batch, np.asarray(batch.log_a))
    held = [tuner.init(model.params)]

    def update():
        held[0], info = compiled(held[0], rollout)  # the state is donated
        return info

    def draw():
        return collector.draw(held[0].params, jax.random.key(0))[:-1]

    def whole():
        tokens, where, *_ = draw()
        collector.decode(tokens, where)
        return update()

    return {
        "whole step": whole,
        "draw, and score under the base": draw,
        "score alone": lambda: collector.score(held[0].params, rollout.tokens, rollout.where),
        "decode to text": lambda: collector.decode(batch.tokens, batch.where),
        "update": update,
    }


def make_overlap(config: Config) -> Timed:
    """A step with a score that is waited for, and the same with the next batch drawn meanwhile."""
    settings = Settings(
        model=config.model, samples=config.samples, max_new_tokens=config.max_new_tokens
    )
    model = load_model(settings)
    collector, tuner = make_collector(settings, model), make_tuner(settings, model)

    def wait(prompts, texts):
        time.sleep(config.scoring_ms / 1000)
        return {}

    target = TextTarget(wait, lambda log_a, features: np.asarray(log_a))

    def stepping(overlap):
        stepper = online(tuner, collector, target, jax.random.key(0), overlap=overlap)
        held = [stepper.begin(model.params)]

        def step():
            held[0], _ = stepper.step(held[0], int(held[0].state.step))
            return held[0].state

        return step

    return {"one after the other": stepping(False), "overlapped": stepping(True)}


def show_accuracy(config: Config, console: Console) -> None:
    """What the sampler says of its samples beside what is computed of them afterwards.

    Accelerators multiply float32 with fewer digits unless they are asked for all of them, and add
    up the gradient of an embedding in any order.
    """
    settings = Settings(
        model=config.model, samples=config.samples, max_new_tokens=config.max_new_tokens
    )
    model = load_model(settings)
    collector = make_collector(settings, model)
    batch = collector.draw(model.params, jax.random.key(0))
    rows = batch.tokens, batch.where
    log_prob_fn = make_log_prob_fn(model.logits_fn, start=1)
    with jax.default_matmul_precision("float32"):
        exact = jax.jit(log_prob_fn)(model.params, *rows)
    found = jax.jit(log_prob_fn)(model.params, *rows)
    gradient = jax.jit(jax.grad(lambda params: log_prob_fn(params, *rows).mean()))
    twice = zip(*(jax.tree.leaves(gradient(model.params)) for _ in range(2)), strict=True)
    table = Table(title=f"log π of {config.samples} samples, {config.model}", title_justify="left")
    table.add_column("difference")
    for heading in ("median", "largest"):
        table.add_column(heading, justify="right")
    for name, first, second in (
        ("sampler and scorer", batch.log_proposal, found),
        ("scorer, and scorer in full float32", found, exact),
    ):
        off = np.abs(np.asarray(first) - np.asarray(second))
        table.add_row(name, f"{np.median(off):.1e}", f"{off.max():.1e}")
    off = max(float(jnp.abs(a - b).max()) for a, b in twice)
    table.add_row("an entry of the gradient, computed twice", "", f"{off:.1e}" if off else "0")
    console.print(table)


def measure(timed: Timed, rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, in turn; the first round compiles and is not counted."""
    seconds = {name: [] for name in timed}
    for i in range(rounds + 1):
        for name, call in timed.items():
            begun = time.perf_counter()
            jax.block_until_ready(call())
            if i:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def show(console: Console, title: str, seconds: dict[str, list[float]]) -> None:
    """Median, extremes, and the ratio to the first."""
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    for heading in ("median ms", "fastest", "slowest", "ratio to the first"):
        table.add_column(heading, justify="right")
    first = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, first, strict=True))
        figures = statistics.median(values), min(values), max(values)
        table.add_row(name, *(f"{1e3 * x:.2f}" for x in figures), f"{ratio:.2f}")
    console.print(table)


def bench_sides(config: Config, console: Console) -> int:
    """A step in its phases, beside others' on the same rows."""
    folder = str(BUILT_IN) if config.model == "built-in" else config.model
    sizes = config.samples, config.max_new_tokens
    work = Work(folder, *sizes, config.lora_rank, config.trainable)
    with processes.start(("fjax", *config.against), work) as sides:
        tokens = sides["fjax"].ask("draw")
        rows = rows_of(tokens, *sides["fjax"].ask("score", tokens))
        given = {"draw": (), "score": (tokens,), "update": rows}
        losses = {
            name: [side.ask("update", *rows) for _ in range(2)] for name, side in sides.items()
        }
        medians = dict.fromkeys(sides, 0.0)
        for phase, what in given.items():
            timed = {name: partial(side.ask, phase, *what) for name, side in sides.items()}
            seconds = measure(timed, config.rounds)
            show(console, f"{phase}: {work.samples} rows of {work.new_tokens} tokens", seconds)
            for name in sides:
                medians[name] += statistics.median(seconds[name])
        peaks = {name: side.ask("memory") for name, side in sides.items()}
        numbers = {name: side.ask("numbers") for name, side in sides.items()}
    show_sides(console, work, medians, losses, peaks, numbers)
    check_same(losses, numbers)
    return 0


def show_sides(
    console: Console,
    work: Work,
    seconds: dict[str, float],
    losses: dict[str, list[float]],
    peaks: dict[str, int],
    numbers: dict[str, tuple[int, int]],
) -> None:
    """A whole step of each."""
    table = Table(title="a step: the sum of the medians", title_justify="left")
    table.add_column("side")
    for heading in ("trained", "seconds", "tokens/s", "most memory, MiB", "loss", "after"):
        table.add_column(heading, justify="right")
    for name, whole in seconds.items():
        rate = work.samples * work.new_tokens / whole
        shown = (f"{loss:.5f}" for loss in losses[name])
        trained, there = numbers[name]
        share = f"{trained / there:.2%}"
        table.add_row(
            name, share, f"{whole:.2f}", f"{rate:.0f}", f"{peaks[name] / 2**20:.0f}", *shown
        )
    console.print(table)


def check_same(losses: dict[str, list[float]], numbers: dict[str, tuple[int, int]]) -> None:
    """Whether all sides descend the same loss by the same gradient: it is as large at first and,
    where as many numbers are trained, after an update.

    Raises:
        RunError: if not, to 1e-4 of it.
    """
    first = {count: losses[name] for name, (count, _) in reversed(numbers.items())}
    start = next(iter(losses.values()))[0]
    for name, (count, _) in numbers.items():
        expected = [start, first[count][1]]
        if not np.allclose(losses[name], expected, rtol=1e-4, atol=0):
            raise RunError(f"The sides do not compute the same, so times say nothing: {losses}.")


def bench(config: Config) -> int:
    """Times and prints; nothing is written."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(f"jax {jax.__version__} on {hardware()}, {config.rounds} rounds.")
    if config.against:
        return bench_sides(config, console)
    size = f"{config.rows} rows × {config.vocabulary} tokens"
    what = {
        "draw": (f"one token a row, with its log-probability: {size}", make_draws),
        "filter": (f"filters: {size}", make_filters),
        "step": (f"one step of {config.samples} samples, {config.model}", make_phases),
        "overlap": (
            f"one step of {config.samples} samples, scored in {config.scoring_ms} ms elsewhere",
            make_overlap,
        ),
    }
    for phase in config.phases:
        if phase == "accuracy":
            show_accuracy(config, console)
            continue
        title, make = what[phase]
        show(console, title, measure(make(config), config.rounds))
    return 0


main = partial(run, Config, bench, name="bench")

if __name__ == "__main__":
    leave(main())
