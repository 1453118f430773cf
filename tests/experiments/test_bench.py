"""The benchmark times the same thing in every row: its alternatives draw from one distribution and
keep the same tokens."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tools import bench
from experiments.tools.sides import processes, with_fjax
from experiments.tools.sides.work import Work, rows_of
from fjax.runs import RunError
from fjax.sampling import categorical, top_p

from .commands import TINY, run


@pytest.mark.parametrize("way", [categorical.draw, bench.gumbel, bench.running_sum])
def test_all_ways_of_drawing_are_of_one_distribution(way):
    logits = jnp.array([0.0, 1.0, -1.0, 2.0])
    tokens, log_probs = jax.jit(jax.vmap(way, (0, None)))(
        jax.random.split(jax.random.key(0), 4000), logits
    )
    np.testing.assert_allclose(log_probs, jax.nn.log_softmax(logits)[tokens], atol=1e-5)
    expected = jax.nn.softmax(logits)
    error = np.sqrt(expected * (1 - expected) / 4000)
    assert (abs(np.bincount(tokens, minlength=4) / 4000 - expected) < 4 * error).all()


def test_both_ways_of_top_p_keep_the_same_tokens():
    logits = jax.random.normal(jax.random.key(0), (8, 50))
    np.testing.assert_array_equal(bench.by_sort(logits, 0.9), top_p(0.9)(logits))


@pytest.mark.command
def test_the_command(monkeypatch, capsys):
    small = (
        "--rows",
        2,
        "--vocabulary",
        50,
        "--rounds",
        1,
        "--model",
        TINY,
        "--samples",
        4,
        "--max-new-tokens",
        3,
    )
    assert run(monkeypatch, bench.main, *small) == 0
    printed = capsys.readouterr().out
    for row in ("blocks (fjax)", "top-p 0.9 by a sort", "whole step", "update"):
        assert row in printed
    assert run(monkeypatch, bench.main, "--rounds", 0) == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err


def test_how_far_log_probabilities_are_from_one_another(monkeypatch, capsys):
    small = "--phases", "accuracy", "--model", TINY, "--samples", 4, "--max-new-tokens", 3
    assert run(monkeypatch, bench.main, *small) == 0
    rows = re.findall(r"│ (.*?) +│ +(\S*) +│ +(\S+) │", capsys.readouterr().out)
    assert [row[0].split(",")[0] for row in rows] == [
        "sampler and scorer", "scorer", "an entry of the gradient",
    ]  # fmt: skip
    assert float(rows[0][2]) < 1e-4
    assert float(rows[1][2]) == float(rows[2][2]) == 0  # a CPU has all digits, and one order


def test_torch_takes_the_same_step(monkeypatch):
    """Log-probabilities, the loss, and the loss after Adam has moved every parameter."""
    pytest.importorskip("torch")
    from experiments.tools.sides import with_torch

    for side in (with_fjax, with_torch):  # or a model so small hardly moves
        monkeypatch.setattr(side, "LEARNING_RATE", 1e-4)
    work = Work(str(TINY), 4, 6)
    ours, theirs = with_fjax.make(work), with_torch.make(work)
    tokens = ours.draw()
    assert tokens.shape == theirs.draw().shape == (4, 7)
    log_probs = ours.score(tokens)
    np.testing.assert_allclose(theirs.score(tokens), log_probs, atol=1e-4)
    rows = rows_of(tokens, *log_probs)
    losses = {name: [side.update(*rows) for _ in range(2)] for name, side in
              (("fjax", ours), ("torch", theirs))}  # fmt: skip
    numbers = {"fjax": ours.numbers(), "torch": theirs.numbers()}
    assert numbers["fjax"] == numbers["torch"]
    bench.check_same(losses, numbers)
    assert losses["fjax"][0] != pytest.approx(losses["fjax"][1], rel=1e-4)
    with pytest.raises(RunError, match="do not compute the same"):
        bench.check_same(losses | {"torch": losses["torch"][::-1]}, numbers)


def test_adapters_take_the_same_step_merged_or_not(monkeypatch):
    """From the loss of the whole model, which Adam then moves less."""
    monkeypatch.setattr(with_fjax, "LEARNING_RATE", 1e-3)
    work = Work(str(TINY), 4, 6, lora_rank=2)
    sides = {
        "fjax": with_fjax.make(work),
        "lora": with_fjax.make(work, lora_merge=False),
        "lora_merged": with_fjax.make(work, lora_merge=True),
    }
    tokens = sides["fjax"].draw()
    rows = rows_of(tokens, *sides["fjax"].score(tokens))
    losses = {name: [side.update(*rows) for _ in range(2)] for name, side in sides.items()}
    numbers = {name: side.numbers() for name, side in sides.items()}
    bench.check_same(losses, numbers)
    assert numbers["lora"][0] < numbers["fjax"][0] == numbers["lora"][1]
    assert losses["lora"][1] != pytest.approx(losses["fjax"][1], rel=1e-4)
    for name in ("lora", "lora_merged"):
        np.testing.assert_allclose(sides[name].score(tokens)[0], rows.log_q, atol=1e-4)
        assert abs(sides[name].score(tokens)[1] - rows.log_q).max() > 1e-4


@pytest.mark.command
def test_the_command_beside_torch(monkeypatch, capsys):
    pytest.importorskip("torch")
    given = ("--against", "torch", "--samples", 2, "--max-new-tokens", 3, "--rounds", 1)
    assert run(monkeypatch, bench.main, *given, "--model", TINY) == 0
    printed = capsys.readouterr().out
    assert printed.count("torch") == 4  # three phases and the whole
    assert all(word in printed for word in ("draw: 2 rows of 3", "score", "update", "tokens/s"))
    with (
        processes.start(("fjax",), Work("no/such", 2, 3)) as sides,
        pytest.raises(RunError, match="fjax cannot draw: "),
    ):
        sides["fjax"].ask("draw")
