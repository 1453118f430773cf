"""Pre-training on a toy corpus: the split, the 5-gram beside the model, the shipped folder, and
going on where it stopped."""

import itertools
import zipfile

import jax
import numpy as np
import pytest

import fjax
from experiments.common import corpora as data
from experiments.pretrain import ngram
from experiments.pretrain.config import Config
from experiments.pretrain.run import main
from fjax.runs import RunError
from fjax.training import read_jsonl

SUBJECTS, VERBS, OBJECTS = (
    ("the film", "a story", "her acting", "this plot"),
    ("is", "was", "feels"),
    ("good", "bad", "dull"),
)


@pytest.fixture
def corpora(tmp_path):
    """Three archives with the names and folders of the real ones."""
    lines = [
        f"{s} {v} {'very ' * k}{o} ."
        for s, v, o, k in itertools.product(SUBJECTS, VERBS, OBJECTS, range(8))
    ]
    folder = tmp_path / "corpora"
    folder.mkdir()
    for archive, prefixes in data.CORPORA.items():
        with zipfile.ZipFile(folder / archive, "w") as file:
            for i, prefix in enumerate(prefixes):
                file.writestr(prefix + "x", "\n".join(lines[i::2]))
    return folder


def test_no_sentence_is_on_both_sides(corpora):
    split = data.read_sentences(corpora)
    assert not set(split.train) & set(split.held_out)
    assert len(split.train) + len(split.held_out) == 288
    assert 0.01 < len(split.held_out) / 288 < 0.12  # one in twenty, by hash
    assert split == data.read_sentences(corpora)


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(RunError, match=r"No corpus at .*movie_reviews.zip"):
        data.read_sentences(tmp_path)


def damaged(path):
    path.write_bytes(path.read_bytes()[:-30])


def scrambled(path):
    data = bytearray(path.read_bytes())
    data[90:120] = bytes(30)
    path.write_bytes(data)


def of_nothing(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme", "")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            damaged,
            "subjectivity.zip is not the whole archive that it should be: File is not a zip file",
        ),
        (scrambled, "subjectivity.zip is not the whole archive that it should be: "),
        (lambda path: path.write_bytes(b""), "subjectivity.zip is not the whole archive"),
    ],
)
def test_a_damaged_corpus_is_named(corpora, spoil, message):
    spoil(corpora / "subjectivity.zip")
    with pytest.raises(RunError, match=message):
        data.read_sentences(corpora)


def test_corpora_without_sentences_or_labels_are_named(corpora, tmp_path):
    of_nothing(corpora / "sentence_polarity.zip")
    with pytest.raises(
        RunError, match=r"There is no item named 'sentence_polarity/rt-polarity.neg'"
    ):
        data.read_labels(corpora)
    for archive in data.CORPORA:
        of_nothing(corpora / archive)
    with pytest.raises(RunError, match="have 0 sentences to train on and 0 held out"):
        data.read_sentences(corpora)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1000}, "fewer than --batch-size 1000"),
        ({"warmup_steps": 6}, "has 6 steps, no more than --warmup-steps 6"),
        (
            {"warmup_steps": 1, "n_positions": 8},
            "The longest sentence has .* tokens, more than --n-positions 8",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_said_first(corpora, tmp_path, changes, message):
    config = Config(
        corpora=corpora,
        output=tmp_path / "model",
        run_folder=tmp_path / "run",
        vocab_size=280,
        **changes,
    )
    with pytest.raises(RunError, match=message):
        main(config)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_positions_are_those_of_whole_batches():
    """Their widths are multiples of 8, so that of 100 positions a batch of long sentences would
    need 104."""
    with pytest.raises(ValueError, match="--n-positions must be a multiple of 8"):
        Config(n_positions=100)


def test_a_sentence_that_spells_the_end_ends_where_it_ends():
    sentences = ["a film .", "a <|endoftext|> film ."] * 9
    tokenizer = data.train_tokenizer(sentences, vocab_size=300)
    end = tokenizer.token_to_id(data.END)
    for row, sentence in zip(data.encode(tokenizer, sentences), sentences, strict=True):
        assert np.flatnonzero(row == end).tolist() == [0, len(row) - 1]
        assert tokenizer.decode(row[1:-1].tolist()) == sentence


def test_batches_hold_every_row_once_and_follow_from_seed_and_epoch():
    rows = [np.full(3 + i % 7, i, np.int32) for i in range(40)]

    def batches(epoch):
        return list(data.batches(rows, batch_size=8, seed=0, epoch=epoch))

    for tokens, lengths in batches(0):
        assert tokens.shape[1] % 8 == 0
        assert all((row[length:] == 0).all() for row, length in zip(tokens, lengths, strict=True))
    assert sorted(int(row[0]) for tokens, _ in batches(0) for row in tokens) == list(range(40))
    for (a, _), (b, _) in zip(batches(1), batches(1), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(
        a.shape != b.shape or (a != b).any()
        for (a, _), (b, _) in zip(batches(0), batches(1), strict=True)
    )


def test_the_five_gram_is_a_distribution_for_every_context():
    rng = np.random.default_rng(0)
    rows = [np.array([0, *rng.integers(1, 6, size=5), 0], np.int32) for _ in range(30)]
    model = ngram.fit(rows, order=5, vocab_size=7)
    for context in [
        (),
        (0,),
        (3, 1),
        (1, 2, 3, 4),
        (6, 6, 6, 6),
        *(tuple(row[1:5].tolist()) for row in rows[:5]),
    ]:
        assert sum(ngram.probability(model, context, token) for token in range(7)) == pytest.approx(
            1, abs=1e-12
        )
        assert min(ngram.probability(model, context, token) for token in range(7)) > 0
    assert ngram.negative_log_likelihood(model, rows) < 30 * 6 * np.log(7)


@pytest.mark.command
def test_an_interrupted_pre_training_goes_on_and_ships_a_model_with_its_card(corpora, tmp_path):
    small = {
        "vocab_size": 280,
        "n_positions": 40,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "batch_size": 16,
        "warmup_steps": 2,
    }
    folders = {"corpora": corpora, "output": tmp_path / "model", "run_folder": tmp_path / "run"}
    assert main(Config(epochs=2, checkpoint_every=10, **small, **folders)) == 0
    steps = [record["step"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    shipped = fjax.from_pretrained(tmp_path / "model")
    assert sum(leaf.size for leaf in jax.tree.leaves(shipped.params)) < 20_000
    card = (tmp_path / "model" / "README.md").read_text()
    assert "--vocab-size 280" in card
    assert "5-gram" in card

    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    # nothing left to train
    assert main(Config(epochs=2, checkpoint_every=10, **small, **folders)) == 0
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
