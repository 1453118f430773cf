"""What people get wrong, or the system refuses: their functions, broken files, a full disk. One
sentence, and status 2."""

import io
import json
import os
import sys
import types
from errno import EACCES, ENOENT, ENOSPC
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import command, rewards
from experiments.common.build import load_model
from experiments.common.functions import load_function
from experiments.common.settings import Settings
from experiments.compare import __main__ as compare
from experiments.conditional import plot
from experiments.conditional import target as conditional
from experiments.gender_balance.config import Config as GenderConfig
from experiments.gender_balance.config import parse_moments
from experiments.gender_balance.target import make_features
from experiments.preference_pairs import make_pairs
from experiments.preference_pairs.data import read_pairs
from experiments.sentiment_reward.__main__ import main as sentiment
from experiments.tools import evaluate, generate, gradient_noise, kl_gradients, tabulate
from fjax.evaluation import Evaluation, Scored
from fjax.evaluation.figures import figure
from fjax.runs.aim import Aim
from fjax.runs.display import Display, hardware
from fjax.runs.folder import OpenRun, describe_run, write_text
from fjax.runs.reading import RunError

from .commands import SMALL, TINY, run

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
        rewards.checked(function, "mine")(TEXTS)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2],
        (True, False),
        np.float64([1, 2]),
        np.int8([1, 2]),
        jnp.bfloat16([1, 2]),
        jnp.float32([1, 2]),
    ],
    ids=lambda x: f"{type(x).__name__} {getattr(x, 'dtype', '')}",
)
def test_numbers_of_any_kind_are_rewards(answer):
    values = rewards.checked(lambda texts: answer, "mine")(TEXTS)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, [float(x) for x in answer])


def test_what_a_reward_does_with_its_arguments_and_answers_later_changes_nothing():
    """A list emptied by the function, and one array that it fills again and again."""
    held = np.zeros(2, np.float32)

    def reward(texts):
        held[:] = [len(text) for text in texts]
        texts.clear()
        return held

    checked, texts = rewards.checked(reward, "mine"), list(TEXTS)
    first = checked(texts)
    checked(["", ""])
    assert texts == TEXTS
    assert first.tolist() == [8, 14]


BAD_PREDICATES = {
    "SystemExit": (leaves, "SystemExit: 0"),
    "array": (
        lambda prompt, text: np.array([True, False]),
        "must answer True or False: it gave array([ True, False])",
    ),
    "array of one": (
        lambda prompt, text: np.array([True]),
        "must answer True or False: it gave array([ True])",
    ),
    "jax array": (lambda prompt, text: jnp.ones(3), "must answer True or False"),
    "empty list": (lambda prompt, text: [], "must answer True or False: it gave []"),
    "None": (lambda prompt, text: None, "must answer True or False: it gave None"),
    "numeral": (lambda prompt, text: "1", "must answer True or False: it gave '1'"),
    "NaN": (lambda prompt, text: float("nan"), "must answer True or False: it gave nan"),
    "half": (lambda prompt, text: 0.5, "must answer True or False: it gave 0.5"),
    "generator": (
        lambda prompt, text: (x for x in text),
        "must answer True or False: it gave <generator",
    ),
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


@pytest.mark.parametrize(
    "answer",
    [True, 1, 1.0, np.bool_(True), np.float32(1), np.array(True), jnp.array(True), jnp.array(1)],
)
def test_one_truth_of_any_kind_is_an_answer(answer):
    assert conditional.checked(lambda prompt, text: answer, "mine")("a", "b") is True


def test_leaving_from_within_a_reward_is_an_error_of_the_reward(monkeypatch, capsys):
    arguments = ("--reward", f"{HERE}:leaves", *SMALL)
    assert run(monkeypatch, sentiment, *arguments) == 2
    assert "test_bad_input:leaves failed on 2 texts, SystemExit: 0" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    "body", ["import sys; sys.exit(0)", "raise KeyboardInterrupt", "def f(:", "f = 1 / 0", "f = 3"]
)
def test_a_module_that_cannot_be_had_is_a_sentence(body, tmp_path, monkeypatch):
    name = f"mine_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        RunError, match=rf"--reward {name}:f (cannot be imported|is int, not a function)"
    ):
        load_function(f"{name}:f", "--reward")


