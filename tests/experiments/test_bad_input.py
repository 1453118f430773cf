"""What people get wrong, or the system refuses: their functions, broken files, a full disk. One sentence, and status 2."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _command
from experiments._display import Display
from experiments._evaluate import Evaluation, Figure, Target
from experiments._python import load_function
from experiments._run_folder import RunError
from experiments.conditional import run as conditional
from experiments.gender_balance.config import Config as GenderConfig
from experiments.gender_balance.config import parse_moments
from experiments.gender_balance.run import make_features
from experiments.sentiment_reward import run as sentiment
from experiments.sentiment_reward.config import Config as SentimentConfig

from .commands import SMALL, run

HERE = "tests.experiments.test_bad_input"
TEXTS = ["a film .", "another film ."]


def leaves(*_):
    sys.exit(0)


def interrupts(*_):
    raise KeyboardInterrupt


def takes_nothing():
    return [1.0, 2.0]


class Strange:
    def __array__(self, *_, **__):
        raise ValueError("not as an array")

    def __repr__(self):
        return "strange" * 1000


def numbers(texts):
    yield from (1.0 for _ in texts)


async def later(texts):
    return [1.0 for _ in texts]


BAD_REWARDS = {
    "SystemExit": (leaves, "mine failed on 2 texts, SystemExit: 0 (test_bad_input.py, line"),
    "KeyboardInterrupt": (interrupts, "mine failed on 2 texts, KeyboardInterrupt"),
    "too few arguments": (takes_nothing, "takes 0 positional arguments but 1 was given"),
    "generator": (numbers, "must return one number a text, got generator for 2 texts"),
    "None": (lambda texts: None, "got NoneType for 2 texts"),
    "a number": (lambda texts: 1.0, "got float of shape () for 2 texts"),
    "too many": (lambda texts: [1.0, 2.0, 3.0], "got list of shape (3,) for 2 texts"),
    "a column": (lambda texts: np.ones((2, 1)), "got ndarray of shape (2, 1) for 2 texts"),
    "ragged": (lambda texts: [[1.0], [1.0, 2.0]], "got list for 2 texts"),
    "numerals": (lambda texts: ["1.0", "2.0"], "got list of str for 2 texts"),
    "a None among them": (lambda texts: [1.0, None], "got list of object for 2 texts"),
    "complex": (lambda texts: [1.0, 1j], "got list of complex128 for 2 texts"),
    "NaN": (lambda texts: [1.0, float("nan")], "returned nan for the text 'another film .'"),
    "infinite": (lambda texts: [1.0, float("-inf")], "returned -inf for the text 'another film .'"),
    "beyond float32": (lambda texts: [1.0, 1e300], "returned 1e+300 for the text 'another film .'"),
    "strange": (lambda texts: Strange(), "got Strange for 2 texts"),
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_a_reward_that_is_none_is_a_sentence(name):
    function, message = BAD_REWARDS[name]
    with pytest.raises(RunError) as raised:
        sentiment.checked(function, "mine")(TEXTS)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "answer",
    [[1, 2], (True, False), np.float64([1, 2]), np.int8([1, 2]), jnp.bfloat16([1, 2]), jnp.float32([1, 2])],
    ids=lambda x: f"{type(x).__name__} {getattr(x, 'dtype', '')}",
)
def test_numbers_of_any_kind_are_rewards(answer):
    values = sentiment.checked(lambda texts: answer, "mine")(TEXTS)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, [float(x) for x in answer])


def test_what_a_reward_does_with_its_arguments_and_answers_later_changes_nothing():
    """A list emptied by the function, and one array that it fills again and again."""
    held = np.zeros(2, np.float32)

    def reward(texts):
        held[:] = [len(text) for text in texts]
        texts.clear()
        return held

    checked, texts = sentiment.checked(reward, "mine"), list(TEXTS)
    first = checked(texts)
    checked(["", ""])
    assert texts == TEXTS
    assert first.tolist() == [8, 14]


BAD_PREDICATES = {
    "SystemExit": (leaves, "SystemExit: 0"),
    "array": (lambda prompt, text: np.array([True, False]), "must answer True or False: it gave array([ True, False])"),
    "array of one": (lambda prompt, text: np.array([True]), "must answer True or False: it gave array([ True])"),
    "jax array": (lambda prompt, text: jnp.ones(3), "must answer True or False"),
    "empty list": (lambda prompt, text: [], "must answer True or False: it gave []"),
    "None": (lambda prompt, text: None, "must answer True or False: it gave None"),
    "numeral": (lambda prompt, text: "1", "must answer True or False: it gave '1'"),
    "NaN": (lambda prompt, text: float("nan"), "must answer True or False: it gave nan"),
    "half": (lambda prompt, text: 0.5, "must answer True or False: it gave 0.5"),
    "generator": (lambda prompt, text: (x for x in text), "must answer True or False: it gave <generator"),
    "strange": (lambda prompt, text: Strange(), "must answer True or False: it gave strange"),
    "one argument": (lambda text: True, "takes 1 positional argument but 2 were given"),
}


@pytest.mark.parametrize("name", BAD_PREDICATES)
def test_a_predicate_that_is_none_is_a_sentence(name):
    function, message = BAD_PREDICATES[name]
    with pytest.raises(RunError) as raised:
        conditional.checked(function, "mine")("a prompt", " and more" * 1000)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("answer", [True, 1, 1.0, np.bool_(True), np.float32(1), np.array(True), jnp.array(True), jnp.array(1)])
def test_one_truth_of_any_kind_is_an_answer(answer):
    assert conditional.checked(lambda prompt, text: answer, "mine")("a", "b") is True


def test_leaving_from_within_a_reward_is_an_error_of_the_reward(monkeypatch, capsys):
    arguments = ("--reward", f"{HERE}:leaves", *SMALL)
    assert run(monkeypatch, SentimentConfig, sentiment.main, *arguments) == 2
    assert "test_bad_input:leaves failed on 2 texts, SystemExit: 0" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("body", ["import sys; sys.exit(0)", "raise KeyboardInterrupt", "def f(:", "f = 1 / 0", "f = 3"])
def test_a_module_that_cannot_be_had_is_a_sentence(body, tmp_path, monkeypatch):
    name = f"mine_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunError, match=rf"--reward {name}:f (cannot be imported|is int, not a function)"):
        load_function(f"{name}:f", "--reward")


ESCAPE = "\x1b[31m\x1b]0;title\x07red\x1b[0m [bold]bold[/] \u202eback\r\n\x9b2J end"
PLAIN = ESCAPE.translate({ord(c): "\N{REPLACEMENT CHARACTER}" for c in "\x1b\x07\u202e\x9b"}).replace("\r\n", " ")


def test_a_sample_cannot_steer_the_terminal(monkeypatch, capsys):
    """Nor can the name of a figure, a title, a word, or what a library says of an error."""
    target = Target(lambda *_: {}, lambda *_: np.zeros(1), headline="x", bound="x")
    feature = {"x": np.ones(1), ESCAPE: np.ones(1)}
    evaluation = Evaluation({"x": Figure(1.0), ESCAPE: Figure(2.0), "forward_kl": Figure(0.1)}, [ESCAPE], [ESCAPE], feature)
    display = Display()
    monkeypatch.setattr(display._console, "width", 300)
    display.evaluation(evaluation, 0, target)
    display.beside({}, evaluation, target, first=ESCAPE, last="after")
    display.table("moments", ("feature", "base"), [(ESCAPE, "1")])
    display.warn(ESCAPE)
    printed = capsys.readouterr().out
    assert not {c for c in printed if not c.isprintable()} - {"\n"}
    assert printed.count(PLAIN) == 3 + 5 + 1 + 1
    assert _command._fail(ESCAPE) == 2
    assert PLAIN in capsys.readouterr().err


RECORD = ("step", "kind", "samples", "seconds", "text", "prompt", "woman", "balance", "entropy", "log_z", "a", "a_std_error")


def test_words_never_take_the_place_of_a_figure():
    """Whatever a moment is of, its name is its own: in a record there are only those of figures and settings besides."""
    config = GenderConfig(woman="she", moments=tuple(f"{name}=0.5" for name in RECORD))
    features = make_features(config, ["a step of a woman", "kind", ""])
    figures = {f"{name}{suffix}" for name in features for suffix in ("", "_std_error", "_ess")}
    assert len(figures) == 3 * (3 + len(RECORD))
    assert not figures & {name for name in RECORD if name not in ("woman", "balance")}
    assert features["woman"].tolist() == [0, 0, 0]
    assert features["[woman]"].tolist() == [1, 0, 0]
    assert features["[step]"].tolist() == [1, 0, 0]


@pytest.mark.parametrize("moment", ["love|=0.1", "|love=0.1", "a||b=0.5", "a| |b=0.5", "|=0.1", "=0.1", "a=nan", "a=inf", "a="])
def test_a_moment_of_no_word_is_refused(moment):
    with pytest.raises(ValueError, match='are "word=rate"'):
        parse_moments((moment,))
