"""Writes docs/quickstart.ipynb, the quickstart's page as a notebook: python -m tests.make_notebook."""

import json
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "quickstart.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")


def notebook(page: str) -> str:
    """Text as it is, blocks of Python as cells to run, without outputs."""
    parts = re.split(r"```python\n(.*?)\n```", page, flags=re.DOTALL)
    kinds = ("markdown", "code")
    cells = [_cell(i, kinds[i % 2], part.strip()) for i, part in enumerate(parts) if part.strip()]
    about = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    content = {"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _cell(number: int, kind: str, text: str) -> dict:
    cell = {"id": str(number), "cell_type": kind, "metadata": {}, "source": text.splitlines(True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def code(text: str) -> list[str]:
    """What the cells of a notebook run, in turn."""
    return ["".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(PAGE.read_text()))
