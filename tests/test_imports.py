"""`import fjax` is cheap and complete: it loads no heavy library, and every name it promises is
there."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import fjax

HEAVY = {
    "flax",
    "optax",
    "transformers",
    "orbax",
    "torch",
    "safetensors",
    "tokenizers",
    "matplotlib",
}


def loaded_after(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


# Sampling and log-probs are about language models, yet they are given functions and bring no
# library along.
@pytest.mark.parametrize(
    "first_use", ["", "fjax.sample", "fjax.sequence_log_probs", "fjax.metrics"]
)
def test_import_loads_nothing_heavy(first_use):
    loaded = loaded_after(f"import fjax; {first_use}")
    assert "jax" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("name", fjax.__all__)
def test_every_promised_name_is_there(name):
    assert getattr(fjax, name) is not None
    assert name in dir(fjax)


def test_type_checkers_see_the_lazy_names():
    (block,) = (
        node for node in ast.parse(inspect.getsource(fjax)).body if isinstance(node, ast.If)
    )
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    promised = {(module, name) for module, names in fjax._LAZY.items() for name in names}
    assert seen == promised | {(None, module) for module in fjax._LAZY}
    assert {name for _, name in seen} <= set(fjax.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'forward_lk'"):
        fjax.forward_lk  # noqa: B018


def test_no_module_has_the_name_of_a_function_beside_it():
    """To mypy, `from fjax.training import fdpg` would be the module of that name, and not
    callable."""
    packages = [
        importlib.import_module(f"fjax.{m.name}")
        for m in pkgutil.iter_modules(fjax.__path__)
        if m.ispkg
    ]
    assert len(packages) >= 4
    for package in (fjax, *packages):
        for module in pkgutil.iter_modules(package.__path__):
            found = getattr(package, module.name, None)
            assert found is None or inspect.ismodule(found), f"{package.__name__}.{module.name}"
