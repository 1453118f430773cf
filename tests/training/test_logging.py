"""JSON lines that survive infinities, resumes and kills; and what TensorBoard and W&B make of the same records."""

import json
import math
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from fjax.training import FanOut, JsonlLogger, TensorBoardLogger, WandbLogger, read_jsonl


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


RECORDS = [
    {"kind": "step", "step": 1, "log_z": jnp.float32(-4.5), "finite": np.True_, "clip": None, "list": [1, 2], "text": "great"},
    {"kind": "evaluation", "step": 1, "entropy": 80, "reverse_kl": math.inf, "ess": math.nan},
    {"kind": "step", "step": 2, "log_z": np.float64(-4.25)},
]
NUMBERS = {("step/log_z", 1): -4.5, ("step/finite", 1): 1, ("evaluation/entropy", 1): 80, ("step/log_z", 2): -4.25}
"""Of the records: (name, step) -> what TensorBoard and W&B are to show."""


def read_events(folder):
    """(name, step) -> value, of all event files in turn; and the steps from which each hides those before it."""
    from tensorboardX.proto.event_pb2 import Event

    values, purged = {}, []
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: len(path.name)):
        data = path.read_bytes()
        while data:  # length and its checksum, the event and its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            values |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            purged += [event.step] if event.HasField("session_log") else []
    return values, purged


def test_tensorboard_files_have_the_finite_numbers_by_kind(tmp_path):
    with TensorBoardLogger(tmp_path / "events") as logger:
        for record in RECORDS:
            logger.log(record)
    assert read_events(tmp_path / "events") == (NUMBERS, [])


def test_a_resumed_run_hides_from_tensorboard_what_it_repeats(tmp_path):
    for after_step, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        with TensorBoardLogger(tmp_path, after_step=after_step) as logger:
            for step in steps:
                logger.log({"step": step, "log_z": -step})
    values, purged = read_events(tmp_path)
    assert values == {("log_z", step): -step for step in (1, 2, 3, 4)}
    assert purged == [3]


def read_wandb(folder):
    """The records of a run's file: in blocks of 32 KiB, whole or in parts, each behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, whole, records = path.read_bytes(), 7, b"", []
    while at < len(data):
        if -at % 2**15 < 7:
            at += -at % 2**15
            continue
        length, part = struct.unpack("<HB", data[at + 4 : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if part in (1, 4):  # the only, or the last
            records, whole = [*records, Record.FromString(whole)], b""
    return records


def test_wandb_without_network_or_account_keeps_the_finite_numbers(tmp_path, monkeypatch, capfd):
    import wandb

    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    with WandbLogger("fjax", tmp_path / "run", run_id="a-1", name="a", config={"steps": 2}, mode="offline") as logger:
        for record in [*RECORDS, {"kind": "step", "step": 1, "log_z": -4.5}]:  # as a resumed run goes back
            logger.log(record)
    wandb.teardown()  # what W&B does at the end of a process: its service writes the last of the file
    records = read_wandb(tmp_path / "run")
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.project, run.display_name) == ("a-1", "fjax", "a")
    assert ("steps", "2") in [(item.key, item.value_json) for item in run.config.update]
    assert ("*", "step") in [(record.metric.glob_name, record.metric.step_metric) for record in records]
    items = [record.history.item for record in records if record.HasField("history")]
    rows = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row} for row in items]
    assert [row["step"] for row in rows] == [1, 1, 2, 1]
    found = {(name, row["step"]): value for row in rows for name, value in row.items() if "/" in name}
    assert found == NUMBERS
    assert capfd.readouterr() == ("", "")


def test_wandb_that_does_not_start_says_what_to_do(tmp_path, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.Error("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(RuntimeError, match=r"could not be started: No API key configured\. Mode 'offline'"):
        WandbLogger("fjax", tmp_path, run_id="a-1")


def test_what_is_not_installed_is_said_at_once(tmp_path, monkeypatch):
    for package in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"needs tensorboardX.*pip install 'fjax\[tensorboard\]'"):
        TensorBoardLogger(tmp_path / "new")
    with pytest.raises(ImportError, match=r"needs wandb.*pip install 'fjax\[wandb\]'"):
        WandbLogger("fjax", tmp_path / "new", run_id="a-1")
    assert not (tmp_path / "new").exists()


def test_several_loggers_get_every_record_and_are_all_closed(tmp_path):
    class Broken:
        def log(self, record):
            pass

        def close(self):
            raise OSError("disk full")

    first, last = (JsonlLogger(tmp_path / name) for name in ("first.jsonl", "last.jsonl"))
    with pytest.raises(OSError, match="disk full"), FanOut([first, Broken(), last]) as loggers:
        loggers.log({"step": 1})
    for logger, name in ((first, "first.jsonl"), (last, "last.jsonl")):
        assert read_jsonl(tmp_path / name) == [{"step": 1}]
        with pytest.raises(ValueError, match="closed file"):
            logger.log({"step": 2})