ESCAPE = "\x1b[31m\x1b]0;title\x07red\x1b[0m [bold]bold[/] \u202eback\r\n\x9b2J end"
PLAIN = ESCAPE.translate(
    {ord(c): "\N{REPLACEMENT CHARACTER}" for c in "\x1b\x07\u202e\x9b"}
).replace("\r\n", " ")


def test_a_sample_cannot_steer_the_terminal(monkeypatch, capsys):
    """Nor can the name of a figure, a title, a word, or what a library says of an error."""
    aim = Aim(ESCAPE, ("x",), bound="x")
    feature, one = {"x": np.ones(1), ESCAPE: np.ones(1)}, np.zeros(1)
    texts = {"prompts": [ESCAPE], "texts": [ESCAPE], "references": [""], "features": feature}
    samples = Scored(*[one] * 6, contexts=None, **texts)
    figures = {"x": figure(1.0), ESCAPE: figure(2.0), "forward_kl": figure(0.1)}
    evaluation = Evaluation(figures, samples, None, {})
    display = Display()
    monkeypatch.setattr(display._console, "width", 300)
    display.evaluation(evaluation, 0, aim)
    display.beside({}, evaluation, aim, None, first=ESCAPE, last="after")
    display.table("moments", ("feature", "base"), [(ESCAPE, "1")])
    display.warn(ESCAPE)
    printed = capsys.readouterr().out
    assert not {c for c in printed if not c.isprintable()} - {"\n"}
    assert printed.count(PLAIN) == 3 + 5 + 1 + 1
    assert command._fail(ESCAPE) == 2
    assert PLAIN in capsys.readouterr().err


RECORD = (
    "step",
    "kind",
    "samples",
    "seconds",
    "text",
    "prompt",
    "woman",
    "balance",
    "entropy",
    "log_z",
    "a",
    "a_std_error",
)


def test_words_never_take_the_place_of_a_figure():
    """Whatever a moment is of, its name is its own: in a record there are only those of figures and
    settings besides."""
    config = GenderConfig(woman="she", moments=tuple(f"{name}=0.5" for name in RECORD))
    features = make_features(config, ["a step of a woman", "kind", ""])
    figures = {f"{name}{suffix}" for name in features for suffix in ("", "_std_error", "_ess")}
    assert len(figures) == 3 * (3 + len(RECORD))
    assert not figures & {name for name in RECORD if name not in ("woman", "balance")}
    assert features["woman"].tolist() == [0, 0, 0]
    assert features["[woman]"].tolist() == [1, 0, 0]
    assert features["[step]"].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "moment",
    ["love|=0.1", "|love=0.1", "a||b=0.5", "a| |b=0.5", "|=0.1", "=0.1", "a=nan", "a=inf", "a="],
)
def test_a_moment_of_no_word_is_refused(moment):
    with pytest.raises(ValueError, match='are "word=rate"'):
        parse_moments((moment,))


def some_run(folder):
    """What tables and pictures want of a finished run."""
    (folder / "model").mkdir(parents=True)
    config = {
        "seed": 0,
        "divergence": "forward_kl",
        "alpha": 0.5,
        "clip": None,
        "steps": 1,
        "normalizer": "global",
    }
    about = {"versions": {}, "devices": ["cpu"], "command": "python"}
    (folder / "config.json").write_text(json.dumps(config | about), encoding="utf-8")
    record = {"kind": "evaluation", "step": 1, "samples": 16, "seconds": 1.0, "satisfaction": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (folder / "contexts.jsonl").write_text(
        '{"step": 1, "prompt": "a", "satisfaction": 1}\n', encoding="utf-8"
    )
    notes = {"task": "conditional", "arguments": [], "labels": {}, "command": ""}
    (folder.parent / "compare.json").write_text(json.dumps(notes), encoding="utf-8")
    return folder


READERS = {
    "tabulate": (tabulate.main, lambda folder: (folder,)),
    "plot": (plot.main, lambda folder: (folder, "--output", folder / "x.png")),
    "compare": (
        compare.main,
        lambda folder: (
            "--task",
            "conditional",
            "--only-report",
            "--folder",
            folder.parent,
            "--runs",
            folder,
        ),
    ),
}
BROKEN = {
    "empty": b"",
    "cut off": b'{"seed": 0, "div',
    "a list": b"[1, 2]\n[1]\n",
    "null": b"null\nnull\n",
    "no keys": b"{}\n{}\n",
    "not UTF-8": b'{"\xff\xfe": 1}\n{}\n',
    "nested": b"[" * 100_000 + b"\n{}\n",
}


@pytest.mark.parametrize("damage", [*BROKEN, "a folder", "not there"])
@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "contexts.jsonl", "../compare.json"]
)
def test_a_broken_file_is_a_sentence(name, damage, tmp_path, monkeypatch, capsys):
    """With every command that reads it; a file that a command does without is no error."""
    folder = some_run(tmp_path / "all" / "run-seed0")
    path = folder / name
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "not there":
        path.write_bytes(BROKEN[damage])
    readers = {
        "config.json": READERS,
        "metrics.jsonl": ("tabulate", "compare"),
        "contexts.jsonl": ("plot",),
    }
    for reader in readers.get(name, () if damage in ("a folder", "not there") else ("compare",)):
        main, arguments = READERS[reader]
        assert run(monkeypatch, main, *arguments(folder)) == 2, reader
        shown = capsys.readouterr().err
        assert "Error: " in shown
        assert path.name in shown or "has no evaluation" in shown
        assert shown.count("\n") == 1
        assert len(shown) < 900


