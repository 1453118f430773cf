"""The rules of the layout, read off the source: which way imports go, how long a file may be, what
has a docstring."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fjax

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "fjax").rglob("*.py"))
ALL = [
    path
    for folder in ("fjax", "experiments", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

LIBRARIES = {"flax", "optax", "transformers", "orbax", "safetensors", "tokenizers", "torch"}
# the one of language models
COLUMN = ("log_probs", "metrics", "models", "sampling", "sharding", "training")
MATHEMATICS = LIBRARIES | {f"fjax.{module}" for module in COLUMN}

NAMED = {"fjax.models", "fjax.targets", "fjax.moments"} | {
    f"fjax.divergences.{name}" for name in fjax.divergences.__all__ if name != "FDivergence"
}

# Module (with all below it) -> what it must not import. A module obeys every row that it falls
# under.
FORBIDDEN = {
    "fjax": {"experiments", "tests", "torch"},
    "fjax.types": MATHEMATICS,
    "fjax.adapters": MATHEMATICS,
    "fjax._numerics": MATHEMATICS,
    "fjax.divergences": MATHEMATICS,
    "fjax.targets": MATHEMATICS,
    "fjax.moments": MATHEMATICS,
    "fjax.rejection": MATHEMATICS,
    "fjax.estimators": MATHEMATICS,
    "fjax.surrogates": MATHEMATICS,
    "fjax.preferences": MATHEMATICS,
    "fjax.policy_gradients": MATHEMATICS,
    "fjax.enumeration": MATHEMATICS,
    # These are given functions and arrays; they never know whose.
    "fjax.log_probs": LIBRARIES | {"fjax.models", "fjax.sampling", "fjax.training"},
    "fjax.metrics": LIBRARIES | {"fjax.models", "fjax.sampling", "fjax.training"},
    "fjax.sampling": LIBRARIES | {"fjax.models", "fjax.training"},
    "fjax.sharding": LIBRARIES | {"fjax.models", "fjax.sampling", "fjax.training"},
    "fjax.training": {"flax", "fjax.models", "fjax.sampling"},
    "fjax.models": {
        "fjax.training",
        "fjax.sampling",
        "fjax.divergences",
        "fjax.targets",
        "fjax.surrogates",
    },
    # They are given divergences, targets and models; they never name one.
    "fjax.rollouts": LIBRARIES | NAMED | {"fjax.evaluation", "fjax.runs"},
    "fjax.replay": LIBRARIES | NAMED | {"fjax.evaluation", "fjax.rollouts", "fjax.runs"},
    "fjax.evaluation": LIBRARIES | NAMED | {"fjax.runs"},
    "fjax.runs": {"flax", "transformers", "fjax.models", "tyro"},
    # A family is known where it is listed, and nowhere else.
    "fjax.models.base": {"fjax.models"},
    "fjax.models.causal": {
        "fjax.models.families",
        "fjax.models.gpt2",
        "fjax.models.huggingface",
        "fjax.models.llama",
        "fjax.models.rope",
    },
    "fjax.models.gpt2": {"fjax.models.families", "fjax.models.huggingface", "fjax.models.llama"},
    "fjax.models.llama": {"fjax.models.families", "fjax.models.gpt2", "fjax.models.huggingface"},
    "fjax.models.huggingface": {"fjax.models.gpt2", "fjax.models.llama"},
}
# Libraries with one home in fjax: a release that breaks them is then mended in one file.
ONE_HOME = {"transformers": "fjax.models.huggingface", "safetensors": "fjax.models.huggingface"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, inside functions too; ``from a import b`` gives
    ``a.b``."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            yield from (".".join([*base, alias.name]) for alias in node.names)


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def violations(path: Path) -> list[str]:
    module = module_name(path)
    found = []
    for imported in imports(path):
        for owner, forbidden in FORBIDDEN.items():
            if under(module, owner) and any(under(imported, name) for name in forbidden):
                found.append(f"{module} imports {imported}, which {owner} must not")
        for library, home in ONE_HOME.items():
            if under(imported, library) and not under(module, home):
                found.append(f"{module} imports {imported}, which only {home} may")
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_imports_go_one_way(path):
    assert not violations(path)


def test_a_wrong_import_is_seen(tmp_path, monkeypatch):
    """The three spellings of one forbidden import, one of them inside a function."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "fjax" / "training" / "fdpg.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from ..models import gpt2\nimport fjax.models\ndef f():\n    from fjax import models\n"
    )
    assert len(violations(path)) == 3
    path.write_text("from . import state\nfrom ..surrogates import surrogate_loss\nimport optax\n")
    assert not violations(path)


TASKS = sorted({path.parent for path in (ROOT / "experiments").glob("*/target.py")})


@pytest.mark.parametrize("folder", TASKS, ids=lambda folder: folder.name)
def test_a_task_imports_the_library_and_what_all_tasks_share(folder):
    mine, shared = f"experiments.{folder.name}", "experiments.common"
    for path in folder.rglob("*.py"):
        ours = {name for name in imports(path) if under(name, "experiments")}
        assert not {name for name in ours if not under(name, mine) and not under(name, shared)}


@pytest.mark.parametrize("path", ALL, ids=module_name)
def test_files_stay_short(path):
    lines = len(path.read_text().splitlines())
    limit = 500 if path in LIBRARY else 650
    assert lines <= limit, (
        f"{path.relative_to(ROOT)} has {lines} lines; past {limit} a module becomes a package"
    )


def public_names(tree: ast.Module) -> set[str]:
    """What ``__all__`` lists or, where there is none, every function and class without an
    underscore."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return {item.value for item in ast.walk(node.value) if isinstance(item, ast.Constant)}
    definitions = (ast.FunctionDef, ast.ClassDef)
    return {
        node.name for node in tree.body if isinstance(node, definitions) and node.name[0] != "_"
    }


def documented(tree: ast.Module) -> dict[str, bool]:
    """Each name that the module itself defines -> whether a docstring goes with it."""
    result = {}
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            result[node.name] = ast.get_docstring(node) is not None
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            result[ast.unparse(target)] = is_text and isinstance(following.value.value, str)
    return result


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_public_names_have_docstrings(path):
    """Checked on the source, since a NamedTuple or a dataclass without a docstring is given one by
    Python."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{module_name(path)} does not say what it is about"
    has_docstring = documented(tree)
    assert not sorted(name for name in public_names(tree) if not has_docstring.get(name, True))


OPENING = ("open", "fdopen", "read_text", "write_text")


def without_encoding(path: Path) -> list[int]:
    """Lines that open a text without saying how it is written: as the machine's locale has it,
    which may not be UTF-8."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "open",
            "fdopen",
            "read_text",
            "write_text",
        ):
            # the former of fjax/runs/folder.py
            ours = ast.unparse(node.func) in ("write_text", "os.open")
            modes = [
                ast.unparse(value)
                for value in (*node.args, *(keyword.value for keyword in node.keywords))
            ]
            binary = any(re.fullmatch(r"'[rwax+]*b[rwax+]*'", mode) for mode in modes)
            if (
                not ours
                and not binary
                and "encoding" not in {keyword.arg for keyword in node.keywords}
            ):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    "path", [path for path in ALL if "tests" not in path.parts], ids=module_name
)
def test_every_text_names_its_encoding(path):
    assert not without_encoding(path)


def test_a_text_without_an_encoding_is_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        'open(x)\np.open("a")\np.read_text()\np.write_text(y)\nopen(x, "rb")\np.read_text(encoding="utf-8")\n'
    )
    assert without_encoding(path) == [1, 2, 3, 4]
