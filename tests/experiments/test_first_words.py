"""--prefix and --instruction: what all texts of a task without prompts continue."""

import numpy as np
import pytest

from experiments.common.build import load_model, prompt_of
from experiments.common.settings import Settings
from experiments.moments.__main__ import main
from fjax.runs import RunError
from fjax.training import read_jsonl

from .commands import SMALL, TINY, run

TEMPLATE = (
    "{% for m in messages %}w51 {{ m.content }} w53 {% endfor %}"
    "{% if add_generation_prompt %}w52{% endif %}"
)
"""Of words that the tiny tokenizer knows."""


def starts(texts):
    """Whether the prefix is a part of what is scored."""
    return [text.split()[:2] == ["w1", "w2"] for text in texts]


def even(texts):
    return [sum(word[-1] in "02468" for word in text.split()) for text in texts]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_two_steps_with_a_prefix(monkeypatch, tmp_path):
    folder = tmp_path / "run"
    target = "--target", f"{__name__}:even", "--moment", 4, "--fit-samples", 64
    given = *target, *SMALL, "--prefix", "w1 w2 ", "--steps", 2, "--run-folder", folder
    assert run(monkeypatch, main, *given) == 0
    last = [r for r in read_jsonl(folder / "metrics.jsonl") if r["kind"] == "evaluation"][-1]
    assert np.isfinite(last["reverse_kl"])
    texts = [record["text"] for record in read_jsonl(folder / "samples.jsonl")]
    assert texts
    assert not all(starts(texts))


def test_the_tokens_before_a_text():
    model = load_model(Settings(model=str(TINY), prefix="w1 w2 ", max_new_tokens=4))
    tokenizer = model.tokenizer
    assert model.start_ids == (model.bos_id, *ids(tokenizer, "w1 w2"))
    tokenizer.chat_template = TEMPLATE
    asked = prompt_of(Settings(instruction="w7"), tokenizer)
    assert asked == tuple(ids(tokenizer, "w51 w7 w53 w52"))
    assert prompt_of(Settings(), tokenizer) == ()
    assert model._replace(prompt=()).start_ids == (model.bos_id,)


def test_a_prefix_needs_room():
    with pytest.raises(RunError, match="a prompt of 101 tokens"):
        load_model(Settings(model=str(TINY), prefix="w1 " * 100, max_new_tokens=100))


def test_what_is_refused(monkeypatch, capsys):
    both = "--prefix", "w1", "--instruction", "w2"
    target = "--target", f"{__name__}:even", "--moment", 4
    assert run(monkeypatch, main, *target, *SMALL, *both) == 2
    assert "both say what comes first" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, main, *target, *SMALL, "--instruction", "w2") == 2
    assert "has no chat template" in " ".join(capsys.readouterr().err.split())
    more = "--prompt", "w3", "--prefix", "w1"
    assert run(monkeypatch, main, *target, *SMALL, *more) == 2
    assert "this run of moments has some" in " ".join(capsys.readouterr().err.split())
