"""Sentences of the review corpora: read, filter, split, tokenise, and put into batches of like
length."""

import contextlib
import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fjax.runs import RunError

END = "<|endoftext|>"
CORPORA = {  # archive -> the folder or file prefix that holds sentences, one a line
    "movie_reviews.zip": ("movie_reviews/pos/", "movie_reviews/neg/"),
    "sentence_polarity.zip": ("sentence_polarity/rt-polarity.",),
    "subjectivity.zip": ("subjectivity/quote.", "subjectivity/plot."),
}


class Split(NamedTuple):
    train: list[str]
    held_out: list[str]


def read_sentences(folder: Path, *, min_words: int = 3, max_words: int = 30) -> Split:
    """All distinct sentences of the three archives, one in twenty held out by a hash of its text.

    A hash rather than a shuffle: the split is the same whatever else is read, and a sentence that
    stands in two corpora cannot be on both sides.
    """
    train, apart = set(), set()
    for archive, prefixes in CORPORA.items():
        for line in _lines(folder / archive, prefixes):
            sentence = " ".join(line.split())
            if min_words <= len(sentence.split()) <= max_words:
                (apart if held_out(sentence) else train).add(sentence)
    if not train or not apart:
        raise RunError(
            f"The archives in {folder} have {len(train)} sentences to train on and {len(apart)} "
            f"held out: too few."
        )
    return Split(sorted(train), sorted(apart))


def read_labels(folder: Path) -> dict[str, int]:
    """The distinct sentences of the archive, in one spelling of spaces -> 1 if positive, else 0."""
    path = folder / "sentence_polarity.zip"
    if not path.is_file():
        raise RunError(
            f"No labelled snippets at {path}. Put sentence_polarity.zip there, or name its folder "
            f"with --corpora."
        )
    texts = {}
    with _opened(path) as archive:
        for label, name in enumerate(("rt-polarity.neg", "rt-polarity.pos")):
            for line in archive.read(f"sentence_polarity/{name}").decode("latin-1").splitlines():
                texts[" ".join(line.split())] = label
    texts.pop("", None)
    return texts


def held_out(sentence: str) -> bool:
    """Whether a sentence is among the twentieth that no model is trained on."""
    return hashlib.sha256(sentence.encode()).digest()[0] % 20 == 0


def _lines(path: Path, prefixes: tuple[str, ...]) -> Iterator[str]:
    if not path.is_file():
        raise RunError(
            f"No corpus at {path}. Put the archives {', '.join(CORPORA)} into one folder and name "
            f"it with --corpora; "
            "they are what NLTK's downloader calls movie_reviews, sentence_polarity and "
            "subjectivity."
        )
    with _opened(path) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(prefixes) and not name.endswith("/"):
                yield from archive.read(name).decode("latin-1").splitlines()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, KeyError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.args[0]
        raise RunError(
            f"{path} is not the whole archive that it should be: {reason}. Get it again."
        ) from error


def train_tokenizer(sentences: list[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE like GPT-2's: any text round-trips, and the only special token ends a
    sentence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    # A sentence that spells the end token has its characters: only `encode` says where one ends.
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(tokenizer: Tokenizer, sentences: list[str]) -> list[np.ndarray]:
    """Token ids of each sentence between two end tokens: the first is the prompt, the second ends
    it."""
    end = tokenizer.token_to_id(END)
    return [np.asarray([end, *row.ids, end], np.int32) for row in tokenizer.encode_batch(sentences)]


def batches(
    rows: list[np.ndarray], *, batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, lengths) in an order that depends on the seed and the epoch only, so that a resumed
    run repeats it.

    Rows are shuffled, sorted by length within windows of 16 batches, and the batches shuffled
    again: little padding, still random. Widths are multiples of 8, so the training step compiles
    for a handful of shapes.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(rows))
    window = 16 * batch_size
    groups = []
    for first in range(0, len(order), window):
        by_length = sorted(order[first : first + window], key=lambda i: len(rows[i]))
        groups += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    whole = [group for group in groups if len(group) == batch_size]
    for i in rng.permutation(len(whole)):
        yield pad([rows[j] for j in whole[i]])


def pad(rows: list[np.ndarray], *, multiple: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on the right with token 0 to a common width, and their true lengths."""
    lengths = np.asarray([len(row) for row in rows], np.int32)
    width = -(-int(lengths.max()) // multiple) * multiple
    tokens = np.zeros((len(rows), width), np.int32)
    for row, out in zip(rows, tokens, strict=True):
        out[: len(row)] = row
    return tokens, lengths
