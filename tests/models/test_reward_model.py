"""A scalar head on GPT-2: what it looks at, its folder, and the same scores from transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax

import fjax.models.huggingface
from fjax.models import RewardModel, from_pretrained, gpt2, load_reward_model, save_reward_model
from tests.make_fixtures import FOLDER, make_tokenizer
from tests.models.folders import edit_config

TINY = FOLDER / "tiny-gpt2"


@pytest.fixture(scope="module")
def model():
    base = from_pretrained(TINY)
    kernel = jax.random.normal(jax.random.key(0), (base.config.n_embd, 1))
    params = {"transformer": base.params, "score": {"kernel": kernel}}
    return RewardModel(base.config, params, base.tokenizer, gpt2.score_fn(base.config))


def batch():
    tokens = jax.random.randint(jax.random.key(1), (3, 6), 0, 60)
    return tokens, jnp.arange(6)[None] < jnp.array([6, 4, 2])[:, None]


def test_the_score_is_of_the_last_token_that_counts(model):
    tokens, where = batch()
    scores = model.score_fn(model.params, tokens, where)
    changed = model.score_fn(model.params, jnp.where(where, tokens, 7), where)
    np.testing.assert_array_equal(scores, changed)
    for i, length in enumerate((6, 4, 2)):
        alone = model.score_fn(
            model.params, tokens[i : i + 1, :length], jnp.ones((1, length), bool)
        )
        np.testing.assert_allclose(scores[i], alone[0], rtol=1e-5)
    assert model.score_fn(model.params, tokens.at[1, 3].set(8), where)[1] != scores[1]


def test_a_folder_comes_back_whole(model, tmp_path):
    save_reward_model(tmp_path / "reward", model.params, model.config, model.tokenizer)
    loaded = load_reward_model(tmp_path / "reward")
    # with a row for padding, which transformers needs
    embedding = loaded.params["transformer"]["wte"].pop("embedding")
    expected = {**model.params, "transformer": {**model.params["transformer"], "wte": {}}}
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
    np.testing.assert_array_equal(embedding[:61], model.params["transformer"]["wte"]["embedding"])
    assert embedding.shape == (62, 16)
    assert loaded.config.vocab_size == 62
    assert not embedding[61].any()
    loaded.params["transformer"]["wte"]["embedding"] = embedding
    np.testing.assert_array_equal(
        loaded.score_fn(loaded.params, *batch()), model.score_fn(model.params, *batch())
    )


def padded(tokenizer):
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def padded_by_the_end(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.mark.parametrize("prepare", [lambda tokenizer: tokenizer, padded, padded_by_the_end])
def test_padding_is_a_token_of_its_own(model, tmp_path, prepare):
    """What is saved again is not padded again, and the tokenizer that was given is left as it
    was."""
    tokenizer = prepare(make_tokenizer())
    before = tokenizer.pad_token_id
    for folder in (tmp_path / "once", tmp_path / "twice"):
        save_reward_model(folder, model.params, model.config, tokenizer)
        assert tokenizer.pad_token_id == before
        loaded = load_reward_model(folder)
        assert loaded.tokenizer.pad_token_id == 61
        assert loaded.tokenizer.eos_token_id == 60
        assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 61
        model, tokenizer, before = loaded, loaded.tokenizer, 61


def test_an_embedding_with_a_row_to_spare_is_not_enlarged(model, tmp_path):
    config = dataclasses.replace(model.config, vocab_size=64)
    transformer = {**model.params["transformer"], "wte": {"embedding": jnp.ones((64, 16))}}
    save_reward_model(
        tmp_path / "reward", {**model.params, "transformer": transformer}, config, model.tokenizer
    )
    loaded = load_reward_model(tmp_path / "reward")
    assert loaded.config == config
    np.testing.assert_array_equal(loaded.params["transformer"]["wte"]["embedding"], 1.0)


@pytest.mark.parametrize("text_format", [None, *fjax.models.huggingface.TEXT_FORMATS])
def test_the_folder_says_what_it_was_trained_on(model, tmp_path, text_format):
    save_reward_model(
        tmp_path / "reward", model.params, model.config, model.tokenizer, text_format=text_format
    )
    assert load_reward_model(tmp_path / "reward").text_format == text_format
    assert ("text_format" in (tmp_path / "reward" / "config.json").read_text()) is (
        text_format is not None
    )


def test_a_format_that_nobody_knows_is_refused(model, tmp_path):
    with pytest.raises(
        ValueError, match=r"text_format must be one of text, end text, .* got 'bos text'"
    ):
        save_reward_model(
            tmp_path / "reward", model.params, model.config, model.tokenizer, text_format="bos text"
        )
    assert not (tmp_path / "reward").exists()
    save_reward_model(tmp_path / "reward", model.params, model.config, model.tokenizer)
    path = tmp_path / "reward" / "config.json"
    for wrong in ("bos text", ["text"], 1):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"text_format": wrong}))
        with pytest.raises(ValueError, match=r"in its config.json; fjax knows text, end text, "):
            load_reward_model(tmp_path / "reward")


def test_a_head_of_two_labels_or_with_more_beside_it_is_refused(model, tmp_path):
    folder = tmp_path / "reward"
    save_reward_model(folder, model.params, model.config, model.tokenizer)
    tensors = safetensors.flax.load_file(folder / "model.safetensors")
    safetensors.flax.save_file(tensors | {"score.bias": jnp.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensors that this GPT-2 has not: score.bias"):
        load_reward_model(folder)
    safetensors.flax.save_file(
        tensors | {"score.weight": jnp.zeros((2, 16))}, folder / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"of shape \(1, 16\), and has one of shape \(2, 16\)"):
        load_reward_model(folder)
    safetensors.flax.save_file(
        tensors | {"score.weight": jnp.full((1, 16), jnp.nan)}, folder / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"not finite in float32: score.weight"):
        load_reward_model(folder)


def test_a_reward_model_is_no_language_model(model, tmp_path):
    save_reward_model(tmp_path / "reward", model.params, model.config, model.tokenizer)
    refusal = r"holds a reward model, \['GPT2ForSequenceClassification'\], .*load_reward_model"
    with pytest.raises(ValueError, match=refusal):
        from_pretrained(tmp_path / "reward")
    edit_config(tmp_path / "reward", architectures=None)
    with pytest.raises(ValueError, match=r"tensors that this GPT-2 has not: score.weight"):
        from_pretrained(tmp_path / "reward")


def test_a_language_model_is_no_reward_model():
    with pytest.raises(
        ValueError,
        match=r"is no reward model: it needs a score.weight of shape \(1, 16\), and has none",
    ):
        load_reward_model(TINY)


def test_transformers_gives_the_same_scores(model, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    save_reward_model(tmp_path / "reward", model.params, model.config, model.tokenizer)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    tokens, where = batch()
    for i, length in enumerate((6, 4, 2)):
        row = np.asarray(tokens[i : i + 1, :length])
        with torch.no_grad():
            logits = theirs(torch.tensor(row, dtype=torch.long)).logits.numpy()
        found = model.score_fn(model.params, tokens, where)[i]
        np.testing.assert_allclose(found, logits[0, 0], atol=1e-4)


def test_transformers_gives_the_same_scores_to_a_padded_batch(model, tmp_path):
    """Of texts of several lengths, some with the end token last. Were that the padding, those would
    be scored one early."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    save_reward_model(tmp_path / "reward", model.params, model.config, model.tokenizer)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    texts = ["w1 w2 w3 w4 w5", "w7", "w8 w9<|endoftext|>", "<|endoftext|>w1 w2 w3<|endoftext|>"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = theirs(**batch).logits[:, 0].numpy()
    rows = [jnp.asarray(tokenizer(text).input_ids)[None] for text in texts]
    alone = [float(model.score_fn(model.params, row, jnp.ones(row.shape, bool))[0]) for row in rows]
    np.testing.assert_allclose(scores, alone, atol=1e-4)
    assert np.ptp(alone) > 0.1
