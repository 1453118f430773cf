"""Files of pairs and what may be wrong with them, their arrays and batches, and the script that
makes them."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fjax
from experiments.common.settings import BUILT_IN
from experiments.preference_pairs.data import Pair, as_line, batch_at, read_pairs, to_batch
from experiments.preference_pairs.make_pairs import Answer, Config, label, main, make_pairs
from fjax.runs import RunError
from fjax.training import preference_tuner

from .commands import TINY, finish, run

GOOD = '{"prompt": "w1", "chosen": "w2", "rejected": "w3", "source": 7}'
BAD = [
    (b"{", "is not JSON (Expecting property name"),
    (b"", "is not JSON (Expecting value, column 1)"),
    (b'{"prompt": "\xff"}', "is not UTF-8 text"),
    (b"[1]", "is a JSON list, not an object"),
    (b'{"prompt": "w1", "chosen": "w2"}', 'has no "rejected"'),
    (b'{"prompt": 1, "chosen": "w2", "rejected": "w3"}', 'has a "prompt" that is no text but 1'),
    (b'{"prompt": "w1", "chosen": " ", "rejected": "w3"}', 'has an empty "chosen"'),
    (
        b'{"prompt": "w1", "chosen": "\\ud83d", "rejected": "w3"}',
        'has half a character in "chosen"',
    ),
    (
        b'{"prompt": "w1", "chosen": "w2", "rejected": "w2"}',
        'has the same text as "chosen" and "rejected"',
    ),
    (
        b'{"prompt": "w1", "chosen": "w2", "rejected": "w3", "chosen_ended": 1}',
        'has a "chosen_ended" that is neither',
    ),
    (b'{"prompt": "w1", "chosen": "w2", "rejected": "w3", "chosen": "w4"}', 'has "chosen" twice'),
    (
        b'{"prompt": {"text": "w1"}, "chosen": "w2", "rejected": "w3"}',
        "has a \"prompt\" that is no text but {'text': 'w1'}",
    ),
    (
        b'{"prompt": NaN, "chosen": "w2", "rejected": "w3"}',
        'has a "prompt" that is no text but nan',
    ),
    (
        b'{"prompt": "w1", "chosen": null, "rejected": "w3"}',
        'has a "chosen" that is no text but None',
    ),
    (b"[" * 100_000, "is nested too deeply"),
    (b'{"prompt": ' * 100_000, "is nested too deeply"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", "Exceeds the limit (4300 digits) for integer"),
    ('{"prompt": "w1", "chosen": "w2", "rejected": "w3"}'.encode("utf-16-le"), "is not JSON"),
    (b'\xef\xbb\xbf{"prompt": "w1", "chosen": "w2", "rejected": "w3"}', "is not JSON"),
]


@pytest.fixture(scope="module")
def model():
    return fjax.from_pretrained(TINY)


@pytest.fixture(scope="module")
def score(model):
    log_prob_fn = jax.jit(fjax.make_log_prob_fn(model.logits_fn))
    return lambda tokens, where: log_prob_fn(model.params, tokens, where)


def written(tmp_path, *lines: str | bytes):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


def test_pairs_are_read_as_they_were_written(tmp_path):
    pairs = [
        Pair("a – b", " c", " d\n"),
        Pair("w1", "w2", "w3", chosen_ended=False),
        Pair("w1", "w2", "w3", rejected_ended=False),
    ]
    assert read_pairs(written(tmp_path, *map(as_line, pairs)), skip_bad=False) == (pairs, [])
    assert read_pairs(written(tmp_path, GOOD, ""), skip_bad=False) == ([Pair("w1", "w2", "w3")], [])
    assert "ended" not in as_line(pairs[0])


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason[:40] for _, reason in BAD])
def test_a_bad_line_is_named_or_left_out(tmp_path, line, reason):
    path = written(tmp_path, GOOD, line, GOOD, b"?")
    with pytest.raises(RunError) as error:
        read_pairs(path, skip_bad=False)
    assert f"2 of 4 lines of {path} are bad, first line 2 {reason}" in str(error.value)
    assert "--skip-bad-lines" in str(error.value)
    pairs, (report,) = read_pairs(path, skip_bad=True)
    assert len(pairs) == 2
    assert f"{path}: 2 of 4 lines left out: line 2 {reason}" in report
    assert "; line 4 is not JSON" in report


def test_a_file_of_another_editor_is_read(tmp_path):
    """A byte-order mark, Windows line ends, and texts that a careless reader takes for numbers or
    for nothing."""
    lines = [
        '{"prompt": "nan", "chosen": "null", "rejected": "-inf"}',
        '{"prompt": "1e3", "chosen": "true", "rejected": "NaN"}',
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    pairs, reports = read_pairs(path, skip_bad=False)
    assert pairs == [Pair("nan", "null", "-inf"), Pair("1e3", "true", "NaN")]
    assert reports == []
    assert [as_line(pair) for pair in pairs] == lines


def test_a_file_without_pairs_is_named(tmp_path):
    with pytest.raises(RunError, match="is empty"):
        read_pairs(written(tmp_path), skip_bad=True)
    with pytest.raises(RunError, match="No line is left"):
        read_pairs(written(tmp_path, "{"), skip_bad=True)
    with pytest.raises(RunError, match=r"Cannot read the pairs .*No such file"):
        read_pairs(tmp_path / "nowhere", skip_bad=True)
    with pytest.raises(RunError, match=r"Cannot read the pairs .*Is a directory"):
        read_pairs(tmp_path, skip_bad=True)
    (tmp_path / "mark").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(RunError, match="is empty"):
        read_pairs(tmp_path / "mark", skip_bad=True)


def test_rows_have_the_end_of_what_ended_and_count_the_continuation(model, score):
    pairs = [Pair("w1 w2", "w3 w4", "w5"), Pair("w6", "w7", "w8 w9", chosen_ended=False)]
    batch, reports = to_batch(pairs, model.tokenizer, score, max_tokens=24)
    assert reports == []
    assert batch.chosen_tokens.tolist() == [[60, 1, 2, 3, 4, 60, 0, 0], [60, 6, 7, 0, 0, 0, 0, 0]]
    assert batch.rejected_tokens.tolist() == [
        [60, 1, 2, 5, 60, 0, 0, 0],
        [60, 6, 8, 9, 60, 0, 0, 0],
    ]
    assert [np.flatnonzero(row).tolist() for row in batch.chosen_where] == [[3, 4, 5], [2]]
    assert [np.flatnonzero(row).tolist() for row in batch.rejected_where] == [[3, 4], [2, 3, 4]]


def test_only_the_real_end_is_the_end_token():
    """Texts that spell it have its characters; unknown words, which are one token with it here, are
    refused."""
    built_in = fjax.from_pretrained(BUILT_IN)
    end = built_in.eos_id
    pairs = [
        Pair("a <|endoftext|> film", " is<|endoftext|>", "<|endoftext|>", rejected_ended=False)
    ]
    batch, _ = to_batch(
        pairs, built_in.tokenizer, lambda tokens, where: jnp.zeros(len(tokens)), max_tokens=64
    )
    chosen, rejected = np.asarray(batch.chosen_tokens[0]), np.asarray(batch.rejected_tokens[0])
    last = np.flatnonzero(batch.chosen_where[0])[-1]
    assert np.flatnonzero(chosen[: last + 1] == end).tolist() == [0, last]
    assert built_in.tokenizer.decode(chosen[1:last]) == "a <|endoftext|> film is<|endoftext|>"
    assert end not in rejected[np.asarray(batch.rejected_where[0])]
    tiny = fjax.from_pretrained(TINY)
    with pytest.raises(RunError, match=r"reads a part of 'w1 film' as its end token"):
        to_batch(
            [Pair("w1 film", "w2", "w3")],
            tiny.tokenizer,
            lambda tokens, where: jnp.zeros(len(tokens)),
            max_tokens=24,
        )


def test_the_base_model_scores_all_rows_in_batches_of_one_size(model, monkeypatch):
    monkeypatch.setattr("experiments.preference_pairs.data.SCORED", 4)
    pairs = [Pair("w1", f"w{i}", f"w{i} w{i + 1}") for i in range(2, 12)]
    log_prob_fn, shapes = jax.jit(fjax.make_log_prob_fn(model.logits_fn)), set()

    def score(tokens, where):
        shapes.add(tokens.shape)
        return log_prob_fn(model.params, tokens, where)

    batch, _ = to_batch(pairs, model.tokenizer, score, max_tokens=24)
    assert shapes == {(4, 8)}
    for side in ("chosen", "rejected"):
        tokens, where, log_a = (
            getattr(batch, f"{side}_{part}") for part in ("tokens", "where", "log_a")
        )
        np.testing.assert_allclose(log_a, log_prob_fn(model.params, tokens, where), rtol=1e-5)


def test_what_is_too_long_is_left_out_and_counted(model, score):
    pairs = [Pair("w1", "w2", "w3"), Pair("w1", "w2", "w3 " * 20), Pair("w1", "w2 " * 20, "w3")]
    batch, reports = to_batch(pairs, model.tokenizer, score, max_tokens=20)
    assert batch.chosen_tokens.tolist() == [[60, 1, 2, 60, 0, 0, 0, 0]]
    assert reports == ["2 of 3 pairs have more than 20 tokens and were left out."]
    with pytest.raises(
        RunError, match="2 of 2 pairs have more than 20 tokens, so that none is left"
    ):
        to_batch(pairs[1:], model.tokenizer, score, max_tokens=20)


def test_a_batch_is_a_function_of_seed_and_step(model, score):
    pairs = [Pair("w1", f"w{i}", "w59") for i in range(2, 12)]
    data, _ = to_batch(pairs, model.tokenizer, score, max_tokens=24)

    def at(step, seed=0):
        return batch_at(data, step, batch_size=3, seed=seed).chosen_tokens[:, 2].tolist()

    epochs = [
        [token for step in range(3 * epoch, 3 * epoch + 3) for token in at(step)]
        for epoch in range(8)
    ]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1]
    # what an epoch leaves out, others have
    assert {token for epoch in epochs for token in epoch} == set(range(2, 12))
    assert at(5) == at(5) != at(5, seed=1)
    batch = batch_at(data, 4, batch_size=3, seed=0)
    assert batch.chosen_log_a.tolist() == [data.chosen_log_a[token - 2] for token in at(4)]
    with pytest.raises(
        RunError, match="There are 10 pairs to be used, fewer than the 11 of a step"
    ):
        batch_at(data, 0, batch_size=11, seed=0)


def test_pairs_can_be_trained_on(model, score):
    data, _ = to_batch(
        [Pair("w1", "w2 w3", "w4"), Pair("w5", "w6", "w7")], model.tokenizer, score, max_tokens=24
    )
    loss = partial(fjax.preferences.dpo, beta=0.1)
    tuner = preference_tuner(fjax.make_log_prob_fn(model.logits_fn), optax.adam(1e-2), loss=loss)
    update, state = jax.jit(tuner.update), tuner.init(model.params)
    for step in range(3):
        state, info = update(state, batch_at(data, step, batch_size=2, seed=0))
    assert info.accuracy == 1
    assert info.margin > 0.1


SEEN = []


def count_reward(texts):
    """For --reward: how often a text has w9; then, how long it is."""
    SEEN.extend(texts)
    return [text.count("w9") + 0.01 * len(text.split()) for text in texts]


def same_reward(texts):
    return [1.0] * len(texts)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("w1 w2\nw3\n\n" + "\n".join(f"w{i} w5" for i in range(10, 20)))
    return path


@pytest.fixture(scope="module")
def made(prompts, tmp_path_factory):
    """By either kind of labels: the file, and what was printed."""
    sizes = ("--max-new-tokens", 20, "--pairs-per-prompt", 3)
    given = ("--model", TINY, "--prompts", prompts, "--reward", f"{__name__}:count_reward", *sizes)
    found = {}
    for labels in ("best-worst", "bradley-terry"):
        path = tmp_path_factory.mktemp("made") / "pairs.jsonl"
        found[labels] = path, finish(main, *given, "--labels", labels, "--output", path)
    return found


@pytest.mark.command
@pytest.mark.parametrize("labels", ["best-worst", "bradley-terry"])
def test_the_script_makes_pairs_that_can_be_read(made, labels):
    path, printed = made[labels]
    pairs, reports = read_pairs(path, skip_bad=False)
    assert reports == []
    assert "left out as blank: 1 line (3)" in printed
    assert f"{len(pairs)} pairs of 12 prompts are in {path}" in printed
    assert {pair.prompt for pair in pairs} == {"w1 w2", "w3", *(f"w{i} w5" for i in range(10, 20))}
    chosen, rejected = ([getattr(pair, side) for pair in pairs] for side in ("chosen", "rejected"))
    better = np.mean(np.array(count_reward(chosen)) >= np.array(count_reward(rejected)) - 0.02)
    assert better == 1 if labels == "best-worst" else 0.3 < better < 0.95
    lengths = [(len(pair.chosen.split()), pair.chosen_ended) for pair in pairs]
    lengths += [(len(pair.rejected.split()), pair.rejected_ended) for pair in pairs]
    # all that --max-new-tokens allows
    assert {length for length, ended in lengths if not ended} == {20}
    assert {length for length, ended in lengths if ended} <= set(range(20))
    assert {ended for _, ended in lengths} == {True, False}


def configured(prompts, **options) -> Config:
    given = {"reward": f"{__name__}:count_reward", "max_new_tokens": 20, "pairs_per_prompt": 3}
    return Config(**{"model": str(TINY), "prompts": prompts} | given | options)


def test_pairs_do_not_depend_on_how_many_are_drawn_at_once(made, prompts, tmp_path, monkeypatch):
    """All at once before; now 5 prompts, so that the last batch is not full. And the reward was
    asked about all that is written."""
    monkeypatch.setattr("experiments.preference_pairs.make_pairs.ROWS", 60)
    SEEN.clear()
    again, (before, _) = tmp_path / "again", made["best-worst"]
    assert make_pairs(configured(prompts, output=again)) == 0
    assert again.read_text() == before.read_text()
    pairs, _ = read_pairs(again, skip_bad=False)
    texts = {pair.prompt + text for pair in pairs for text in (pair.chosen, pair.rejected)}
    assert texts <= set(SEEN)


def test_bradley_terry_labels_have_its_probabilities():
    better, worse = Answer("w1", True, 1.5), Answer("w2", True, 0.5)
    rng, config = np.random.default_rng(0), Config(labels="bradley-terry")
    wins = np.mean(
        [
            label(config, answers, rng)[0] is better
            for answers in [(better, worse), (worse, better)] * 5000
        ]
    )
    expected = 1 / (1 + np.exp(-1.0))
    assert abs(wins - expected) < 4 * np.sqrt(expected * (1 - expected) / 10_000)
    far = Answer("w3", True, 5000.0)
    assert label(config, (worse, far), rng) == (far, worse)


def test_what_is_no_pair_is_left_out():
    rng, config = np.random.default_rng(0), Config()
    answers = [Answer(" w1", True, 1.0), Answer(" w2", True, 3.0), Answer(" w3", False, 2.0)]
    assert label(config, answers, rng) == (answers[1], answers[0])
    assert label(config, [answers[0], answers[0]._replace(text=" w4")], rng) is None  # one reward
    assert label(config, [answers[0], answers[0]._replace(reward=2.0)], rng) is None  # one text
    assert label(config, [answers[0], Answer(" ", True, 2.0)], rng) is None  # no text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": Path("there")}, "is there already"),
        ({"output": Path("no/pairs.jsonl")}, "There is no folder"),
        ({"max_new_tokens": 40}, "The model has 24 positions"),
        ({"candidates": 1}, "--candidates must be at least 2"),
        ({"pairs_per_prompt": 0}, "--pairs-per-prompt must be at least 1"),
        (
            {"reward": f"{__name__}:same_reward"},
            "No two continuations of a prompt differ in text and reward",
        ),
        ({"reward": "nowhere:f"}, "--reward nowhere:f cannot be imported"),
    ],
)
def test_bad_input_is_named(prompts, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("there").touch()
    with pytest.raises((ValueError, RunError)) as error:
        make_pairs(configured(prompts, **options))
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert Path("there").read_text() == ""


def test_the_command_says_it_in_a_sentence(monkeypatch, capsys):
    assert run(monkeypatch, main, "--candidates", 1) == 2
    assert "--candidates must be at least 2" in capsys.readouterr().err
