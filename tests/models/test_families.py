"""A family from outside is a value: its folders are read, sampled, scored, trained and written."""

import dataclasses
import logging
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fjax
from fjax.models import FAMILIES, Family, gpt2, load_reward_model, save_reward_model
from tests.make_fixtures import make_tokenizer
from tests.models.folders import TINY, assert_same, edit_config


@dataclasses.dataclass(frozen=True)
class BagConfig:
    """Of a model that predicts from the sum of the embeddings so far, in whatever order."""

    vocab_size: int = 61
    width: int = 8
    max_length: int | None = None
    depth: int = 0


class BagCache(NamedTuple):
    total: jax.Array


def init_params(config, rng_key, *, param_dtype=jnp.float32):
    embed, head = jax.random.normal(rng_key, (2, config.vocab_size, config.width), param_dtype)
    return {"embed": {"weight": embed}, "head": {"weight": head}}


def bag_logits(config, *, dtype=jnp.float32):
    def logits_fn(params, tokens, where=None, *, start=0):
        seen = params["embed"]["weight"][tokens].astype(dtype)
        seen = seen if where is None else jnp.where(where[..., None], seen, 0)
        return jnp.cumsum(seen, axis=1)[:, start:] @ params["head"]["weight"].T

    return logits_fn


def bag_decode(config, *, dtype=jnp.float32):
    def decode_fn(params, tokens, cache, where=None):
        seen = params["embed"]["weight"][tokens].astype(dtype)
        seen = seen if where is None else jnp.where(where[..., None], seen, 0)
        total = cache.total + seen.sum(axis=1)
        return total @ params["head"]["weight"].T, BagCache(total)

    return decode_fn


BAG = Family(
    name="bag of embeddings",
    model_types=("bag",),
    config_type=BagConfig,
    read_config=lambda raw: BagConfig(raw["vocab_size"], raw["width"]),
    write_config=lambda config: {"model_type": "bag"} | dataclasses.asdict(config),
    init_params=init_params,
    tensor_name=".".join,
    logits_fn=bag_logits,
    decode_fn=bag_decode,
    init_cache=lambda config, rows, columns, *, dtype=jnp.float32: BagCache(
        jnp.zeros((rows, config.width), dtype)
    ),
)


@pytest.fixture
def bag(tmp_path):
    params = init_params(BagConfig(), jax.random.key(0))
    fjax.save_pretrained(
        tmp_path / "bag", params, BagConfig(), make_tokenizer(), families=(BAG, *FAMILIES)
    )
    return tmp_path / "bag"


def test_a_family_of_ones_own_is_loaded_sampled_scored_trained_and_saved(bag, tmp_path):
    model = fjax.from_pretrained(bag, families=(BAG, *FAMILIES))
    assert model.config == BagConfig()
    assert (model.max_length, model.bos_id, model.eos_ids) == (None, 60, (60,))
    assert_same(model.params, init_params(BagConfig(), jax.random.key(0)))

    prompt = jnp.full((32, 1), model.bos_id)
    draw = partial(fjax.sample, model.decode_fn, max_new_tokens=6, eos_id=model.eos_ids)
    samples = jax.jit(draw)(model.params, jax.random.key(1), prompt, model.init_cache(32, 7))
    tokens, where = fjax.log_probs.pack(prompt, samples.tokens, where=samples.where)
    score = fjax.make_log_prob_fn(model.logits_fn)
    np.testing.assert_allclose(
        score(model.params, tokens, where), samples.sequence_log_probs, atol=1e-4
    )

    tuner = fjax.fdpg(score, optax.sgd(0.1), divergence=fjax.forward_kl())
    log_q = samples.sequence_log_probs
    rollout = fjax.Rollout(tokens, where, log_q, log_q + (tokens < 30).sum(1))
    state, info = jax.jit(tuner.update)(tuner.init(model.params), rollout)
    assert bool(info.finite)
    assert (state.params["head"]["weight"] != model.params["head"]["weight"]).any()

    model.save(tmp_path / "tuned", state.params)
    assert_same(fjax.from_pretrained(tmp_path / "tuned", families=(BAG,)).params, state.params)


def test_nothing_is_said_of_a_kind_that_transformers_does_not_know(bag, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    fjax.from_pretrained(bag, families=(BAG,))
    logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_a_type_that_no_family_has_is_answered_with_those_that_exist(bag):
    with pytest.raises(
        ValueError,
        match=r"of type 'bag', which is none of .* known: .*gpt2, .* A family of your own",
    ):
        fjax.from_pretrained(bag)
    edit_config(bag, model_type="rnn")
    with pytest.raises(
        ValueError, match=r"of type 'rnn', which is none of .* known: bag, .*gpt2, "
    ):
        fjax.from_pretrained(bag, families=(*FAMILIES, BAG))
    edit_config(bag, model_type=["bag"])
    with pytest.raises(ValueError, match=r"of type \['bag'\], which is none of"):
        fjax.from_pretrained(bag, families=(*FAMILIES, BAG))


def test_a_configuration_of_no_family_is_named(tmp_path):
    params = init_params(BagConfig(), jax.random.key(0))
    with pytest.raises(ValueError, match="config is a BagConfig, and must be one of GPT2Config"):
        fjax.save_pretrained(tmp_path / "bag", params, BagConfig(), make_tokenizer())


def test_a_family_without_reward_models_says_so(bag, tmp_path):
    with pytest.raises(ValueError, match="holds a bag of embeddings, and that family has no rewa"):
        load_reward_model(bag, families=(BAG,))
    params = {"transformer": init_params(BagConfig(), jax.random.key(0)), "score": None}
    with pytest.raises(ValueError, match="bag of embeddings is a family without reward models"):
        save_reward_model(tmp_path / "r", params, BagConfig(), make_tokenizer(), families=(BAG,))


def test_what_a_family_does_not_read_is_named_with_the_folder(bag):
    def refuse(raw):
        raise ValueError("it has stripes.")

    with pytest.raises(
        ValueError, match=r"The config.json in .*bag is of no bag of .*: it has str"
    ):
        fjax.from_pretrained(bag, families=(BAG._replace(read_config=refuse),))


def test_gpt2_reads_the_other_names_of_transformers():
    transformers = pytest.importorskip("transformers")
    assert transformers.GPT2Config.attribute_map == gpt2._ALIASES


def test_a_folder_is_read_by_the_families_that_are_given():
    with pytest.raises(ValueError, match=r"of type 'gpt2', which is none of .* known: bag\. "):
        fjax.from_pretrained(TINY, families=(BAG,))
