"""What a compiled program needs of each device: its memory, and what it moves between devices."""

import re
from collections import Counter
from typing import Any, NamedTuple

import jax
import numpy as np


class ProgramMemory(NamedTuple):
    """What a compiled program needs of each device, in bytes, as XLA says.

    Attributes:
        arguments: what it is given.
        temporary: what it holds while it runs, beside arguments and results.
        peak: all of it together; results that take the place of arguments count once.
    """

    arguments: int
    temporary: int
    peak: int


AS_ACCELERATORS_DO = {
    "xla_cpu_enable_concurrency_optimized_scheduler": False,
    "xla_disable_hlo_passes": "cse_barrier_expander",
}
"""Options of XLA's compiler for a CPU. By default it works on as much at a time as it can, holds
what all of that needs, and forgets what was to be computed again; compilers for accelerators order
a program by its memory."""


def compile_to_inspect(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles ``jax.jit(f).lower(...)``; on a CPU with `AS_ACCELERATORS_DO`."""
    options = AS_ACCELERATORS_DO if jax.default_backend() == "cpu" else None
    return lowered.compile(compiler_options=options)


def program_memory(compiled: jax.stages.Compiled) -> ProgramMemory:
    """Of a compiled program, of arrays or shapes.

    >>> import jax.numpy as jnp
    >>> shape = jax.ShapeDtypeStruct((1000,), jnp.float32)
    >>> program_memory(compile_to_inspect(jax.jit(jnp.sin).lower(shape)))
    ProgramMemory(arguments=4000, temporary=0, peak=8000)
    """
    found: Any = compiled.memory_analysis()
    given, made = found.argument_size_in_bytes, found.output_size_in_bytes
    temporary = found.temp_size_in_bytes
    peak = given + made - found.alias_size_in_bytes + temporary
    return ProgramMemory(given, temporary, peak)


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
"""Kinds of operations that move numbers between devices."""


def collective_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes that each device has in its hands after the collectives of a program, by kind.

    Of an all-reduce that is the sum, of an all-gather the whole. What is in a loop counts as often
    as it turns; once where XLA does not know that.

    >>> import jax.numpy as jnp
    >>> collective_bytes(jax.jit(jnp.sin).lower(jnp.zeros(3)).compile())
    {}
    """
    computations = _computations(compiled.as_text() or "")
    entry = next(name for name in computations if name.startswith("ENTRY "))
    return dict(
        _in_computation(
            entry.removeprefix("ENTRY "),
            {name.removeprefix("ENTRY "): lines for name, lines in computations.items()},
        )
    )


def _computations(program: str) -> dict[str, list[str]]:
    """Name -> lines of each part of a program in XLA's own language."""
    found: dict[str, list[str]] = {}
    for line in program.splitlines():
        begins = re.match(r"(ENTRY )?%(\S+) \(.*\{$", line)
        if begins:
            found[(begins[1] or "") + begins[2]] = lines = []
        elif line.startswith("  "):
            lines.append(line)
    return found


def _in_computation(name: str, computations: dict[str, list[str]]) -> Counter[str]:
    found: Counter[str] = Counter()
    kinds = "|".join(COLLECTIVES)
    for line in computations[name]:
        moved = re.match(rf"\s*(?:ROOT )?%\S+ = (.+?) ({kinds})(-start)?\(", line)
        loop = re.search(r" while\(.*body=%([^\s,]+)", line)
        if moved:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", moved[1])
            if moved[3]:  # what is given stands before what is made
                shapes = shapes[len(shapes) // 2 :]
            found[moved[2]] += sum(_bytes(*shape) for shape in shapes)
        elif loop:
            turns = re.search(r"known_trip_count[^\d]*(\d+)", line)
            for kind, size in _in_computation(loop[1], computations).items():
                found[kind] += size * (int(turns[1]) if turns else 1)
    return found


def _bytes(dtype: str, sides: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D+(\d+).*", r"\1", dtype))
    return int(np.prod([int(side) for side in sides.split(",") if side])) * bits // 8
