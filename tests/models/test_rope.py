"""Rotary positions: what they do to heads, and frequencies as transformers has them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax.models.rope import Rope, frequencies, read_rope, rotate, turns, write_rope

RECIPES = {
    "default": {"rope_type": "default", "rope_theta": 1e5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.7},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
    },
    "yarn with a scale": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.5,
    },
    "yarn in full": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
}


def test_what_two_tokens_see_of_each_other_depends_on_their_distance_alone(x64):
    rope = Rope(rope_theta=100.0)
    heads = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8), jnp.float64)

    def seen(i, j):
        q, k = (
            rotate(x, turns(rope, jnp.array([[at]]), 8, jnp.float64))
            for x, at in zip(heads, (i, j), strict=True)
        )
        return float((q * k).sum())

    assert seen(7, 4) == pytest.approx(seen(103, 100), abs=1e-12)
    assert abs(seen(7, 4) - seen(7, 5)) > 1e-3
    np.testing.assert_allclose(
        jnp.linalg.norm(rotate(heads[0], turns(rope, jnp.array([[9]]), 8, jnp.float64))),
        jnp.linalg.norm(heads[0]),
        rtol=1e-12,
    )


@pytest.mark.parametrize("name", RECIPES)
def test_frequencies_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=16384,
        rope_parameters=dict(RECIPES[name]),
    )
    theirs = LlamaRotaryEmbedding(config)
    rope = read_rope(config.to_dict())
    omega, factor = frequencies(rope, 128)
    assert omega.dtype == np.float32
    np.testing.assert_allclose(omega, theirs.inv_freq.numpy(), rtol=1.3e-7, atol=0)
    assert factor == theirs.attention_scaling
    positions = torch.arange(0, 16384, 1111)[None]
    cos, sin = theirs(torch.zeros(1), positions)
    found = turns(rope, jnp.asarray(positions.numpy()), 128, jnp.float32)
    # half of each, for transformers has them twice
    for ours, expected in zip(found, (cos, sin), strict=True):
        np.testing.assert_allclose(ours[:, 0], expected.numpy()[..., :64], rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_written_is_read_again(name):
    """By transformers 5, from rope_parameters alone, and by earlier ones, from the other two."""
    rope = read_rope({"rope_parameters": RECIPES[name]})
    written = write_rope(rope)
    now = {"rope_parameters": written["rope_parameters"]}
    before = {name: written[name] for name in ("rope_theta", "rope_scaling")}
    assert read_rope(written) == read_rope(now) == read_rope(before) == rope
    assert {**dataclasses.asdict(rope), **RECIPES[name]} == dataclasses.asdict(rope)


def test_the_length_before_is_the_models_where_nothing_else_is_said():
    said = {"rope_type": "yarn", "factor": 2.0}
    rope = read_rope({"rope_parameters": said, "max_position_embeddings": 64})
    assert rope.original_max_position_embeddings == 64


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type must be one of .*'longrope'"),
        ({"rope_scaling": {"type": ["linear"]}}, r"rope_type must be one of .*\['linear'\]"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type='linear' lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be positive"),
        ({"rope_parameters": {**RECIPES["yarn"], "truncate": 1}}, "truncate must be True or False"),
        ({"rope_parameters": [1]}, "must be an object"),
        ({"rope_theta": 1}, "rope_theta must be above 1, got 1"),
        (
            {"rope_scaling": {**RECIPES["llama3"], "low_freq_factor": 0}},
            "low_freq_factor must be po",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "lacks original_max_position_embeddings",
        ),
        (
            {"rope_scaling": {**RECIPES["llama3"], "high_freq_factor": 1.0}},
            "high_freq_factor must be above low_freq_factor",
        ),
    ],
)
def test_what_cannot_be_computed_is_named(bare, raw, message):
    with pytest.raises(ValueError, match=message):
        read_rope(raw)
