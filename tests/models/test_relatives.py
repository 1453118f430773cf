"""Every family from folders of transformers: the same numbers, and what is wrong with a folder."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax

from fjax import from_pretrained, save_pretrained
from fjax.models import llama, load_reward_model, save_reward_model
from fjax.models.base import family_of
from fjax.models.families import FAMILIES
from fjax.models.rope import Rope
from tests.make_fixtures import make_tokenizer
from tests.models import parity
from tests.models.folders import assert_same, change, edit_config, tensors_of, write

KINDS = [family for family in FAMILIES if family.config_type is llama.LlamaConfig]


@pytest.mark.parametrize("name", parity.CASES)
def test_the_numbers_are_those_of_torch(name, tmp_path):
    pytest.importorskip("torch")
    found = parity.compare_all(name, tmp_path)
    assert found.keys() == parity.BOUNDS.keys()
    assert not {check: x for check, x in found.items() if not x <= parity.BOUNDS[check]}


def test_committed_answers_of_torch():
    """Needs no torch."""
    model = from_pretrained(parity.FOLDER / "tiny-llama")
    with np.load(parity.FOLDER / "tiny-llama-torch.npz") as expected:
        found = parity.compare(model, dict(expected))
    assert not {check: x for check, x in found.items() if not x <= parity.BOUNDS[check]}


@pytest.mark.parametrize("family", KINDS, ids=lambda family: family.name)
def test_what_a_file_does_not_say_is_what_transformers_takes(family):
    """Both with a window that is no shorter than the texts, which transformers may take it to be."""
    transformers = pytest.importorskip("transformers")
    (kind,) = family.model_types
    window = {"sliding_window": None} if kind == "mistral" else {}
    theirs = transformers.AutoConfig.for_model(kind, **window).to_dict()
    ours = family.read_config({"model_type": kind, **window})
    assert ours.computes_as(family.read_config(theirs))


TINY = {
    "vocab_size": 61,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
}


def tiny(family, **fields):
    """A configuration of this family, with rotary positions that need all of its words."""
    rope = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    raw = {**TINY, "model_type": family.model_types[0], "rope_scaling": rope, "rope_theta": 1e5}
    return family.read_config(raw | {"sliding_window": None} | fields)


@pytest.mark.parametrize("family", KINDS, ids=lambda family: family.name)
def test_a_folder_comes_back_whole(family, tmp_path):
    """And says its rotary positions in the words of transformers 5 and of earlier ones."""
    config = tiny(family)
    params = family.init_params(config, jax.random.key(0))
    save_pretrained(tmp_path, params, config, make_tokenizer(), eos_ids=(60, 3))
    model = from_pretrained(tmp_path)
    assert_same(model.params, params)
    assert model.config.computes_as(config)
    assert family_of(model.config, FAMILIES) is family
    assert (model.bos_id, model.eos_ids, model.max_length) == (60, (60, 3), 24)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 1e5
    assert raw["rope_scaling"]["rope_type"] == raw["rope_parameters"]["rope_type"] == "llama3"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tied Llama with the initial weights."""
    folder = tmp_path_factory.mktemp("saved")
    config = tiny(llama.FAMILY, tie_word_embeddings=True)
    params = llama.init_params(config, jax.random.key(0))
    save_pretrained(folder, params, config, make_tokenizer())
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def untie(folder):
    edit_config(folder, tie_word_embeddings=False)


