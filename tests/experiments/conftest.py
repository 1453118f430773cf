"""Runs of one experiment compile the same programs again and again; here they are compiled once a
test session."""

import os

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def compiled_once(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have their folders in one of the session's.
    folder = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled")
    options = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # for the processes that tests start
    yield
    del os.environ["JAX_COMPILATION_CACHE_DIR"]
    for name, value in before.items():
        jax.config.update(name, value)
