"""Folders of a model for tests: one to read, copies to spoil, and how to spoil them."""

import json

import jax
import numpy as np
import safetensors.flax

from tests.make_fixtures import FOLDER

TINY = FOLDER / "tiny-gpt2"


def tensors_of(folder):
    return safetensors.flax.load_file(folder / "model.safetensors")


def write(folder, tensors):
    safetensors.flax.save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def save_adapter(folder, **said):
    (folder / "adapter_config.json").write_text(json.dumps(said))


def change(folder, name, by):
    tensors = tensors_of(folder)
    write(folder, tensors | {name: by(tensors[name])})
