"""A scalar head on GPT-2: what it looks at, its folder, and the same scores from transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax.models import RewardModel, from_pretrained, gpt2, load_reward_model, save_reward_model
from tests.make_fixtures import FOLDER

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
        alone = model.score_fn(model.params, tokens[i : i + 1, :length], jnp.ones((1, length), bool))
        np.testing.assert_allclose(scores[i], alone[0], rtol=1e-5)
    assert model.score_fn(model.params, tokens.at[1, 3].set(8), where)[1] != scores[1]


def test_a_folder_comes_back_whole(model, tmp_path):
    save_reward_model(tmp_path / "reward", model.params, model.config, model.tokenizer)
    loaded = load_reward_model(tmp_path / "reward")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    np.testing.assert_array_equal(loaded.score_fn(loaded.params, *batch()), model.score_fn(model.params, *batch()))


def test_a_language_model_is_no_reward_model():
    with pytest.raises(ValueError, match=r"is no reward model: it needs a score.weight of shape \(1, 16\), and has none"):
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
