"""Adapters in PEFT's format: the same logits there and here, both ways; what is refused by name."""

import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax

from fjax import from_pretrained, save_pretrained
from fjax.adapters import attach_lora, init_lora, merge_lora
from fjax.models import llama, load_adapters, load_reward_model, save_adapters
from tests import make_fixtures
from tests.models.folders import TINY, assert_same

KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 7))


def moved(params, *, rank=2, pattern="", seed=1):
    """Adapters that training may have led to."""
    draw = np.random.default_rng(seed).normal
    adapters = init_lora(params, KEY, rank=rank, pattern=pattern)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * draw(size=x.shape), x.dtype), adapters)


def logits(model, params):
    return np.asarray(model.logits_fn(params, jnp.asarray(TOKENS, jnp.int32)))


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def edit(folder, **changes):
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | changes))


def tensors_of(folder):
    return safetensors.flax.load_file(folder / "adapter_model.safetensors")


def write(folder, tensors):
    safetensors.flax.save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture
def saved(model, tmp_path):
    """Of attention, with α = 3."""
    adapters, folder = moved(model.params, pattern="attn"), tmp_path / "adapters"
    save_adapters(folder, adapters, model.config, alpha=3.0, base_model=TINY)
    return folder


@pytest.mark.parametrize("pattern", ["attn|mlp", "h_1/mlp", "wte|wpe"])
def test_what_is_written_is_read_bit_for_bit(model, tmp_path, pattern):
    adapters = moved(model.params, pattern=pattern)
    save_adapters(tmp_path / "adapters", adapters, model.config, alpha=3.0)
    found, alpha = load_adapters(tmp_path / "adapters", model.params, model.config)
    assert alpha == 3
    assert_same(found, adapters)


def test_the_folder_is_as_peft_describes_its_own(saved):
    """By hand: c_attn of [16, 48] is A [2, 16] and B [48, 2]."""
    described = config_of(saved)
    assert described["target_modules"] == ["attn.c_proj", "c_attn"]  # the MLP has a c_proj, too
    expected = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3,
        "fan_in_fan_out": True,
        "bias": "none",
    }
    assert {name: described[name] for name in expected} == expected
    assert described["base_model_name_or_path"] == str(TINY)
    tensors = tensors_of(saved)
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_{}.weight"
    assert tensors[name.format("A")].shape == (2, 16)
    assert tensors[name.format("B")].shape == (48, 2)
    assert len(tensors) == 2 * 2 * 2
    mode = (saved / "adapter_config.json").stat().st_mode
    assert (saved / "adapter_model.safetensors").stat().st_mode == mode


def test_ranks_may_differ_and_alpha_may_be_left_out(model, tmp_path):
    adapters = moved(model.params, pattern="h_0/attn") | moved(
        model.params, rank=3, pattern="h_1/attn/c_attn"
    )
    save_adapters(tmp_path / "adapters", adapters, model.config)
    name = "transformer.h.1.attn.c_attn"
    described = config_of(tmp_path / "adapters")
    assert described["rank_pattern"] == described["alpha_pattern"] == {name: 3}
    assert described["target_modules"] == ["0.attn.c_proj", "c_attn"]
    found, alpha = load_adapters(tmp_path / "adapters", model.params, model.config)
    merged = merge_lora(model.params, found, alpha=alpha)
    expected = merge_lora(model.params, adapters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, expected)


def test_a_folder_of_adapters_is_a_model(model, saved):
    """By the base model that it names."""
    found, alpha = load_adapters(saved, model.params, model.config)
    opened = from_pretrained(saved)
    assert_same(opened.params, merge_lora(model.params, found, alpha=alpha))
    assert opened.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert from_pretrained(saved, shapes_only=True).config == model.config


def test_a_model_with_adapters_beside_it_is_saved_as_a_whole(model, saved, tmp_path):
    found, alpha = load_adapters(saved, model.params, model.config)
    model.save(tmp_path / "whole", attach_lora(model.params, found, alpha=alpha))
    whole, expected = from_pretrained(tmp_path / "whole").params, from_pretrained(saved).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, expected)


def test_scales_of_each_module_are_in_up(model, saved):
    """α/√r, and an α of its own."""
    plain, _ = load_adapters(saved, model.params, model.config)
    edit(saved, use_rslora=True, alpha_pattern={"1.attn.c_attn": 6})
    found, alpha = load_adapters(saved, model.params, model.config)
    assert alpha == pytest.approx(3 * 2**0.5)
    for path, adapter in found.items():
        factor = 2 if path == "h_1/attn/c_attn/kernel" else 1
        np.testing.assert_array_equal(adapter["up"], factor * plain[path]["up"])


