"""One writer a folder: a lock that says who has it, and that a dead process does not keep."""

import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not a POSIX system: there the file alone has to do
    fcntl = None

LOCK_NAME = "lock"
"""Of the file in the folder."""


class FolderLock:
    """Held from here until `release`, at the latest until this process ends.

    The file names host, process and time, for people and for other hosts. Whether a process of this
    host still lives is asked of the kernel, which drops its own lock with the process: a number in
    a file may be another process's by now. Where a file system has no such locks, the number has to
    do.

    Args:
        folder: what is locked; it must be there.

    Raises:
        BlockingIOError: if another process has it, with what to do.
    """

    def __init__(self, folder: str | Path):
        self._path, here = Path(folder) / LOCK_NAME, socket.gethostname()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        mine = json.dumps({"host": here, "pid": os.getpid(), "since": since})
        self._file, made, free = _open_locked(self._path, mine)
        found = None if made else _parse(self._file.read())
        if free is None:
            free = found is None or not _lives(found["pid"])
        if not free or (found is not None and found["host"] != here):
            self._file.close()
            raise BlockingIOError(_in_use(self._path, found, here))
        self.taken_over = None if found is None else found["pid"]
        """The process of this host that had it, and died without giving it back; None if there was
        none."""
        if not made:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(mine)
            self._file.flush()

    def release(self) -> None:
        """Gives it back; a second time does nothing."""
        if self._file.closed:
            return
        if _is_at(self._file, self._path):
            self._path.unlink()
        self._file.close()


class NoLock:
    """In place of a lock, for whoever another process has it for."""

    taken_over = None

    def release(self) -> None:
        """Nothing is held."""


def _open_locked(path: Path, mine: str) -> tuple[IO[str], bool, bool | None]:
    """The lock's file, whether it was made just now, and whether the kernel has locked it for us.

    None where it cannot.
    """
    while True:
        made = _make(path, mine)
        try:
            file = path.open("r+", encoding="utf-8")
        except FileNotFoundError:  # given back between the two
            continue
        free = _lock(file)
        # Whoever had it may have deleted it between the two: then it is locked, but no longer the
        # folder's.
        if not free or _is_at(file, path):
            return file, made, free
        file.close()


def _make(path: Path, text: str) -> bool:
    """Whether it was not there, and is now, with all of its text.

    Of several hosts that begin at the same moment one makes the link, on any shared file system,
    and nobody ever reads half of it.
    """
    whole = path.with_name(f"{path.name}-{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        whole.write_text(text, encoding="utf-8")
        os.link(whole, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        return _make_without_links(path, text)
    finally:
        whole.unlink(missing_ok=True)
    return True


def _make_without_links(path: Path, text: str) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _lock(file: IO[str]) -> bool | None:
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _parse(text: str) -> dict | None:
    """Who wrote it; None if it is empty or torn.

    So a process leaves it that is killed while it writes.
    """
    try:
        found = json.loads(text)
        return {"host": str(found["host"]), "pid": int(found["pid"]), "since": str(found["since"])}
    except (ValueError, KeyError, TypeError):
        return None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _in_use(path: Path, found: dict | None, here: str) -> str:
    if found is None:
        return (
            f"{path.parent} is in use by another process, which has just begun. Let it end first."
        )
    by = (
        f"{path.parent} is in use by process {found['pid']} on host {found['host']}, since "
        f"{found['since']}."
    )
    if found["host"] == here:
        return f"{by} Let it end, or stop it, first."
    return (
        f"{by} Whether it still runs cannot be seen from here ({here}): if it does not, delete "
        f"{path}."
    )
