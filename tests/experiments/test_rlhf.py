"""Prompts and rewards of one's own on the tiny model with a chat template: what rewards are given,
what evaluations show, and what is refused before any step."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import fjax
from experiments.common import reward_model
from experiments.common.prompt_files import Prompt
from experiments.common.rewards import of_prompts
from experiments.common.settings import Settings
from experiments.rlhf.__main__ import main
from experiments.rlhf.config import Config
from experiments.rlhf.target import TASK, make_target, reward_names
from fjax.models import RewardModel
from fjax.runs import RunError
from fjax.training import read_jsonl

from .commands import SMALL, TINY, build, run

HERE = "tests.experiments.test_rlhf"
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w50', 'user': 'w51', 'assistant': 'w52'}[m.role] }} "
    "{{ m.content }} w53 {% endfor %}{% if add_generation_prompt %}w52{% endif %}"
)
"""Of words that the tiny tokenizer knows."""


def share(completions):
    """The share of w9 among the words."""
    return [text.split().count("w9") / max(len(text.split()), 1) for text in completions]


def answered(prompts, completions, answer):
    return [float(word in text.split()) for word, text in zip(answer, completions, strict=True)]


def by_name(completions, **columns):
    assert sorted(columns) == ["answer", "prompts"]
    return [float(len(prompt)) for prompt in columns["prompts"]]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(TINY, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Conversations and texts, with a column."""
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    lines = [{"prompt": f"w1 w{i}", "answer": f"w{i}"} for i in range(4)]
    lines += [
        {"messages": [{"role": "user", "content": f"w2 w{i}"}], "answer": f"w{i}"}
        for i in range(4, 8)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.mark.command
@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
def test_two_steps_on_prompts(algorithm, monkeypatch, chatty, prompts, tmp_path, capsys):
    folder = tmp_path / "run"
    given = ("--prompts", prompts, "--prompts-per-step", 2, "--z-samples", 16, "--beta", 0.5)
    rewards = ("--reward", f"{HERE}:share", f"{HERE}:answered", "--reward-weights", 1, 0.25)
    model = [chatty if word == TINY else word for word in SMALL]
    ours = ("--algorithm", algorithm, "--steps", 2, "--run-folder", folder)
    assert run(monkeypatch, main, *given, *rewards, *model, *ours) == 0
    assert "continuing 2 unseen prompts" in " ".join(capsys.readouterr().out.split())
    last = [r for r in read_jsonl(folder / "metrics.jsonl") if r["kind"] == "evaluation"][-1]
    assert np.isfinite([last[name] for name in ("reward", "kl_to_base", "reverse_kl")]).all()
    both = last["reward_share"] + 0.25 * last["reward_answered"]
    np.testing.assert_allclose(last["reward"], both, atol=1e-6)
    assert {r["prompt"] for r in read_jsonl(folder / "contexts.jsonl")} == {"w1 w3", "w2 w7"}


def test_a_bounded_reward_is_measured_by_exact_samples_of_each_prompt(
    monkeypatch, chatty, prompts, tmp_path, capsys
):
    """By f-DPG, with the base model's share; and p has a column of its own, the mean over
    prompts."""
    given = ("--prompts", prompts, "--prompts-per-step", 2, "--z-samples", 8, "--beta", 0.5)
    bounded = ("--reward", f"{HERE}:share", "--reward-max", 1)
    model = [chatty if word == TINY else word for word in SMALL[:-2]]
    exact = ("--exact-samples", 40, "--exact-folder", tmp_path / "exact")
    ours = ("--steps", 1, "--run-folder", tmp_path / "run")
    assert run(monkeypatch, main, *given, *bounded, *model, *exact, *ours) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Measured by 40 exact samples of p of 2 prompts, drawn once from" in printed
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    of_p = next(r for r in records if r["kind"] == "target")
    first = next(r for r in records if r["kind"] == "evaluation")
    assert of_p["exact_samples"] == first["exact_samples"] == 40
    log_z = [r["log_z"] for r in read_jsonl(tmp_path / "run" / "contexts.jsonl") if r["step"] == 0]
    np.testing.assert_allclose(np.mean(log_z), of_p["log_z"], rtol=1e-5)
    # Rewards are of few samples; that p tilts towards them is in log Z, which is E_a[exp(r/β)].
    assert 0 < of_p["log_z"] < 2


def test_a_reward_is_given_what_its_signature_asks_for():
    """The completions alone; prompts, completions and columns; or all by their names."""
    messages = [{"role": "user", "content": "w2"}]
    prompts = [
        Prompt("w1", {"answer": "w3", "more": 1}),
        Prompt(messages, {"answer": "w4", "more": 2}, 2, messages),
    ]
    seen = []

    def positional(questions, answers, answer, scale=2.0):
        seen.append((questions, answers, answer, scale))
        return [0.0] * 2

    def everything(questions, answers, **columns):
        seen.append(columns)
        return [0.0] * 2

    def named(answer, completions):
        seen.append((answer, completions))
        return [0.0] * 2

    def alone(texts, scale=3.0):
        seen.append((texts, scale))
        return [0.0] * 2

    for function in (positional, everything, named, alone):
        of_prompts(function, "mine", prompts)(prompts, ["a", "b"])
    columns = {"answer": ["w3", "w4"], "more": [1, 2]}
    given = ["w1", messages], ["a", "b"]
    assert seen == [
        (*given, columns["answer"], 2.0),
        columns,
        (columns["answer"], given[1]),
        (given[1], 3.0),
    ]


def test_one_that_was_written_for_trl_is_given_all_by_name(prompts):
    config = Config(prompts=prompts, reward=(f"{HERE}:by_name",))
    features = make_target(config).features
    asked = [Prompt("w1", {"answer": "w3"}), Prompt("w10", {"answer": "w4"})]
    assert features(asked, ["a", "b"])["reward"].tolist() == [2.0, 3.0]


def test_rewards_add_up_and_count_no_more_than_the_most(prompts):
    names = f"{HERE}:share", f"{HERE}:answered"
    config = Config(
        prompts=prompts, reward=names, reward_weights=(1.0, 0.5), reward_max=1.2, beta=0.5
    )
    target = make_target(config)
    asked = [Prompt("w1", {"answer": "w3"})] * 3
    found = target.features(asked, ["w9 w9", "w3 w9", "w9 w3"])
    assert found["reward_share"].tolist() == [1.0, 0.5, 0.5]
    assert found["reward"].tolist() == [1.0, 1.0, 1.0]
    assert target.features(asked[:1], ["w9"] * 1)["reward_answered"].tolist() == [0.0]
    log_a = np.zeros(3, np.float32)
    np.testing.assert_allclose(target.log_score(log_a, found), [2.0, 2.0, 2.0])
    assert target.log_bound == pytest.approx(2.4)
    best = make_target(Config(prompts=prompts, reward=names, reward_max=1.2))
    assert best.features(asked[:1], ["w9 w3"] * 1)["reward"] == pytest.approx(1.2)


def test_a_reward_model_scores_prompt_and_answer(chatty, monkeypatch):
    """Texts between its end tokens, conversations through its template; of what is too long, the end,
    where the answer is."""
    monkeypatch.setattr(reward_model, "score_rows", lambda model, rows: [*map(list, rows)])
    messages = [{"role": "user", "content": "w2"}]
    prompts = [Prompt("w1"), Prompt(messages, messages=messages), Prompt("w3", messages=messages)]
    tokenizer = fjax.from_pretrained(chatty).tokenizer
    model = RewardModel(SimpleNamespace(max_length=9), None, tokenizer, None, "end text end")
    answers = [" w4 w5", "w6", " w7"]
    found = reward_model.score_answers(model, prompts, answers)
    assert found == [[60, 1, 4, 5, 60], [51, 2, 53, 52, 6, 53], [51, 2, 53, 52, 7, 53]]
    short = model._replace(config=SimpleNamespace(max_length=3))
    found = reward_model.score_answers(short, prompts, answers)
    assert found == [[4, 5, 60], [52, 6, 53], [52, 7, 53]]
    tokenizer.chat_template = None
    with pytest.raises(RunError, match="the tokenizer has no chat template"):
        reward_model.score_answers(model, prompts, answers)


def test_rewards_have_names_of_their_own():
    assert reward_names(["a:f", "b:f", "models/f", "sentiment"]) == [
        *("reward_f", "reward_f_2", "reward_f_3", "reward_sentiment")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": ()}, "--reward needs at least one"),
        ({"reward_weights": (1.0, 2.0)}, "got 2 for the 1 of --reward"),
        ({"prompts": None}, "--prompts is needed for a model of your own"),
        ({"reward": (f"{HERE}:missing",)}, "asks for 'question', which 8 of 8 prompts have not"),
        ({"reward": (f"{HERE}:missing",)}, "columns are 'answer'"),
        ({"reward": (f"{HERE}:nan",)}, "returned nan for the text ' and a continuation'"),
        ({"reward": (f"{HERE}:one",)}, "must return one number a text, got list of shape (1,)"),
        ({"prompt_column": "question"}, "Line 1 of"),
        ({"system": "Be brief.", "prompts": None, "settings": Settings()}, "--system goes with"),
    ],
)
def test_bad_input_is_named_before_the_model_is_loaded(options, message, prompts):
    small = Settings(model=str(TINY), samples=16, max_new_tokens=8)
    given = {"prompts": prompts, "reward": (f"{HERE}:share",), "settings": small} | options
    with pytest.raises((ValueError, RunError)) as error:
        TASK.make_target(Config(**given))
    assert message in str(error.value)


def test_a_model_without_a_chat_template_is_refused_for_conversations(prompts):
    small = Settings(model=str(TINY), samples=16, max_new_tokens=8)
    with pytest.raises(RunError, match=r"line 5 of .* has no chat template"):
        build(TASK, Config(prompts=prompts, reward=(f"{HERE}:share",), settings=small))


def missing(prompts, completions, question):
    return [0.0] * len(completions)


def nan(completions):
    return [float("nan")] * len(completions)


def one(completions):
    return [1.0]
