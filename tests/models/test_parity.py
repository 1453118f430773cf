"""The same numbers as transformers' torch GPT-2: logits, log-probabilities, gradients, greedy
decoding, both folders."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import from_pretrained, make_log_prob_fn, sample, save_pretrained
from fjax.models import gpt2
from fjax.models.huggingface.tensors import named_tensors
from fjax.sampling import greedy
from tests import make_fixtures

TINY = make_fixtures.FOLDER / "tiny-gpt2"
SMALL = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}


def compare(logits_fn, params, tokens, counted, expected):
    """Within 1e-4, 1e-3 and 1e-4 relative."""
    tokens, counted = jnp.asarray(tokens, jnp.int32), jnp.asarray(counted)
    log_prob_fn = make_log_prob_fn(logits_fn)

    @jax.jit
    def ours(params):
        log_pi, pull_back = jax.vjp(lambda params: log_prob_fn(params, tokens, counted), params)
        return logits_fn(params, tokens), log_pi, pull_back(jnp.ones_like(log_pi))[0]

    logits, log_pi, gradient = ours(params)
    gradients = named_tensors(gpt2.FAMILY, gradient)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(log_pi, expected["sequence_log_probs"], rtol=0, atol=1e-3)
    for key in expected:
        if key.startswith("gradient"):
            found, theirs = gradients["transformer." + key.removeprefix("gradient ")], expected[key]
            assert np.abs(found - theirs).max() <= 1e-4 * np.abs(theirs).max(), key


def continue_greedily(model, prompt, where=None, *, new_tokens=8):
    cache = model.init_cache(len(prompt), prompt.shape[1] + new_tokens)
    draw = jax.jit(
        partial(
            sample,
            model.decode_fn,
            max_new_tokens=new_tokens,
            eos_id=model.eos_id,
            transform=greedy,
        )
    )
    return draw(
        model.params, jax.random.key(0), jnp.asarray(prompt, jnp.int32), cache, where=where
    ).tokens


def test_committed_answers_of_torch():
    """Needs no torch: the fixtures are of tests/make_fixtures.py."""
    with np.load(make_fixtures.FOLDER / "tiny-gpt2-torch.npz") as expected:
        model = from_pretrained(TINY)
        compare(model.logits_fn, model.params, expected["tokens"], expected["counted"], expected)
        np.testing.assert_array_equal(
            continue_greedily(model, expected["tokens"][:, :4]), expected["greedy"]
        )


@pytest.mark.parametrize(
    ("shape", "scale"),
    [(make_fixtures.SHAPE, 4.0), (SMALL, 1.0)],
    ids=["tiny", "the shape of GPT-2 small"],
)
def test_torch(shape, scale):
    pytest.importorskip("torch")
    torch_model = make_fixtures.torch_gpt2(
        shape, eos_id=shape["vocab_size"] - 1, seed=1, scale=scale
    )
    tokens, counted = make_fixtures.batch(shape, rows=2, seed=1)
    expected = make_fixtures.torch_answers(torch_model, tokens, counted)
    config = gpt2.GPT2Config(**shape)
    tensors = {name: jnp.asarray(x.detach().numpy()) for name, x in torch_model.named_parameters()}
    like = jax.eval_shape(lambda: gpt2.init_params(config, jax.random.key(0)))
    params = jax.tree.unflatten(
        jax.tree.structure(like), [tensors[name] for name in named_tensors(gpt2.FAMILY, like)]
    )
    compare(gpt2.logits_fn(config), params, tokens, counted, expected)


def test_our_folder_opens_in_transformers(tmp_path):
    """With the same configuration, tokenizer, logits and parameters."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = gpt2.GPT2Config(**make_fixtures.SHAPE)
    params = jax.tree.map(lambda x: 3 * x, gpt2.init_params(config, jax.random.key(7)))
    save_pretrained(tmp_path / "model", params, config, make_fixtures.make_tokenizer())
    theirs, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, _ = make_fixtures.batch(make_fixtures.SHAPE)
    with torch.no_grad():
        logits = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    ours = from_pretrained(tmp_path / "model")
    np.testing.assert_allclose(
        ours.logits_fn(ours.params, jnp.asarray(tokens, jnp.int32)), logits, rtol=0, atol=1e-4
    )
    assert {k: getattr(theirs.config, k) for k in make_fixtures.SHAPE} == make_fixtures.SHAPE
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("w3 w14").input_ids == [3, 14]
    assert dataclasses.asdict(ours.config) == dataclasses.asdict(config)


def test_greedy_decoding_equals_generate_on_left_padded_prompts():
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    theirs, ours = AutoModelForCausalLM.from_pretrained(TINY).eval(), from_pretrained(TINY)
    tokens = make_fixtures.batch(make_fixtures.SHAPE, rows=6, columns=6, seed=4)[0]
    where = np.arange(6)[None] >= np.array([[0], [1], [2], [3], [4], [5]])
    expected = theirs.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(where.astype(int)),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=make_fixtures.EOS,
    )[:, 6:]
    found = continue_greedily(ours, tokens, jnp.asarray(where))
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected.numpy())
    assert (np.asarray(found)[:, expected.shape[1] :] == make_fixtures.EOS).all()
