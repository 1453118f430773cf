"""JSON lines that survive infinities, resumes and kills; and what TensorBoard and W&B make of the
same records."""

import io
import json
import math
import struct
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fjax.training import FanOut, JsonlLogger, TensorBoardLogger, WandbLogger, read_jsonl
from fjax.training.logging import _last_line


def test_round_trip_of_whatever_a_step_reports(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlLogger(path) as logger:
        logger.log(
            {
                "step": 1,
                "a": jnp.float32(0.5),
                "b": np.inf,
                "c": -np.inf,
                "finite": np.True_,
                "kind": "step",
            }
        )
        logger.log({"step": 2, "a": float("nan"), "list": [1, 2.5], "none": None})
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    first, second = read_jsonl(path)
    assert first == {
        "step": 1,
        "a": 0.5,
        "b": math.inf,
        "c": -math.inf,
        "finite": True,
        "kind": "step",
    }
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


TEXTS = st.one_of(
    st.text(),
    st.text(alphabet="'-nainf", max_size=6),
    st.sampled_from(
        [
            "nan",
            "inf",
            "-inf",
            "'nan",
            "''-inf",
            "NaN",
            "Infinity",
            "\u2028",
            "\x85",
            "\ufeff",
            "\ud800",
        ]
    ),
)
VALUES = st.recursive(
    st.one_of(TEXTS, st.floats(), st.integers(), st.booleans(), st.none()),
    lambda values: st.one_of(
        st.lists(values, max_size=3), st.dictionaries(TEXTS, values, max_size=3)
    ),
    max_leaves=8,
)


def same(a, b) -> bool:
    """Of one type and value; NaN is NaN, and -0.0 is not 0.0."""
    if isinstance(a, dict):
        return type(b) is dict and [*a] == [*b] and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return type(b) is list and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


@given(st.lists(st.dictionaries(TEXTS, VALUES, max_size=4), max_size=4))
def test_whatever_is_logged_is_read(tmp_path_factory, records):
    """Texts stay texts, "nan" among them; numbers stay numbers, nested or not; and the file is JSON
    to everyone else."""
    path = tmp_path_factory.mktemp("any") / "any.jsonl"
    with JsonlLogger(path) as logger:
        for record in records:
            logger.log(record)
    assert same(records, read_jsonl(path))
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_files_from_before_texts_were_told_from_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": "inf", "b": "-inf", "text": "great", "c": NaN}\n')
    (record,) = read_jsonl(path)
    assert math.isnan(record.pop("c"))
    assert record == {"step": 1, "a": math.inf, "b": -math.inf, "text": "great"}


@pytest.mark.parametrize("after_step", [None, 5])
@pytest.mark.parametrize(
    ("there", "kept"),
    [
        (b"", []),
        (b'{"step": 1}\n', [1]),
        (b'{"step": 1}\n{"step": 2, "a', [1]),
        (b'{"step": 1}\n{"step": 2}', [1, 2]),  # the line end alone is lost
        (b'{"step": 1}', [1]),
        (b'{"st', []),
        (b'{"step": 1}\n{"text": "\xc3', [1]),  # within a letter
        (b'{"step": 1}\n\0\0\0\0', [1]),  # what a power cut leaves
        (b'\xef\xbb\xbf{"step": 1}', [1]),  # a byte order mark
        (b'\xef\xbb\xbf{"step": 1}\n{"step": 2}\n', [1, 2]),
        (b'{"step": 1}\r\n\r\n{"step": 2}\r\n', [1, 2]),
        (
            b'{"step": 1, "text": "'
            + b"x" * 200_000
            + b'"}\n{"step": 2, "text": "'
            + b"y" * 200_000,
            [1],
        ),
    ],
)
def test_nothing_is_lost_behind_a_torn_line(tmp_path, there, kept, after_step):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(there)
    assert [record["step"] for record in read_jsonl(path)] == kept
    for step in (3, 4):
        with JsonlLogger(path, after_step=after_step) as logger:
            logger.log({"step": step})
    assert [record["step"] for record in read_jsonl(path)] == [*kept, 3, 4]
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (b"5\n", "Line 1 of .* is not a record, a JSON object: it is '5'"),
        (b'{"step": 1}\n[1, 2]\n{"step": 2}\n', "Line 2 of"),
        (b'{"step": 1}\n{"step": "\xff"}\n', "Line 2 of .*utf-8"),
        (b'{"step": 1}\n{"ste\n', "Line 2 of"),  # a line that was ended was not cut off
        (b"a text of somebody's", "Line 1 of"),
    ],
)
def test_a_damaged_file_is_named_and_left_alone(tmp_path, there, message):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(there)
    with pytest.raises(ValueError, match=message):
        read_jsonl(path)
    with pytest.raises(ValueError, match=message):
        JsonlLogger(path, after_step=1)
    if not there.endswith(b"\n"):
        with pytest.raises(ValueError, match="The last line of"):
            JsonlLogger(path)
    assert path.read_bytes() == there


