"""Pairs that are conversations: which messages are the prompt, which tokens count, and what is
refused."""

import json
import shutil

import jax
import numpy as np
import pytest

import fjax
from experiments.common.prompts import answer_ids, chat_ids
from experiments.preference_pairs.__main__ import main
from experiments.preference_pairs.data import Pair, as_line, read_pairs, to_batch
from experiments.preference_pairs.make_pairs import main as make_pairs
from fjax.runs import RunError
from fjax.training import read_jsonl

from .commands import SMALL, TINY, run

TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w50', 'user': 'w51', 'assistant': 'w52'}[m.role] }} "
    "{{ m.content | trim }} {{ eos_token }} w59 {% endfor %}"
    "{% if add_generation_prompt %}w52{% endif %}"
)
"""Of words that the tiny tokenizer knows; behind the end of each turn stands a w59."""
END = 60


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ASKED = [user("w1 w2")]
LONG = [{"role": "system", "content": "w3"}, user("w4"), assistant("w5"), user("w6")]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(TINY, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def model(chatty):
    return fjax.from_pretrained(chatty)


def read(tmp_path, *lines, skip_bad=False):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return read_pairs(path, skip_bad=skip_bad)


@pytest.mark.parametrize("prompt", [ASKED, LONG], ids=["one message", "four"])
def test_a_conversation_may_be_written_in_many_ways(prompt, tmp_path):
    answers = {"chosen": [assistant("w7")], "rejected": [assistant("w8")]}
    whole = {name: [*prompt, *answer] for name, answer in answers.items()}
    lines = [
        {"prompt": prompt, **answers},
        {"prompt": prompt, **whole},
        {"prompt": prompt, "chosen": "w7", "rejected": "w8"},
        whole,
        {**whole, "rejected_ended": True, "source": 3},
    ]
    if prompt == ASKED:
        lines += [{"prompt": "w1 w2", **answers}, {"prompt": "w1 w2", **whole}]
    pairs, reports = read(tmp_path, *lines)
    assert pairs == [Pair(prompt, "w7", "w8")] * len(lines)
    assert reports == []
    assert read(tmp_path, json.loads(as_line(pairs[0])))[0] == pairs[:1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            {"chosen": [user("w1"), assistant("w7")], "rejected": [user("w2"), assistant("w8")]},
            'has no "prompt", and "chosen" and "rejected" begin with different messages',
        ),
        (
            {"prompt": [assistant("w1")], "chosen": "w7", "rejected": "w8"},
            'has a "prompt" that has no message of the user, so there is nothing to answer',
        ),
        (
            {"chosen": [assistant("w1"), assistant("w7")], "rejected": [assistant("w1")]},
            "has no message of the user before the answers",
        ),
        (
            {"chosen": [*ASKED, assistant("w7")], "rejected": [*ASKED, assistant("w7")]},
            'has the same conversation as "chosen" and "rejected"',
        ),
        (
            {"chosen": [*ASKED, assistant("w7")], "rejected": ASKED},
            'has a "rejected" with the messages of user, and its prompt has user',
        ),
        (
            {"prompt": ASKED, "chosen": [*LONG, assistant("w7")], "rejected": "w8"},
            'has a "chosen" with the messages of system, user, assistant, user, assistant, and',
        ),
        (
            {"chosen": [*ASKED, assistant("w7"), user("w1")], "rejected": [*ASKED, assistant("w")]},
            "what follows a prompt is one message of the assistant",
        ),
        (
            {"prompt": ASKED, "chosen": [{"role": "robot", "content": "w7"}], "rejected": "w8"},
            "has a message of 'robot'",
        ),
        ({"prompt": ASKED, "chosen": [{"role": "user"}], "rejected": "w8"}, "content is no text"),
        ({"chosen": [assistant("w7")], "rejected": "w8"}, "are not both conversations"),
        ({"prompt": ASKED, "chosen": [assistant(" ")], "rejected": "w8"}, 'has an empty "chosen"'),
        ({"prompt": ASKED, "chosen": "w7", "rejected": "w7"}, "has the same text as"),
        ({"prompt": [], "chosen": "w7", "rejected": "w8"}, 'has a "prompt" that is empty'),
        ({"prompt": ASKED, "chosen": "w7"}, 'has no "rejected"'),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_no_pair_of_conversations_is_named(line, reason, tmp_path):
    with pytest.raises(RunError) as error:
        read(tmp_path, line)
    assert f"1 of 1 lines of {tmp_path / 'pairs.jsonl'} are bad, first line 1 " in str(error.value)
    assert reason in str(error.value)
    pairs, (report,) = read(tmp_path, line, {"prompt": ASKED, "chosen": "w7", "rejected": "w8"}, skip_bad=True)  # fmt: skip
    assert len(pairs) == 1
    assert reason in report


def test_the_answer_counts_with_the_end_of_its_turn_and_nothing_behind_it(model):
    """The tokens are those that would be drawn: the prompt as it is sampled from, the answer as the
    template writes it, the end; not the w59 behind it. A text beside it starts with its own
    start."""
    log_prob_fn = jax.jit(fjax.make_log_prob_fn(model.logits_fn))
    score = lambda tokens, where: log_prob_fn(model.params, tokens, where)  # noqa: E731
    pairs = [
        Pair(ASKED, " w7 w8 ", "w9", rejected_ended=False),
        Pair("w1 w2", "w7 w8", "w9"),
        Pair(LONG, "w7", "w8 w9"),
    ]
    batch, reports = to_batch(pairs, model.tokenizer, score, max_tokens=24, ends=model.eos_ids)
    assert reports == []
    before = [51, 1, 2, END, 59, 52]
    chosen = np.asarray(batch.chosen_tokens).tolist()
    assert chosen[0][:9] == [*before, 7, 8, END]
    assert np.asarray(batch.rejected_tokens)[0][:8].tolist() == [*before, 9, 0]
    assert chosen[1][:6] == [END, 1, 2, 7, 8, END]
    assert np.flatnonzero(np.asarray(batch.chosen_where)[0]).tolist() == [6, 7, 8]
    assert np.flatnonzero(np.asarray(batch.rejected_where)[0]).tolist() == [6]
    assert np.flatnonzero(np.asarray(batch.chosen_where)[1]).tolist() == [3, 4, 5]
    counted = np.asarray(batch.chosen_where)[2]
    assert np.asarray(batch.chosen_tokens)[2][counted].tolist() == [7, END]
    whole = log_prob_fn(model.params, batch.chosen_tokens, batch.chosen_where)
    np.testing.assert_allclose(batch.chosen_log_a, whole, rtol=1e-5)


class Templated:
    """The tiny tokenizer with another template."""

    def __init__(self, tokenizer, template):
        self._tokenizer, self.chat_template = tokenizer, template

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *arguments, **options):
        return self._tokenizer(*arguments, **options)

    def apply_chat_template(self, messages, **options):
        given = {"chat_template": self.chat_template} | options
        return self._tokenizer.apply_chat_template(messages, **given)


