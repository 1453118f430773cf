"""Sides in processes of their own, asked in turn: each has its memory to itself."""

import multiprocessing
import re
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fjax.runs import RunError

from .work import Work

SIDES = {
    "fjax": ("with_fjax", {}),
    "lora": ("with_fjax", {"lora_merge": False}),
    "lora_merged": ("with_fjax", {"lora_merge": True}),
    "torch": ("with_torch", {}),
}
"""Side -> the module that makes it, and how."""


class Worker:
    """A side, wherever it is: `ask` waits for what it answers."""

    def __init__(self, name: str, work: Work):
        context = multiprocessing.get_context("spawn")  # a fork would share what is loaded here
        self.name, (self._ours, theirs) = name, context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, work), daemon=True)
        self._process.start()
        theirs.close()  # the end of the process is then the end of what can be read

    def ask(self, phase: str, *given: Any) -> Any:
        """What a phase of the side answers, or "memory": the most bytes that its process held.

        Raises:
            RunError: if it could not, or its process is gone.
        """
        try:
            self._ours.send((phase, given))
            done, answer = self._ours.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise RunError(
                f"The process of {self.name} ended in {phase} (exit status "
                f"{self._process.exitcode}); if it was killed for memory, take fewer --samples."
            ) from error
        if not done:
            raise RunError(f"{self.name} cannot {phase}: {answer}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._ours.close()  # which it sees, unless it is in the middle of something
        self._process.join(5)
        self._process.terminate()
        self._process.join()


@contextmanager
def start(names: tuple[str, ...], work: Work) -> Iterator[Mapping[str, Worker]]:
    """A worker for each side; within it they run."""
    workers = {name: Worker(name, work) for name in names}
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def _serve(connection: Connection, name: str, work: Work) -> None:
    """Makes the side when it is first asked, so that what is wrong with it is an answer, too."""
    side = None
    while True:
        try:
            phase, given = connection.recv()
        except EOFError:
            return
        try:
            if side is None:
                module, options = SIDES[name]
                side = import_module(f".{module}", __package__).make(work, **options)
            answer = _peak() if phase == "memory" else getattr(side, phase)(*given)
            connection.send((True, answer))
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}"))


def _peak() -> int:
    """Bytes of this process's memory at their most."""
    status = Path("/proc/self/status")
    if status.is_file():  # of Linux, where getrusage tells a process its parent's peak, too
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
