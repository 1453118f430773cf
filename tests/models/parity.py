"""transformers' torch models with random weights, family by family, and what differs from them.

tests/models/test_relatives.py holds each difference below its bound; ``python -m
tests.parity_table`` prints them all. Needs torch, which is imported on use; with it, ``python -m
tests.models.parity`` writes anew what is among the fixtures.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax import from_pretrained, make_log_prob_fn, sample
from fjax.models import LanguageModel, load_reward_model
from fjax.models.base import family_of
from fjax.models.families import FAMILIES
from fjax.models.huggingface.tensors import named_tensors
from fjax.sampling import greedy
from tests.make_fixtures import EOS, FOLDER, make_tokenizer

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 2.0,
    "original_max_position_embeddings": 12,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": (
        "gpt2",
        {"vocab_size": 61, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2},
    ),
    "Llama": ("llama", SHAPE),
    "Llama, tied, biases, llama3": (
        "llama",
        SHAPE
        | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
        | {"rope_parameters": LLAMA3},
    ),
    "Llama, wide heads, yarn": ("llama", SHAPE | {"head_dim": 6, "rope_parameters": YARN}),
    "Llama, linear": (
        "llama",
        SHAPE | {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 50.0}},
    ),
    "Mistral": ("mistral", SHAPE | {"sliding_window": 24, "num_key_value_heads": 1}),
    "Qwen2": ("qwen2", SHAPE | {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", SHAPE | {"head_dim": 8}),
    "Gemma": ("gemma", SHAPE | {"head_dim": 6, "num_key_value_heads": 1}),
}
"""Name -> transformers' model_type and its configuration."""

COMMITTED = "Llama, tied, biases, llama3"
"""The case whose folder and answers are among the fixtures."""

BOUNDS = {
    "logits": 1e-4,
    "logits behind padding": 1e-4,
    "log-probs": 1e-4,
    "gradient": 1e-4,
    "greedy": 0.0,
    "written": 1e-4,
    "reward": 1e-4,
}
"""Largest difference allowed of each check, in float32: absolute, of a tensor's largest entry for
gradients, in tokens for greedy decoding."""


class Pair(NamedTuple):
    """One model twice."""

    theirs: Any
    ours: LanguageModel


def torch_model(name: str, *, kind: str = "AutoModelForCausalLM", **options: Any) -> Any:
    """transformers' model with random weights, biases and norms among them."""
    import torch
    import transformers

    model_type, shape = CASES[name]
    ends = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS}
    config = transformers.AutoConfig.for_model(model_type, **shape, **ends, **options)
    torch.manual_seed(0)
    model = getattr(transformers, kind).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter + 0.2 * noise)
    return model


def make_pair(name: str, folder: Path, **saving: Any) -> Pair:
    """Written by transformers, read by fjax."""
    theirs = torch_model(name)
    theirs.save_pretrained(folder, **saving)
    make_tokenizer().save_pretrained(folder)
    return Pair(theirs, from_pretrained(folder))


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and which are real: prompts of several lengths, padded on the left."""
    tokens = np.random.default_rng(0).integers(0, 60, (4, 12))
    return tokens, np.arange(12)[None] >= np.array([[0], [2], [5], [7]])


def torch_numbers(model: Any, new_tokens: int = 8) -> dict[str, np.ndarray]:
    """What torch computes of `batch`: logits with and without padding, log-probabilities of
    sequences, the gradient of their sum, greedy decoding behind the padding."""
    import torch

    tokens, where = batch()
    ids, mask = torch.tensor(tokens), torch.tensor(where.astype(int))
    logits = model(ids).logits
    log_probs = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    log_pi = (log_probs * torch.tensor(counted()[:, 1:])).sum(-1)
    model.zero_grad()
    log_pi.sum().backward()
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": EOS}
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clip(0)
        padded = model(ids, attention_mask=mask, position_ids=positions).logits
        greedy_tokens = model.generate(ids, attention_mask=mask, **options)[:, 12:]
    gradient = {f"gradient {name}": x.grad.numpy() for name, x in model.named_parameters()}
    return {
        "logits": logits.detach().numpy(),
        "padded": padded.numpy(),
        "log_pi": log_pi.detach().numpy(),
        "greedy": greedy_tokens.numpy(),
        **gradient,
    }


def compare(model: LanguageModel, expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far fjax is from `torch_numbers`."""
    tokens, where = batch()
    log_prob_fn = make_log_prob_fn(model.logits_fn)

    @jax.jit
    def ours(params, tokens, where, counted):
        log_pi, pull_back = jax.vjp(lambda params: log_prob_fn(params, tokens, counted), params)
        plain = model.logits_fn(params, tokens)
        padded = model.logits_fn(params, tokens, where)
        return plain, padded, log_pi, pull_back(jnp.ones_like(log_pi))[0]

    plain, padded, log_pi, gradient = ours(
        model.params, jnp.asarray(tokens, jnp.int32), jnp.asarray(where), jnp.asarray(counted())
    )
    gradients = named_tensors(family_of(model.config, FAMILIES), gradient)
    theirs = {key.removeprefix("gradient "): expected[key] for key in expected if " " in key}
    assert gradients.keys() == theirs.keys()
    found = continue_greedily(model, tokens, where, 8)[:, : expected["greedy"].shape[1]]
    return {
        "logits": _largest(plain, expected["logits"]),
        "logits behind padding": _largest(padded[where], expected["padded"][where]),
        "log-probs": _largest(log_pi, expected["log_pi"]),
        "gradient": max(_largest(gradients[n], x) / np.abs(x).max() for n, x in theirs.items()),
        "greedy": float((found != expected["greedy"]).sum()),
    }


