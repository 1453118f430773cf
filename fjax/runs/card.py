"""The model card beside an exported model: README.md, made of what its run has written.

What the model is, how it was made and what it does, with every figure that of the step that was
exported, so that the folder can be handed on as it is.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from fjax import _markdown
from fjax.runs.aim import Aim, read_aim
from fjax.runs.folder import write_text
from fjax.runs.names import title_of
from fjax.runs.reading import MODEL, read_config, read_figures, read_samples
from fjax.runs.records import spread
from fjax.runs.rows import Record, before_and_after
from fjax.runs.text import on_one_line
from fjax.runs.verdict import verdict

FrontMatter = Mapping[str, str | Sequence[str]]
"""Names of the hub's, such as base_model and license, and what they are."""

MARK = "<!-- Made by fjax of its run, and made again with it; without this line it stays. -->"

SHOWN = 8
"""Samples of the first and of the last evaluation, beside one another."""

NEW_TOKENS = 20
"""Where the run does not say how long its samples are."""


def write(folder: Path, step: int, about: FrontMatter | None = None) -> None:
    """Makes README.md of the model in a run's folder; one that is somebody else's stays.

    Args:
        folder: of the run.
        step: of the exported model.
        about: front matter of the base model's, if anything is known of it.

    Raises:
        RunError: if the run's files are damaged.
    """
    path = folder / MODEL / "README.md"
    theirs = path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace")
    if not path.parent.is_dir() or theirs:
        return
    write_text(path, page(folder, step, about))


def page(folder: Path, step: int, about: FrontMatter | None = None) -> str:
    """The card of a run's model as it was at a step that was evaluated; see `write`."""
    config = read_config(folder, "command", "versions", "devices")
    (evaluations, of_p), aim = read_figures(folder), read_aim(config)
    first = evaluations[0]
    last = next(record for record in evaluations if record["step"] == step)
    samples = read_samples(folder)
    parts = [
        _front_matter(config, about or {}),
        MARK,
        f"# {folder.resolve().name}",
        _said(first, last, aim, of_p),
        _made(config, aim, last, about or {}),
        _figures(first, last, of_p, aim),
        f"## Samples\n\n{beside(samples, first['step'], step)}",
        _use(samples, config),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _front_matter(config: Mapping, about: FrontMatter) -> str:
    objective = str(config.get("divergence") or config.get("objective") or "")
    tags = ["fjax", "alignment", *([objective.replace("_", "-")] if objective else [])]
    fields = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    return _markdown.front_matter({**about, **fields})


def _said(first: Record, last: Record, aim: Aim, of_p: Record | None) -> str:
    """What was wanted, and how far the run came."""
    reached = verdict(first, last, aim, of_p) if last is not first else ""
    wanted = [f"The target: {aim.target}."] if aim.target else []
    return _markdown.as_text(on_one_line(" ".join([*wanted, reached])))


def _made(config: Mapping, aim: Aim, last: Record, about: FrontMatter) -> str:
    """By what, for how long, and from what, as a list."""
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    devices = ", ".join(dict.fromkeys(config["devices"]))
    lines = {
        "Base model": Path(str(config["model"])).name if "model" in config else "",
        "Licence": f"{about['license']}, as the base model's" if "license" in about else "",
        "Minimised": title_of(aim.objective),
        "Algorithm": str(config.get("algorithm", "")),
        "Seed": str(config.get("seed", "")),
        "Drawn": f"{last['samples']:,} samples in {last['step']} steps, {last['seconds']:.0f} s",
        "On": f"{devices} ({versions})",
    }
    listed = (f"- **{name}.** {_markdown.as_text(text)}" for name, text in lines.items() if text)
    return "\n".join(listed) + f"\n\n```bash\n{on_one_line(config['command'])}\n```"


def _figures(first: Record, last: Record, of_p: Record | None, aim: Aim) -> str:
    headings, found, said = before_and_after(first, last, of_p, aim)
    escaped = ([_markdown.as_text(cell) for cell in row] for row in found)
    return f"## Before → after\n\n{_markdown.table(headings, escaped)}\n\n{said}"


def beside(records: Sequence[Mapping], before: int, after: int, shown: int = SHOWN) -> str:
    """A table of the samples of two evaluations beside one another, as many as are shown."""
    steps = (before, after)
    columns = (spread([r for r in records if r["step"] == step], shown) for step in steps)
    rows = ([_sample(record) for record in row] for row in zip_longest(*columns, fillvalue={}))
    return _markdown.table([f"before (step {before})", f"after (step {after})"], rows)


def _sample(record: Mapping) -> str:
    prompt, text = (
        _markdown.as_text(on_one_line(str(record.get(name, "")))) for name in ("prompt", "text")
    )
    return f"**{prompt}** {text}" if prompt else text


def _use(samples: Sequence[Mapping], config: Mapping) -> str:
    prompt = next((json.dumps(r["prompt"]) for r in samples if "prompt" in r), None)
    text = f"start + {prompt}" if prompt else "start"
    chat = "  # or what apply_chat_template makes of a conversation" if prompt else ""
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
start = tokenizer.bos_token or tokenizer.eos_token
text = {text}{chat}
prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
rows = model.generate(**prompt, max_new_tokens={config.get("max_new_tokens", NEW_TOKENS)})
print(tokenizer.decode(rows[0], skip_special_tokens=True))
```

`generation_config.json` has temperature 1 and the whole vocabulary, at which all of this was
measured."""
