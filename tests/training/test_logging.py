"""JSON lines that survive infinities, resumes and kills."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from fjax.training import JsonlLogger, read_jsonl


def test_round_trip_of_whatever_a_step_reports(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlLogger(path) as logger:
        logger.log({"step": 1, "a": jnp.float32(0.5), "b": np.inf, "c": -np.inf, "finite": np.True_, "kind": "step"})
        logger.log({"step": 2, "a": float("nan"), "list": [1, 2.5], "none": None})
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    first, second = read_jsonl(path)
    assert first == {"step": 1, "a": 0.5, "b": math.inf, "c": -math.inf, "finite": True, "kind": "step"}
    assert math.isnan(second.pop("a"))
    assert second == {"step": 2, "list": [1, 2.5], "none": None}


def test_records_are_on_disk_at_once_and_a_resumed_run_drops_what_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    for step in range(5):
        logger.log({"step": step})
    assert len(read_jsonl(path)) == 5
    with JsonlLogger(path, after_step=2) as resumed:
        resumed.log({"step": 3, "again": True})
    logger.close()
    assert [record["step"] for record in read_jsonl(path)] == [0, 1, 2, 3]
    assert read_jsonl(path)[-1]["again"] is True


def test_a_line_cut_off_by_a_kill_is_left_out_but_a_broken_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "a')
    assert read_jsonl(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match="Line 2 of"):
        read_jsonl(path)
