"""Exact samples in a file that runs share, and a run that is measured by them."""

import math

import jax
import numpy as np
import pytest

from fjax.evaluation import draw_exact
from fjax.runs import RunError, align, read_metrics
from fjax.runs.exact import read_exact, write_exact
from fjax.runs.reading import by_step
from tests import bigram
from tests.runs.test_loop import DIVERGENCES, SIZES

TARGET = bigram.TARGET._replace(log_bound=0.0)


@pytest.fixture(scope="module")
def exact():
    key = jax.random.fold_in(jax.random.key(0), 2**31 - 9)
    return draw_exact(bigram.collector(), bigram.BASE, TARGET, key, 60, max_draws=2000)


@pytest.fixture
def kept(exact, tmp_path):
    path = tmp_path / "folder" / "kept.npz"
    write_exact(path, exact, target="w9")
    return path


def read(path, collector=None, text_target=TARGET, target="w9"):
    return read_exact(path, collector or bigram.collector(), text_target, target=target)


def test_what_is_kept_is_what_was_drawn(exact, kept):
    found = read(kept)
    assert found.log_z == exact.log_z
    assert found.drawn == exact.drawn
    for name, value in exact.scored._asdict().items():
        there = getattr(found.scored, name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(there, value, err_msg=name)
        elif name == "features":
            np.testing.assert_array_equal(there["satisfaction"], value["satisfaction"])
        else:
            assert there == value, name
    assert [path.name for path in kept.parent.iterdir()] == ["kept.npz"]


def test_none_at_all_are_kept_too(exact, tmp_path):
    """So that they are not looked for again."""
    never = TARGET._replace(log_score=lambda log_a, features: np.full_like(log_a, -np.inf))
    none = draw_exact(bigram.collector(), bigram.BASE, never, jax.random.key(0), 5, max_draws=64)
    write_exact(tmp_path / "none.npz", none, target="w9")
    found = read(tmp_path / "none.npz")
    assert (found.scored.texts, found.drawn) == ([], 64)
    assert found.log_z.value == -math.inf


def test_a_file_of_another_target_is_refused_by_name(kept):
    with pytest.raises(RunError, match=r"kept\.npz has samples of another target \(w9, not w7\)"):
        read(kept, target="w7")
    changed = TARGET._replace(log_score=lambda log_a, features: log_a + 1)
    with pytest.raises(RunError, match=r"kept\.npz has samples of another target: log P of '"):
        read(kept, text_target=changed)


@pytest.mark.parametrize("damage", ["cut", "text", "missing", "lengths"])
def test_a_damaged_file_is_refused_by_name(kept, damage):
    content = kept.read_bytes()
    if damage == "cut":
        kept.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        kept.write_bytes(b"no archive")
    else:
        arrays = dict(np.load(kept))
        if damage == "missing":
            del arrays["log_z"]
        else:
            arrays["log_a"] = arrays["log_a"][1:]
        np.savez(kept, **arrays)
    with pytest.raises(RunError, match=r"(?s)kept\.npz is damaged.*Delete it"):
        read(kept)


def test_where_they_cannot_be_written_it_says_so(exact, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"Cannot keep the exact samples in .*--exact-folder"):
        write_exact(tmp_path / "file" / "kept.npz", exact, target="w9")


def test_a_run_is_measured_by_them(exact, tmp_path):
    """Its first evaluation, of the base model, has KL(p‖a) = -log Z; p itself has one record, also
    of a run that goes on."""
    given = bigram.model(), TARGET, bigram.tuner(), bigram.collector()
    options = SIZES | {"folder": tmp_path / "run", "divergences": DIVERGENCES, "exact": exact}
    align(*given, **options | {"steps": 2})
    align(*given, **options, resume=True)
    records = read_metrics(tmp_path / "run")
    of_p = [record for record in records if record["kind"] == "target"]
    assert len(of_p) == 1
    assert of_p[0]["satisfaction"] == 1
    assert of_p[0]["exact_samples"] == len(exact.scored.texts)
    assert of_p[0]["drawn"] == exact.drawn
    assert of_p[0]["kl_to_base"] == pytest.approx(-exact.log_z.value, abs=1e-5)
    assert {"entropy", "entropy_std_error", "length"} <= of_p[0].keys()
    evaluations = by_step(records, "evaluation")
    assert list(evaluations) == [0, 2, 4]
    for record in evaluations.values():
        assert record["log_z"] == exact.log_z.value
        assert record["exact_samples"] == len(exact.scored.texts)
        assert "pareto_k" not in record
    assert evaluations[0]["forward_kl"] == pytest.approx(-exact.log_z.value, abs=1e-4)
    assert evaluations[4]["forward_kl"] < evaluations[0]["forward_kl"]
    true = np.mean(
        exact.scored.log_score
        - bigram.log_probs(
            np.load(tmp_path / "run" / "model" / "table.npy"),
            exact.scored.tokens,
            exact.scored.where,
        )
    )
    assert evaluations[4]["forward_kl"] == pytest.approx(true - exact.log_z.value, abs=1e-3)
