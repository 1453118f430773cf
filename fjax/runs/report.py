"""A run on one page: report.html.

It has its pictures inside, no scripts and nothing to load, so it can be mailed.
"""

import base64
from collections.abc import Iterable
from html import escape
from itertools import zip_longest
from pathlib import Path

from fjax.runs import rows
from fjax.runs.aim import Aim, read_aim
from fjax.runs.folder import write_text
from fjax.runs.reading import read_config, read_figures, read_samples
from fjax.runs.records import spread
from fjax.runs.rows import Record
from fjax.runs.text import on_one_line, pieces
from fjax.runs.verdict import verdict

SHOWN = 20
"""Samples of the first and of the last evaluation, beside one another."""

ABOUT = ("command", "versions", "devices")
"""What config.json has besides settings."""

STYLE = """
:root { color-scheme: light dark; --text: #1c1c1e; --muted: #63636b; --page: #fff; --box: #f4f4f6; --line: #dcdce0; --mark: #ffe58a }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e9; --muted: #9d9da6; --page: #17171a; --box: #222226; --line: #38383e; --mark: #6b5a12 }
}
body { max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif }
h1 { margin: 0 0 .6rem; font-size: 1.25rem; line-height: 1.4; overflow-wrap: anywhere }
.verdict { font-weight: 400 }
mark { border-radius: 3px; padding: 0 .15em; background: var(--mark); color: inherit }
h2 { margin: 2.4rem 0 .7rem; font-size: 1.15rem }
.muted, dt { color: var(--muted); font-size: .85rem }
pre { padding: .7rem 1rem; border-radius: 6px; background: var(--box); font-size: .9rem; white-space: pre-wrap;
  overflow-wrap: anywhere }
table { border-collapse: collapse }
th, td { padding: .35rem 1.2rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { color: var(--muted); font-size: .85rem; font-weight: 600 }
.figures td + td, .figures th + th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.samples { table-layout: fixed; width: 100% }
.samples td { overflow-wrap: anywhere }
.samples .muted { display: block }
.prompt { color: var(--muted) }
img { display: block; max-width: 100%; margin-bottom: 1rem; border: 1px solid var(--line); border-radius: 6px }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .5rem 1.2rem }
dd { margin: 0; overflow-wrap: anywhere }
"""


def write(folder: Path) -> None:
    """Makes report.html from what a run has written so far.

    Raises:
        RunError: if it has no evaluation yet.
    """
    config = read_config(folder, *ABOUT)
    (records, of_p), aim = read_figures(folder), read_aim(config)
    name, (first, *_, last) = folder.resolve().name, (records[0], *records)
    pictures = [_picture(path) for path in sorted(folder.glob("*.png"))]
    parts = [
        _first_line(name, aim, verdict(first, last, aim, of_p) if last is not first else ""),
        _about(name, config, last),
        "<h2>Before → after</h2>",
        _figures(first, last, of_p, aim),
        *(["<h2>Plots</h2>", *pictures] if pictures else []),
        "<h2>Samples</h2>",
        _samples(read_samples(folder), aim.highlight),
        "<h2>Settings</h2>",
        _settings(config),
    ]
    write_text(folder / "report.html", _page(name, "\n".join(parts)))


def _page(title: str, body: str) -> str:
    # The policy makes sure of it: whatever a text may hold, nothing of it is run or loaded.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy" content="{policy}"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _first_line(name: str, aim: Aim, said: str) -> str:
    """What was wanted, and how far the run came."""
    reached = f': <span class="verdict">{_text(said)}</span>' if said else ""
    return f"<h1>{_text(aim.target or name)}{reached}</h1>"


def _about(name: str, config: dict, last: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    devices = ", ".join(
        f"{config['devices'].count(kind)} × {kind}" for kind in dict.fromkeys(config["devices"])
    )
    return f"""<p class="muted">{_text(name)}: {last["step"]} steps, {last["samples"]:,} samples, {last["seconds"]:.0f} s on {_text(devices)}
({_text(versions)})</p>
<pre>{_text(config["command"])}</pre>"""


def _figures(first: Record, last: Record, of_p: Record | None, aim: Aim) -> str:
    headings, found, said = rows.before_and_after(first, last, of_p, aim)
    table = _table("figures", headings, (map(_text, row) for row in found))
    return f'{table}\n<p class="muted">{_text(said)}</p>'


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_text(path.stem)}" src="data:image/png;base64,{data}"/>'


def _samples(records: list[dict], highlight: str) -> str:
    steps = [min(record["step"] for record in records), max(record["step"] for record in records)]
    columns = (
        spread([record for record in records if record["step"] == step], SHOWN) for step in steps
    )
    cells = (
        [_sample(record, highlight) if record else "" for record in row]
        for row in zip_longest(*columns)
    )
    return _table("samples", [f"before (step {steps[0]})", f"after (step {steps[1]})"], cells)


def _sample(record: dict, highlight: str) -> str:
    features = (
        f"{_text(name)} {value:.3g}"
        for name, value in record.items()
        if name not in ("step", "prompt", "text")
    )
    prompt = f'<span class="prompt">{_text(record["prompt"])}</span> ' if "prompt" in record else ""
    found = pieces(record["text"], highlight)
    text = "".join(f"<mark>{escape(p)}</mark>" if hit else escape(p) for p, hit in found)
    return f'{prompt}{text or "(empty)"}<span class="muted">{", ".join(features)}</span>'


def _settings(config: dict) -> str:
    pairs = (
        (name, "none" if value is None else value)
        for name, value in config.items()
        if name not in (*ABOUT, "aim", "digests")
    )
    return f"<dl>{''.join(f'<div><dt>{_text(n)}</dt><dd>{_text(v)}</dd></div>' for n, v in pairs)}</dl>"


def _table(kind: str, headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="{kind}">\n<tr>{head}</tr>\n{body}\n</table>'


def _text(value: object) -> str:
    """Anything that a model or a user wrote, as text and nothing else."""
    return escape(on_one_line(str(value)))