@pytest.mark.parametrize(
    ("main", "arguments", "flags"),
    [
        (evaluate.main, ("--aligned", TINY), ("--output",)),
        (generate.main, ("--model", TINY, "--word", "w9"), ("--output", "--plot")),
        (kl_gradients.main, (), ("--output",)),
        (gradient_noise.main, (), ("--output",)),
        (make_pairs.main, (), ("--output",)),
        (plot.main, (TINY,), ("--output",)),
    ],
    ids=["evaluate", "generate", "kl_gradients", "gradient_noise", "make_pairs", "plot"],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    main, arguments, flags, monkeypatch, tmp_path, capsys
):
    for module in (evaluate, generate, make_pairs):
        monkeypatch.setattr(module, "load_model", lambda _: pytest.fail("the work has begun"))
    for module in (kl_gradients, gradient_noise):
        monkeypatch.setattr(module, "page", lambda _: pytest.fail("the work has begun"))
    task = ("lexical_constraint",) if main is evaluate.main else ()
    (tmp_path / "file").touch()
    for flag in flags:
        for path in (tmp_path / "nowhere" / "x", tmp_path, tmp_path / "file" / "x"):
            assert run(monkeypatch, main, *arguments, flag, path, *task) == 2
            shown = capsys.readouterr().err
            assert "--output" in shown or "--plot" in shown or "is there already" in shown
            assert str(path) in shown


def raising(error):
    def main(_):
        raise error

    return main


def tabulating(main):
    """A command that takes a folder, and does that with it."""
    return partial(command.run, tabulate.Config, main, name="tabulate")


def caused_by(error, cause):
    error.__cause__ = cause
    return error


FULL = OSError(ENOSPC, "No space left on device", "/a/b")
JSON = '{"metadata": ["' + "x" * 5000 + '"]}\n'


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FULL, "No space left on device (/a/b). Free some, and go on with --resume"),
        (caused_by(ValueError(JSON), FULL), "No space left on device (/a/b). Free some"),
        (
            ValueError(f"{JSON} [Errno 28] No space left on device"),
            "No space left on device. Free some",
        ),
        (
            PermissionError(EACCES, "Permission denied", "/a/b"),
            "PermissionError: [Errno 13] Permission denied: '/a/b'",
        ),
        (
            FileNotFoundError(ENOENT, "No such file or directory", "/a"),
            "FileNotFoundError: [Errno 2] No such file",
        ),
        (
            OSError("A checkpoint could not be written to /a: No space left on device."),
            "to /a: No space left on device. Free",
        ),
        (OSError("The run is in use."), "The run is in use."),
        (MemoryError(), "There is not enough memory"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
            "There is not enough memory",
        ),
        (RunError(JSON), '{"metadata": ["xxx'),
    ],
)
def test_what_the_system_refuses_is_a_sentence(error, message, monkeypatch, capsys):
    assert run(monkeypatch, tabulating(raising(error)), "folder") == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert len(shown) < 900


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), KeyError("a"), AssertionError(), ZeroDivisionError()]
)
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    with pytest.raises(type(error)):
        run(monkeypatch, tabulating(raising(error)), "folder")