def test_a_kill_before_the_last_moment_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    """The new content is whole on disk before it takes the name."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    written = []

    def killed(self, _):
        written.append(self.read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonlLogger(path, after_step=1)
    assert written == ['{"step": 1}\n']
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_step_that_is_no_number_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": "late"}\n')
    with pytest.raises(ValueError, match="has the step 'late'"):
        JsonlLogger(path, after_step=1)


def test_opening_for_more_reads_the_end_alone():
    """A run opens its files of samples at every evaluation; reading them whole would take longer
    each time."""
    line, read = b'{"step": 1, "text": "a film"}\n', []

    class Counted(io.BytesIO):
        def read(self, size=-1, /):
            read.append(size)
            return super().read(size)

    assert _last_line(Counted(line * 50_000)) == (len(line) * 49_999, line)
    assert 0 < sum(read) <= 2**16


RECORDS = [
    {
        "kind": "step",
        "step": 1,
        "log_z": jnp.float32(-4.5),
        "finite": np.True_,
        "clip": None,
        "list": [1, 2],
        "text": "great",
    },
    {"kind": "evaluation", "step": 1, "entropy": 80, "reverse_kl": math.inf, "ess": math.nan},
    {"kind": "step", "step": 2, "log_z": np.float64(-4.25)},
]
NUMBERS = {
    ("step/log_z", 1): -4.5,
    ("step/finite", 1): 1,
    ("evaluation/entropy", 1): 80,
    ("step/log_z", 2): -4.25,
}
"""Of the records: (name, step) -> what TensorBoard and W&B are to show."""


def read_events(folder):
    """(name, step) -> value, of all event files in turn; and the steps from which each hides those
    before it."""
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


SAMPLES = [
    {"step": 2, "prompt": "A | <b>", "text": "one\n*two*", "satisfaction": np.float32(1), "r": 2.0},
    {"step": 2, "text": "", "satisfaction": np.float32(0), "r": -np.inf, "n": np.int64(3)},
]


def test_tensorboard_has_the_samples_of_an_evaluation_as_a_table(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with FanOut([TensorBoardLogger(tmp_path), JsonlLogger(tmp_path / "metrics.jsonl")]) as logger:
        logger.log_samples(SAMPLES)
    assert read_jsonl(tmp_path / "metrics.jsonl") == []  # figures alone
    (path,) = tmp_path.glob("events.out.tfevents.*")
    data, shown = path.read_bytes(), {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
        for value in event.summary.value:
            shown[value.tag, event.step] = value.tensor.string_val[0].decode()
    assert list(shown) == [("evaluation/samples/text_summary", 2)]
    assert shown.popitem()[1].splitlines() == [
        "| prompt | text | satisfaction | r | n |",
        "| --- | --- | --- | --- | --- |",
        r"| A \| &lt;b> | one \*two\* | 1 | 2 |  |",
        "|  |  | 0 | -inf | 3 |",
    ]


def read_wandb(folder):
    """The records of a run's file: in blocks of 32 KiB, whole or in parts, each behind a header of
    7 bytes."""
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
    with WandbLogger(
        "fjax", tmp_path / "run", run_id="a-1", name="a", config={"steps": 2}, mode="offline"
    ) as logger:
        # as a resumed run goes back
        for record in [*RECORDS, {"kind": "step", "step": 1, "log_z": -4.5}]:
            logger.log(record)
        logger.log_samples(SAMPLES)
    # what W&B does at the end of a process: its service writes the last of the file
    wandb.teardown()
    records = read_wandb(tmp_path / "run")
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.project, run.display_name) == ("a-1", "fjax", "a")
    assert ("steps", "2") in [(item.key, item.value_json) for item in run.config.update]
    assert ("*", "step") in [
        (record.metric.glob_name, record.metric.step_metric) for record in records
    ]
    items = [record.history.item for record in records if record.HasField("history")]
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in row}
        for row in items
    ]
    assert (rows[-1]["step"], "evaluation/samples" in rows.pop()) == (2, True)
    (path,) = (tmp_path / "run").rglob("*.table.json")
    table = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert table["columns"] == ["prompt", "text", "satisfaction", "r", "n"]
    assert table["data"] == [["A | <b>", "one\n*two*", 1, 2, None], [None, "", 0, "-inf", 3]]
    assert [row["step"] for row in rows] == [1, 1, 2, 1]
    found = {
        (name, row["step"]): value for row in rows for name, value in row.items() if "/" in name
    }
    assert found == NUMBERS
    assert capfd.readouterr() == ("", "")


def test_wandb_that_does_not_start_says_what_to_do(tmp_path, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.Error("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        RuntimeError, match=r"could not be started: No API key configured\. Mode 'offline'"
    ):
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