def continue_greedily(
    model: LanguageModel, tokens: np.ndarray, where: np.ndarray, new_tokens: int
) -> np.ndarray:
    """The most likely tokens one after another, with a cache."""
    options = {"max_new_tokens": new_tokens, "eos_id": model.eos_ids, "transform": greedy}
    draw = jax.jit(partial(sample, model.decode_fn, **options))
    cache = model.init_cache(len(tokens), tokens.shape[1] + new_tokens)
    prompt = jnp.asarray(tokens, jnp.int32)
    found = draw(model.params, jax.random.key(0), prompt, cache, where=jnp.asarray(where))
    return np.asarray(found.tokens)


def counted() -> np.ndarray:
    """The tokens of the batch that count: completions of several lengths."""
    return np.arange(12)[None] >= np.array([[3], [5], [2], [11]])


def compare_written(pair: Pair, folder: Path) -> float:
    """Logits of transformers from the folder that fjax writes."""
    import torch
    from transformers import AutoModelForCausalLM

    assert pair.ours.save is not None
    pair.ours.save(folder, pair.ours.params)
    again, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.tensor(batch()[0])
    with torch.no_grad():
        found, expected = (model.eval()(tokens).logits for model in (again, pair.theirs))
    return _largest(found.numpy(), expected.numpy())


def compare_reward(name: str, folder: Path) -> float:
    """Scores of the model with a scalar head, of a batch that is padded on the right."""
    import torch

    theirs = torch_model(name, kind="AutoModelForSequenceClassification", num_labels=1)
    theirs.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    ours = load_reward_model(folder)
    tokens, where = batch()[0], np.arange(12)[None] < np.array([[12], [9], [4], [1]])
    tokens = np.where(where, tokens, EOS)
    with torch.no_grad():
        mask = torch.tensor(where.astype(int))
        expected = theirs(torch.tensor(tokens), attention_mask=mask).logits[:, 0].numpy()
    found = jax.jit(ours.score_fn)(ours.params, jnp.asarray(tokens, jnp.int32), jnp.asarray(where))
    return _largest(found, expected)


def compare_all(name: str, folder: Path) -> dict[str, float]:
    """Every check of one family; the keys of `BOUNDS`."""
    pair = make_pair(name, folder / "theirs")
    return {
        **compare(pair.ours, torch_numbers(pair.theirs)),
        "written": compare_written(pair, folder / "ours"),
        "reward": compare_reward(name, folder / "reward"),
    }


def main() -> None:
    """Writes one of them and what torch computes of it, for machines without torch."""
    model = torch_model(COMMITTED)
    model.save_pretrained(FOLDER / "tiny-llama")
    make_tokenizer().save_pretrained(FOLDER / "tiny-llama")
    np.savez_compressed(FOLDER / "tiny-llama-torch.npz", **torch_numbers(model))


def _largest(found, expected) -> float:
    return float(np.abs(np.asarray(found) - expected).max())


if __name__ == "__main__":
    main()