def test_a_template_without_an_end_has_the_model_s(model):
    template = TEMPLATE.replace("{{ eos_token }} w59 ", "")
    tokenizer = Templated(model.tokenizer, template)
    assert chat_ids(tokenizer, ASKED, "it") == [51, 1, 2, 52]
    assert answer_ids(tokenizer, ASKED, "w7", [END], "it") == [7, END]


@pytest.mark.parametrize(
    ("template", "answer", "message"),
    [
        (None, "w7", "it is a conversation, and the tokenizer has no chat template"),
        ("{{ raise_exception('no answers here') }}", "w7", "fails on it, TemplateError: no answ"),
        (
            "{{ messages | length }} {% for m in messages %}{{ m.content }} {% endfor %}",
            "w7",
            "writes it otherwise once it is answered",
        ),
        (TEMPLATE, "w7 {} w8", "An answer to it spells an end token"),
    ],
)
def test_a_template_that_is_of_no_use_is_named(template, answer, message, model):
    tokenizer = Templated(model.tokenizer, template)
    answer = answer.format(model.tokenizer.eos_token)
    with pytest.raises(RunError) as error:
        answer_ids(tokenizer, ASKED, answer, [END], "it")
    assert message in str(error.value)


def says_w9(prompts, completions):
    """Prompts are conversations, as they were given."""
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [float("w9" in text.split()) for text in completions]


@pytest.mark.command
def test_pairs_of_conversations_are_made_and_trained_on(chatty, tmp_path, monkeypatch, capsys):
    lines = [{"prompt": [user(f"w1 w{i}")]} for i in range(1, 7)]
    for name, some in (("p", lines[:4]), ("unseen", lines[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in some))
    pairs = tmp_path / "pairs.jsonl"
    reward = "--reward", f"{__name__}:says_w9"
    made = ("--prompts", tmp_path / "p.jsonl", "--pairs-per-prompt", 4, "--max-new-tokens", 8)
    ours = ("--model", chatty, *reward)
    assert run(monkeypatch, make_pairs, *ours, *made, "--output", pairs) == 0
    written = read_jsonl(pairs)
    assert all(line["prompt"][0]["role"] == "user" for line in written)
    assert all("w9" in line["chosen"].split() for line in written)
    given = ("--pairs", pairs, "--unseen-prompts", tmp_path / "unseen.jsonl", "--pairs-per-step", 2)
    small = [chatty if word == TINY else word for word in SMALL]
    more = (*reward, "--prompts-per-batch", 2, "--steps", 2, "--run-folder", tmp_path / "run")
    assert run(monkeypatch, main, *given, *small, *more) == 0
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    last = [record for record in records if record["kind"] == "evaluation"][-1]
    assert np.isfinite([last["win_rate"], last["kl_to_base"]]).all()
