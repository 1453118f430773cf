"""Where a text begins and at which tokens it ends: what the files of a folder say, and which counts."""

import json

import jax.numpy as jnp
import pytest

import fjax
from tests.make_fixtures import make_tokenizer
from tests.models.folders import assert_same


def describe(folder, **files):
    """The ends that each file names; None takes the file's field away."""
    for name, ends in files.items():
        path = folder / f"{name}.json"
        found = json.loads(path.read_text())
        found.pop("eos_token_id")
        path.write_text(json.dumps(found if ends is None else found | {"eos_token_id": ends}))


@pytest.mark.parametrize(
    ("generation_config", "config", "ends"),
    [
        (60, 60, (60,)),
        ([3, 60], 60, (60, 3)),
        ([3, 5, 3], 7, (60, 3, 5)),
        (5, [7], (60, 5)),
        (None, [7, 8], (60, 7, 8)),
        (None, None, (60,)),
        ([], 7, (60,)),
        ([61, -1, 4], 7, (60, 4)),
    ],
)
def test_the_ends_are_the_tokenizers_and_those_of_the_generation(
    folder, generation_config, config, ends
):
    """The tokenizer's is the first. config.json is asked where generation_config.json says nothing,
    and ids that the vocabulary has not end nothing."""
    describe(folder, generation_config=generation_config, config=config)
    model = fjax.from_pretrained(folder)
    assert model.eos_ids == ends
    assert model.eos_id == 60


def test_without_a_generation_config_the_configuration_is_asked(folder):
    describe(folder, config=[9, 60])
    (folder / "generation_config.json").unlink()
    assert fjax.from_pretrained(folder).eos_ids == (60, 9)


@pytest.mark.parametrize("wrong", ["60", [3, 4.0], True, {"a": 1}])
def test_an_end_that_is_no_token_is_named(bare, folder, wrong):
    describe(folder, generation_config=wrong)
    with pytest.raises(ValueError, match=r"eos_token_id in .*model must be a token id or a list"):
        fjax.from_pretrained(folder)


def test_a_text_begins_with_the_end_where_there_is_no_beginning(folder):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "w5"
    tokenizer.save_pretrained(folder)
    assert fjax.from_pretrained(folder).bos_id == 5
    tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    assert fjax.from_pretrained(folder).bos_id == 60


def test_several_ends_are_saved_and_one_takes_their_place(folder, model, tmp_path):
    """transformers reads them too; the file that it looks into first never says what was there
    before."""
    transformers = pytest.importorskip("transformers")
    describe(folder, generation_config=[3, 60])
    loaded, target = fjax.from_pretrained(folder), tmp_path / "new"
    loaded.save(target, loaded.params, dtype=jnp.float16)
    assert fjax.from_pretrained(target).eos_ids == (60, 3)
    assert transformers.GenerationConfig.from_pretrained(target).eos_token_id == [60, 3]
    assert transformers.AutoConfig.from_pretrained(target).eos_token_id == [60, 3]
    model.save(target, model.params)
    assert fjax.from_pretrained(target).eos_ids == (60,)
    assert_same(fjax.from_pretrained(target).params, model.params)


def test_one_end_is_written_too(model, tmp_path):
    model.save(tmp_path / "new", model.params)
    loaded = fjax.from_pretrained(tmp_path / "new")
    assert (loaded.max_length, loaded.bos_id, loaded.eos_ids) == (24, 60, (60,))
    written = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (60, 60)