def without(folder, name):
    write(folder, {key: x for key, x in tensors_of(folder).items() if key != name})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: edit_config(f, model_type="rwkv"), "of type 'rwkv', .* known: .*gpt2, llama, "),
        (lambda f: edit_config(f, rope_scaling={"rope_type": "longrope"}), "got 'longrope'"),
        (lambda f: edit_config(f, rope_scaling={"type": "su"}), "rope_type must be one of .*'su'"),
        (
            lambda f: edit_config(f, model_type="mistral", sliding_window=23),
            "of no Mistral that fjax computes: it has sliding_window=23, below .*=24",
        ),
        (
            lambda f: edit_config(
                f,
                model_type="qwen2",
                use_sliding_window=True,
                max_window_layers=1,
                sliding_window=9,
            ),
            "sliding_window=9, below max_position_embeddings=24",
        ),
        (
            lambda f: edit_config(f, model_type="qwen3", layer_types=["linear_attention"] * 2),
            "it has layer_types=",
        ),
        (
            lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
            "holds quantised weights, which fjax does not read: .*gptq.* Save the model dequantised",
        ),
        (
            lambda f: edit_config(f, architectures=["LlamaForSequenceClassification"]),
            "holds a reward model, .*load_reward_model",
        ),
        (untie, "lack 1 tensors of this Llama: lm_head.weight"),
        (
            lambda f: without(f, "model.layers.1.mlp.up_proj.weight"),
            "lack 1 tensors of this Llama: layers.1.mlp.up_proj.weight",
        ),
        (
            lambda f: edit_config(f, attention_bias=True),
            "lack 8 tensors of this Llama: layers.0.self_attn.k_proj.bias",
        ),
        (
            lambda f: edit_config(f, model_type="qwen3"),
            "lack 4 tensors of this Qwen3: layers.0.self_attn.k_norm.weight",
        ),
        (
            lambda f: write(f, tensors_of(f) | {"model.layers.0.more.weight": jnp.zeros(2)}),
            "have 1 tensors that this Llama has not: layers.0.more.weight",
        ),
        (
            lambda f: change(f, "model.norm.weight", lambda x: x[:4]),
            r"norm.weight is \(4,\), not \(8,\)",
        ),
        (
            lambda f: write(f, tensors_of(f) | {"lm_head.weight": jnp.zeros((61, 8))}),
            "a lm_head.weight that differs from embed_tokens.weight",
        ),
        (
            lambda f: edit_config(f, model_type="gemma", use_bidirectional_attention=True),
            "of no Gemma that fjax computes: it has use_bidirectional_attention",
        ),
        (lambda f: edit_config(f, num_key_value_heads=3), "multiple of num_key_value_heads"),
        (lambda f: edit_config(f, num_hidden_layers="2"), "num_hidden_layers must be a whole"),
        (lambda f: edit_config(f, rms_norm_eps=None), "rms_norm_eps must be a number"),
        (lambda f: edit_config(f, tie_word_embeddings="yes"), "must be True or False, got 'yes'"),
        (lambda f: edit_config(f, hidden_act="xielu"), "hidden_act must be one of .*'xielu'"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(bare, folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_a_tied_head_and_old_buffers_may_be_in_the_file_as_well(folder):
    before = from_pretrained(folder).params
    tensors = tensors_of(folder)
    more = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": jnp.ones(1),
    }
    write(folder, tensors | more)
    assert_same(from_pretrained(folder).params, before)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_shards_of_half_precision_are_read(folder, dtype):
    """By fjax, and without torch."""
    tensors = {name: x.astype(dtype) for name, x in tensors_of(folder).items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        safetensors.flax.save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    model = from_pretrained(folder)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        name = llama.FAMILY.tensor_name(tuple(key.key for key in path))
        np.testing.assert_array_equal(leaf, tensors[name].astype(jnp.float32))
    assert model.save is not None
    model.save(folder / "again", model.params, dtype=dtype)
    again = tensors_of(folder / "again")
    assert {name: x.dtype for name, x in again.items()} == dict.fromkeys(tensors, dtype)
    assert_same(again, tensors)


def test_the_gate_of_the_first_gemmas_is_the_approximation_whatever_they_say():
    family = next(family for family in KINDS if family.name == "Gemma")
    said = {"model_type": "gemma", "hidden_act": "gelu"}
    assert family.read_config(said).hidden_act == "gelu_pytorch_tanh"


def test_a_configuration_that_its_model_type_has_no_words_for_is_not_written(tmp_path):
    config = tiny(llama.FAMILY)
    other = llama.LlamaConfig(**{**vars(config), "qk_norm": True})
    params = llama.init_params(other, jax.random.key(0))
    with pytest.raises(ValueError, match=r"config\.json of model_type 'llama' cannot say all of"):
        save_pretrained(tmp_path / "model", params, other, make_tokenizer())
    assert not (tmp_path / "model").exists()


def test_a_reward_model_has_no_head_for_tokens(tmp_path):
    """Of a body that was a language model with a head of its own, as whoever trains one has it."""
    config = tiny(llama.FAMILY)
    body = llama.init_params(config, jax.random.key(0))
    params = {"transformer": body, "score": {"kernel": jnp.ones((8, 1))}}
    save_reward_model(tmp_path, params, config, make_tokenizer(), text_format="text end")
    assert "lm_head.weight" not in tensors_of(tmp_path)
    reward = load_reward_model(tmp_path)
    assert reward.text_format == "text end"
    assert "lm_head" in body
    assert "lm_head" not in reward.params["transformer"]
    tokens, where = jnp.arange(12).reshape(2, 6), jnp.ones((2, 6), bool)
    np.testing.assert_array_equal(
        reward.score_fn(reward.params, tokens, where),
        llama.score_fn(config)(params, tokens, where),
    )
    assert Rope(**vars(reward.config.rope)) == config.rope
