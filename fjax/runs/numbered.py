"""Folders that are named TITLE-NUMBER: one for a new run, and the newest that has begun."""

from pathlib import Path

from fjax.runs.reading import RunError


def _numbers(base: Path, title: str) -> dict[int, Path]:
    """The folders TITLE-NUMBER, by number."""
    there = base.iterdir() if base.is_dir() else ()
    numbered = {
        path.name.removeprefix(f"{title}-"): path
        for path in there
        if path.name.startswith(f"{title}-")
    }
    return {int(number): path for number, path in numbered.items() if number.isdecimal()}


def new_folder(base: Path, title: str) -> Path:
    """TITLE-NUMBER, made here and now: two runs that begin at the same moment get one each."""
    number = max(_numbers(base, title), default=-1) + 1
    while True:
        folder = base / f"{title}-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not base.is_dir():
                raise RunError(
                    f"Cannot write to the run folder {folder}: {base} is no folder."
                ) from None
            number += 1
        except OSError as error:
            raise RunError(
                f"Cannot write to the run folder {folder}: {error.strerror}. Give another folder "
                f"(--run-folder)."
            ) from error


def newest_folder(base: Path, title: str) -> Path:
    """The one with the highest number in which a run has begun."""
    begun = {
        number: path
        for number, path in _numbers(base, title).items()
        if (path / "config.json").is_file()
    }
    if not begun:
        raise RunError(
            f"There is no run {base / title}-* to resume. Leave resume=True (--resume) out, or "
            f"name its folder (--run-folder)."
        )
    return begun[max(begun)]