def without(name):
    return lambda f: write(f, {k: v for k, v in tensors_of(f).items() if name not in k})


def change(name, by):
    return lambda f: write(f, {k: by(v) if name in k else v for k, v in tensors_of(f).items()})


def renamed(old, new):
    return lambda f: write(f, {k.replace(old, new): v for k, v in tensors_of(f).items()})


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, "has no adapter_config"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "has no adapter_mod"),
        (lambda f: (f / "adapter_model.safetensors").write_text("x"), ValueError, "not a whole"),
        (lambda f: edit(f, peft_type="IA3"), ValueError, "not plain LoRA.*: peft_type='IA3'"),
        (lambda f: edit(f, use_dora=True), ValueError, "not plain LoRA.*: use_dora=True. Merge"),
        (lambda f: edit(f, bias="all"), ValueError, "bias='all'"),
        (lambda f: edit(f, modules_to_save=["lm_head"]), ValueError, r"modules_to_save=\['lm_head'\]"),
        (lambda f: edit(f, init_lora_weights="pissa"), ValueError, "init_lora_weights='pissa'"),
        (lambda f: edit(f, of_next_year={"x": 1}), ValueError, "of_next_year={'x': 1}"),
        (lambda f: edit(f, lora_alpha=0), ValueError, "a positive number for lora_alpha, and has 0"),
        (lambda f: edit(f, r=None), ValueError, "a positive number for r, and has None"),
        (without("h.0.attn.c_attn.lora_B"), ValueError, "must have A and B .* it has base_model.model."
         "transformer.h.0.attn.c_attn.lora_A.weight"),
        (without("lora"), ValueError, "it has no tensor"),
        (change("h.1.attn.c_attn.lora_A", lambda x: x * jnp.nan), ValueError,
         "not finite: transformer.h.1.attn.c_attn"),
        (change("c_attn.lora_B", lambda x: x[:40]), ValueError,
         r"another base model .'.*tiny-gpt2'., of other shapes than this GPT-2: transformer.h.0.attn.c_attn has A "
         r"\[2, 16\] and B \[40, 2\], not \[r, 16\] and \[48, r\]"),
        (renamed("h.1.attn", "h.7.attn"), ValueError,
         r"another base model .'.*tiny-gpt2'.: this GPT-2 has no h.7.attn.c_attn, h.7.attn.c_proj to "
         r"adapt. There are h.N.attn.c_attn, h.N.attn.c_proj, h.N.mlp.c_fc"),
        (renamed("h.1.attn.c_attn", "wte"), ValueError, "of other shapes than this GPT-2: transformer.wte"),
    ],
)  # fmt: skip
def test_what_are_no_adapters_of_this_model_is_said(model, saved, spoil, error, message):
    spoil(saved)
    with pytest.raises(error, match=message):
        load_adapters(saved, model.params, model.config)


@pytest.mark.parametrize("spoil", ["wte", "lm_head"])
def test_an_embedding_and_its_head_change_together(model, tmp_path, spoil):
    """They are one matrix here; in a folder one of them may be missing, or be another."""
    adapters, folder = moved(model.params, pattern="wte"), tmp_path / "adapters"
    save_adapters(folder, adapters, model.config)
    assert config_of(folder)["ensure_weight_tying"]
    assert config_of(folder)["target_modules"] == ["lm_head", "wte"]
    whole = tensors_of(folder)
    assert len(whole) == 4
    for change_it in (change(f"{spoil}.lora", lambda x: 2 * x), without(f"{spoil}.lora")):
        change_it(folder)
        with pytest.raises(ValueError, match=r"change transformer\.wte and lm_head differently"):
            load_adapters(folder, model.params, model.config)
        write(folder, whole)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"base_model_name_or_path": None}, ValueError, "names no base model"),
        ({"base_model_name_or_path": "/no/such/folder"}, FileNotFoundError,
         "adapters, whose base model is not there: There is no folder /no/such/folder"),
        ({"base_model_name_or_path": "itself"}, ValueError, "has an adapter_config.json itself"),
        ({"use_dora": True}, ValueError, "not plain LoRA"),
    ],
)  # fmt: skip
def test_adapters_that_are_no_model_are_answered_in_a_sentence(saved, changes, error, message):
    if changes.get("base_model_name_or_path") == "itself":
        changes = {"base_model_name_or_path": str(saved)}
    edit(saved, **changes)
    with pytest.raises(error, match=message):
        from_pretrained(saved)