@pytest.mark.parametrize(
    ("asked", "found", "message"),
    [
        ("cuda,cpu", "cpu", "JAX_PLATFORMS=cuda,cpu asks for cuda, of which jax finds none"),
        ("tpu", "cpu", "JAX_PLATFORMS=tpu asks for tpu"),
        (
            "cuda",
            RuntimeError("Unable to initialize backend 'cuda'"),
            "cannot be had: Unable to initialize",
        ),
        ("cuda", AssertionError(), "cannot be had: jax finds none"),
        ("cuda,cpu", "gpu", None),
        ("cpu", "cpu", None),
        ("cpu,cuda", "cpu", None),
        ("", "cpu", None),
        (None, "gpu", None),
    ],
)
def test_an_accelerator_that_is_asked_for_is_had_or_refused(
    asked, found, message, monkeypatch, capsys
):
    def default_backend():
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(command, "jax", fake_jax(default_backend, jax_platforms=asked))
    assert run(monkeypatch, tabulating(lambda _: 0), "folder") == (2 if message else 0)
    assert (message or "") in capsys.readouterr().err
    reading = partial(command.run, tabulate.Config, lambda _: 0, name="tabulate", computes=False)
    assert run(monkeypatch, reading, "folder") == 0


@pytest.mark.parametrize(
    ("backend", "own", "kept"),
    [
        ("gpu", None, "~/.cache/fjax/compiled"),
        ("gpu", "elsewhere", "elsewhere"),  # as JAX_COMPILATION_CACHE_DIR says
        ("cpu", None, None),
    ],
)
def test_what_is_compiled_for_an_accelerator_is_kept(backend, own, kept, monkeypatch):
    fake = fake_jax(lambda: backend, jax_compilation_cache_dir=own)
    monkeypatch.setattr(command, "jax", fake)
    assert run(monkeypatch, tabulating(lambda _: 0), "folder") == 0
    assert fake.config.jax_compilation_cache_dir == (kept and os.path.expanduser(kept))


def fake_jax(default_backend, **settings):
    """What a command asks jax for before it begins."""
    config = types.SimpleNamespace(jax_platforms="", jax_compilation_cache_dir=None)
    vars(config).update(settings, update=lambda name, value: setattr(config, name, value))
    return types.SimpleNamespace(config=config, default_backend=default_backend)


@pytest.mark.parametrize("name", ["reports", "prints"])
def test_a_locale_without_utf_8_changes_nothing(name, tmp_path, monkeypatch):
    """The page of a run has π in it; and a terminal that cannot show it shows something else."""
    if name == "prints":
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(monkeypatch, tabulating(lambda _: print("π → p") or 0), "folder") == 0
        assert stream.buffer.getvalue() == b"? ? p\n"
        return
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    monkeypatch.setattr("locale.getencoding", lambda *_: "ascii", raising=False)
    write_text(tmp_path / "page", "KL(p‖π)")
    assert (tmp_path / "page").read_bytes().decode("utf-8") == "KL(p‖π)"


@pytest.mark.parametrize("depth", [5, 100_000])
def test_a_nested_line_of_pairs_is_a_bad_line(depth, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": ' + "[" * depth + "]" * depth + "}\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"1 of 1 lines of .* are bad, first line 1 (has|is nested)"):
        read_pairs(path, skip_bad=False)


@pytest.mark.parametrize(
    ("kind", "there", "said"),
    [
        ("H100", 8, "H100, one of 8 (--mesh takes more)"),
        ("H100", 1, "H100"),
        ("cpu", 8, "CPU cores"),
    ],
)
def test_the_one_device_that_is_used_is_named(kind, there, said, tmp_path, monkeypatch):
    device = types.SimpleNamespace(platform="cpu" if kind == "cpu" else "gpu", device_kind=kind)
    monkeypatch.setattr("jax.devices", lambda: [device] * there)
    monkeypatch.setattr("jax.device_count", lambda: there)
    assert hardware().endswith(said)
    describe_run(OpenRun(tmp_path, {}, {}, resume=False, command="python x"))
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["devices"] == [kind]


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("data=7", "--mesh data=7: A mesh of data=7 takes 7 devices, and there are 8"),
        (
            "data=8",
            r"--mesh data=8: samples of the policy in a step \(18\) must be a multiple of 8",
        ),
        ("tensor=8", "8 does not divide 4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, said):
    settings = Settings(mesh=mesh, samples=20)
    with pytest.raises(RunError, match=said):
        load_model(settings)
