"""Writes docs/api.md, every public name with the first line of its docstring, the rules in
docs/layers.md and the flags in docs/coming-from-trl.md: python -m tests.make_api_page."""

import importlib
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import fjax
from experiments.common.trl_flags import ANSWERS
from fjax import _markdown
from tests.test_architecture import FORBIDDEN, ONE_HOME

MODULES = (
    "divergences", "targets", "moments", "estimators", "surrogates", "policy_gradients", "preferences", "rejection",
    "enumeration", "testing",
    "log_probs", "metrics", "sampling", "models", "adapters", "sharding", "training", "replay", "rollouts", "evaluation", "runs",
)  # fmt: skip
PAGE = Path(__file__).parents[1] / "docs" / "api.md"
LAYERS = PAGE.with_name("layers.md")
FROM_TRL = PAGE.with_name("coming-from-trl.md")
RULES = ("<!-- made by python -m tests.make_api_page -->", "<!-- end -->")
HEAD = """# All names

The first line of each docstring; `help(fjax.surrogate_loss)` has the rest: formula, shapes, errors, an example, the source.
Made by `python -m tests.make_api_page`.
"""


def first_line(module: ModuleType, name: str = "") -> str:
    """Of the docstring, as one cell of a table; a type's stands below it in the source."""
    text = (getattr(module, name) if name else module).__doc__
    thing = getattr(module, name, None)
    if (
        name
        and not inspect.isroutine(thing)
        and not inspect.isclass(thing)
        and not inspect.ismodule(thing)
    ):
        sources = [
            Path(loaded.__file__).read_text()
            for loaded in list(sys.modules.values())
            if _is_below(loaded, module)
        ]
        found = (
            re.search(rf'^{name} = .*\n"""((?:.|\n)*?)"""', source, re.MULTILINE)
            for source in sources
        )
        text = next((match[1].removesuffix('"""') for match in found if match), text)
    paragraph = inspect.cleandoc(text or "").split("\n\n")[0]
    return " ".join(paragraph.split()).replace("|", "\\|")


def _is_below(loaded: ModuleType, module: ModuleType) -> bool:
    return getattr(loaded, "__name__", "").startswith(module.__name__)


def page() -> str:
    """The whole document."""
    parts = [HEAD]
    for name in MODULES:
        module = importlib.import_module(f"fjax.{name}")
        lines = [f"| `{entry}` | {first_line(module, entry)} |" for entry in module.__all__]
        parts.append(
            f"## fjax.{name}\n\n{first_line(module)}\n\n| | |\n| --- | --- |\n"
            + "\n".join(lines)
            + "\n"
        )
    top = ", ".join(f"`{name}`" for name in fjax.__all__)
    parts.append(
        f"## At the top level\n\nWhat is typed daily is there as `fjax.<name>`, too: {top}.\n"
    )
    return "\n".join(parts)


def layers(text: str) -> str:
    """The page of the layers with the table of what must not be imported as it is enforced."""
    owners: dict[frozenset[str], list[str]] = {}
    for owner, forbidden in FORBIDDEN.items():
        owners.setdefault(frozenset(forbidden), []).append(owner)
    rows = [(_names(owned), _names(sorted(forbidden))) for forbidden, owned in owners.items()]
    rows += [(f"all but {_names([home])}", _names([library])) for library, home in ONE_HOME.items()]
    return _between_marks(text, _markdown.table(["module", "must not import"], rows))


def from_trl(text: str) -> str:
    """The page for those who come from TRL with the answers of the commands to its flags."""
    rows = [
        (", ".join(f"`--{name}`" for name in names.split()), _flags_in_code(answer))
        for names, answer in ANSWERS.items()
    ]
    return _between_marks(text, _markdown.table(["TRL", "here"], rows))


def _flags_in_code(answer: str) -> str:
    return re.sub(r"--[a-z][\w-]*(?: [A-Z]+)?", lambda found: f"`{found[0]}`", answer)


def _between_marks(text: str, table: str) -> str:
    begin, end = RULES
    return f"{text.partition(begin)[0]}{begin}\n\n{table}\n\n{end}{text.partition(end)[2]}"


def _names(modules: Iterable[str]) -> str:
    """Those of fjax without its name, as CONTRIBUTING has them; functions by their module."""
    shown = dict.fromkeys(map(_shown, modules))
    return ", ".join(shown)


def _shown(name: str) -> str:
    if not name.startswith("fjax.") or name.startswith("fjax.models."):
        return f"`{name.removeprefix('fjax.')}`"
    module, _, last = name.removeprefix("fjax.").rpartition(".")
    return f"what `{module}` makes" if module else f"`{last}`"


if __name__ == "__main__":
    PAGE.write_text(page())
    LAYERS.write_text(layers(LAYERS.read_text()))
    FROM_TRL.write_text(from_trl(FROM_TRL.read_text()))