def test_adapters_are_no_reward_model(saved):
    with pytest.raises(ValueError, match="adapters, which fjax adds to language models alone"):
        load_reward_model(saved)


def test_adapters_of_what_is_not_there_are_not_written(model, tmp_path):
    adapter = {"down": jnp.ones((16, 1)), "up": jnp.ones((1, 5))}
    for path, message in (("wxe", "'wxe', which is not in params"), ("ln_f/scale", "for a matrix")):
        with pytest.raises(ValueError, match=re.escape(message)):
            save_adapters(tmp_path / "adapters", {path: adapter}, model.config)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


@pytest.fixture(scope="module", params=["GPT-2", "Llama, head tied", "Llama, head apart"])
def base(request, tmp_path_factory):
    """A folder, and its model."""
    if request.param == "GPT-2":
        return TINY, from_pretrained(TINY)
    folder = tmp_path_factory.mktemp("llama")
    config = llama.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=24,
        initializer_range=0.3, tie_word_embeddings="tied" in request.param,
    )  # fmt: skip
    params = llama.init_params(config, KEY)
    save_pretrained(folder, params, config, make_fixtures.make_tokenizer())
    return folder, from_pretrained(folder)


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def torch_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * abs(theirs).max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pattern", ["attn|mlp", "1/mlp", ""])
def test_peft_reads_them_and_gives_the_same_logits(peft, base, tmp_path, pattern):
    """Embeddings and the head among them, tied or not."""
    folder, model = base
    adapters = moved(model.params, pattern=pattern)
    save_adapters(tmp_path / "adapters", adapters, model.config, alpha=3.0, base_model=folder)
    ours = logits(model, attach_lora(model.params, adapters, alpha=3.0))
    assert abs(ours - logits(model, model.params)).max() > 0.1 * abs(ours).max()
    theirs = peft.PeftModel.from_pretrained(torch_model(folder), tmp_path / "adapters")
    assert_close(ours, torch_logits(theirs))
    if pattern:  # an embedding that is the head too would be changed twice
        assert_close(ours, torch_logits(theirs.merge_and_unload()))


OF_GPT2 = [
    {"target_modules": ["c_attn", "c_fc"], "lora_alpha": 5},
    {"target_modules": r".*h\.1\.mlp\.c_.*", "use_rslora": True, "lora_alpha": 5},
    {"target_modules": ["c_proj"], "rank_pattern": {"h.1.attn.c_proj": 4},
     "alpha_pattern": {r"h.\d.mlp.c_proj": 1}},
    {"target_modules": ["wte", "lm_head", "c_attn"], "ensure_weight_tying": True},
]  # fmt: skip
OF_LLAMA = [
    {"target_modules": "all-linear", "lora_alpha": 5},
    {"target_modules": r".*layers\.1\..*_proj", "use_rslora": True},
    {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True},
]


@pytest.mark.filterwarnings("ignore")
def test_those_of_peft_are_read(peft, base, tmp_path):
    """Lists and regular expressions, scales of all kinds, embeddings."""
    import torch

    folder, model = base
    torch.manual_seed(0)
    before = logits(model, model.params)
    for options in OF_GPT2 if folder == TINY else OF_LLAMA:
        config = peft.LoraConfig(
            r=2, fan_in_fan_out=folder == TINY, init_lora_weights=False, **options
        )
        theirs = peft.get_peft_model(torch_model(folder), config)
        theirs.save_pretrained(tmp_path / "adapters")
        adapters, alpha = load_adapters(tmp_path / "adapters", model.params, model.config)
        ours = logits(model, merge_lora(model.params, adapters, alpha=alpha))
        assert_close(ours, torch_logits(theirs))
        assert abs(ours - before).max() > 0.1 * abs(ours).max()


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_that_peft_adapted_alone_is_refused(peft, model, tmp_path):
    """There the head, which is the same array, stays as it is."""
    config = peft.LoraConfig(target_modules=["wte"], init_lora_weights=False)
    peft.get_peft_model(torch_model(TINY), config).save_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match=r"change transformer\.wte and lm_head differently"):
        load_adapters(tmp_path / "adapters", model.params, model.config)
