"""The model card: what the hub reads of it, figures of the very model that was exported, and nobody
else's file written over."""

import json

import numpy as np
import pytest
from huggingface_hub import metadata_load

from experiments.common.cards import base_card
from fjax.runs import card
from tests.runs.test_report import ABOUT, evaluation, run_folder

CONFIG = {
    "model": "/home/me/small-model",
    "seed": 7,
    "divergence": "jensen_shannon",
    "max_new_tokens": 9,
    "aim": {"target": "p(x) ∝ a(x)·[<great> in x]", "headlines": ["satisfaction"]},
}
SAMPLES = [
    {"step": 0, "text": "a film"},
    {"step": 5, "text": "a *great*\nfilm | <b>", "prompt": "It is"},
    {"step": 10, "text": "too far"},
]


@pytest.fixture
def folder(tmp_path):
    found = [
        evaluation(step, satisfaction=(value, error), reverse_kl=(kl, 0.5))
        for step, value, error, kl in ((0, 0.02, 0.004, np.inf), (5, 0.8, 0.013, 1.5), (10, 0.9, 0.01, 9.0))
    ]  # fmt: skip
    folder = tmp_path / "great-0"
    (folder / "model").mkdir(parents=True)
    run_folder(folder, found, SAMPLES)
    (folder / "config.json").write_text(json.dumps(CONFIG | ABOUT))
    return folder


def rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_its_figures_are_those_of_the_step_that_was_exported(folder):
    text = card.page(folder, 5)
    assert ["", "before (step 0)", "after (step 5)"] in [["", *row[-2:]] for row in rows(text)]
    assert ["satisfaction", "0.0200 ± 0.0040", "0.800 ± 0.013"] in rows(text)
    assert "satisfaction 0.020 → 0.80" in text
    assert "5,000 samples in 5 steps, 300 s" in text
    assert "0.9" not in text
    assert "too far" not in text


def test_it_says_how_the_model_was_made_and_is_used(folder):
    text = card.page(folder, 10)
    assert f"```bash\n{ABOUT['command']}\n```" in text
    for line in ("**Seed.** 7", "**Base model.** small-model", "**On.** H100 (fjax 1.0, jax 2.0)"):
        assert line in text
    assert "/home/me" not in text
    assert "max_new_tokens=9" in text
    assert '\ntext = start + "It is"  # or' in text
    (code,) = text.split("```python\n")[1:]
    compile(code.split("```")[0], "card", "exec")


def test_what_a_model_wrote_is_no_markup(folder):
    text = card.page(folder, 5)
    assert r"**It is** a \*great\* film \| &lt;b>" in text
    assert r"p(x) ∝ a(x)·\[&lt;great> in x\]" in text


def test_the_hub_reads_its_front_matter(folder):
    card.write(folder, 5, {"base_model": "me/base", "license": "apache-2.0"})
    text = (folder / "model" / "README.md").read_text()
    assert "**Licence.** apache-2.0, as the base model's" in text
    assert "Licence" not in card.page(folder, 5)
    assert metadata_load(folder / "model" / "README.md") == {
        "base_model": "me/base",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fjax", "alignment", "jensen-shannon"],
    }


def test_a_page_of_somebody_else_stays(folder):
    path = folder / "model" / "README.md"
    for theirs in (b"my notes", "nöte".encode("latin-1")):
        path.write_bytes(theirs)
        card.write(folder, 5)
        assert path.read_bytes() == theirs
    path.unlink()
    card.write(folder, 5)
    ours = path.read_text()
    card.write(folder, 10)
    assert path.read_text() != ours
    path.write_text(ours.replace(card.MARK, ""))
    card.write(folder, 10)
    assert path.read_text() == ours.replace(card.MARK, "")


def test_without_an_exported_model_there_is_none(folder):
    (folder / "model").rmdir()
    card.write(folder, 5)
    assert not (folder / "model").exists()


@pytest.mark.parametrize(
    ("page", "known"),
    [
        ("---\nlicense: mit\nlanguage: [en, de]\ntags: [x]\n---\n# x", {"license": "mit", "language": ["en", "de"]}),
        ("# no front matter", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        (None, {}),
    ],
)  # fmt: skip
def test_of_a_folder_what_its_own_card_says_is_known(page, known, tmp_path):
    if page is not None:
        (tmp_path / "README.md").write_text(page)
    assert base_card(str(tmp_path)) == known


def test_of_a_name_on_the_hub_the_name_is_known():
    assert base_card("gpt2") == {"base_model": "gpt2"}
    assert base_card("me/small-1.5") == {"base_model": "me/small-1.5"}
    assert base_card("built-in") == {"language": "en", "license": "cc-by-4.0"}
    assert base_card("../not/there") == {}
