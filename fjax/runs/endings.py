"""How a command ends early: at a signal, or because nobody reads its output any more.

While it imports, it leaves at once: an exception there would pass through code that loses it, or
dies of it. Later the first signal raises `Interrupted`, so that what was opened is closed; within
`graceful_stop` it only asks to stop, so that a run saves. One more is always heard sooner than the
one before.

Python hears a signal once the main thread is back from whatever it has called, and a compiler keeps
it for minutes, where a machine that is taken away leaves seconds. So within `graceful_stop` another
thread listens as well, and saves where the main one cannot.
"""

import atexit
import io
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 10.0
"""Seconds that a command has to end when it is interrupted at once."""

HEARD_WITHIN = 1.0
"""Seconds that the main thread has to hear a signal, before another one saves in its place."""

_timers: list[threading.Timer] = []


class Interrupted(KeyboardInterrupt):
    """A signal that was to be obeyed at once."""

    def __init__(self, number: int):
        super().__init__(f"{signal.Signals(number).name}")
        self.status = 128 + number


class AskedToStop(Interrupted):
    """The first signal, where `Stop.obeyed_at_once` lets it through: there is time to save."""


def leave_at_once(number: int, _: object) -> None:
    """A handler: one line, and out.

    Without a word from anything that is half imported or half closed.
    """
    with suppress(OSError):
        os.write(2, f"Interrupted at once ({signal.Signals(number).name}).\n".encode())
    os._exit(128 + number)


def leave(status: int) -> NoReturn:
    """Ends the process as ``sys.exit`` does; after a signal without taking Python apart.

    What it had begun may still be computed in a thread of XLA's, and a process that is taken apart
    around that dies of it, though everything is saved.
    """
    if status > 128:
        atexit._run_exitfuncs()  # other hosts are told that this end is a good one
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def interrupt(number: int, _: object) -> None:
    """A handler: raises, and neither the next signal nor the clock waits for what that leads to.

    An exception that happens to arise within a callback, or while an object is destroyed, is lost.
    """
    handle(leave_at_once)
    last = threading.Timer(PATIENCE, leave_at_once, (number, None))
    last.daemon = True
    last.start()
    _timers.append(last)
    raise Interrupted(number)


def handle(handler: Callable) -> dict:
    """Gives every signal the handler, and returns what they had.

    Not a SIGHUP that is ignored, as under nohup.
    """
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return {
        number: signal.signal(number, handler)
        for number in SIGNALS
        if not (ignored and number == signal.SIGHUP)
    }


@contextmanager
def handled_by(handler: Callable) -> Iterator[None]:
    """Within it every signal has the handler."""
    before = handle(handler)
    try:
        yield
    finally:
        while _timers:  # whatever was raised has come this far
            _timers.pop().cancel()
        for number, earlier in before.items():
            signal.signal(number, earlier)


class Stop:
    """The number of the first signal, once it has come; read between steps."""

    signal: int = 0

    def __init__(self):
        self._aside, self._over, self._one_saves = None, False, threading.RLock()

    @contextmanager
    def obeyed_at_once(
        self,
        *,
        unless: Callable[[], bool] = lambda: False,
        save: Callable[[], None] | None = None,
    ) -> Iterator[None]:
        """For what takes long and leaves nothing half done.

        A signal within it, or before it, raises `AskedToStop`.

        Args:
            unless: whether there is no way back by now; then a signal only asks to stop.
            save: saves what there was before, from another thread and while the main one is still
                at work, which then ends the process. None: the main thread is waited for.
        """

        def end(number: int, _: object) -> None:
            with self._one_saves:  # never to be had again, once the other thread has saved
                self.signal = number
            if unless():
                handle(interrupt)
                return
            handle(leave_at_once)
            raise AskedToStop(number)

        with handled_by(end):
            if self.signal:
                end(self.signal, None)
            self._aside = None if save is None else (unless, save)
            try:
                yield
            finally:
                self._aside = None

    def _save_aside(self, number: int) -> None:
        """Until the main thread hears of it: saves where there is something to save, and leaves."""
        until = time.monotonic() + HEARD_WITHIN
        while not (self.signal or self._over):
            time.sleep(0.05)
            aside = self._aside
            if aside is None or time.monotonic() < until or aside[0]():
                continue
            with self._one_saves:
                if self.signal or self._aside is not aside:
                    continue
                with suppress(Exception):  # the main thread has another try, and says what it is
                    aside[1]()
                    sys.stdout.flush()
                    os._exit(128 + number)
            until = math.inf


@contextmanager
def graceful_stop() -> Iterator[Stop]:
    """Within it the first signal only asks to stop; a second one interrupts at once."""
    stop = Stop()

    def ask(number: int, _: object) -> None:
        stop.signal = number
        handle(interrupt)

    with handled_by(ask), _listening(stop._save_aside):
        try:
            yield stop
        finally:
            stop._over = True


@contextmanager
def _listening(hear: Callable[[int], None]) -> Iterator[None]:
    """Within it another thread is told of every signal, whatever the main thread is doing."""
    ear, mouth = socket.socketpair()

    def listen() -> None:
        while heard := ear.recv(1):
            if heard[0] in SIGNALS:
                hear(heard[0])

    with closing(ear), closing(mouth):
        mouth.setblocking(False)
        before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            mouth.shutdown(socket.SHUT_WR)  # ends its last recv
            listener.join()


class Nowhere(io.TextIOBase):
    """A text stream that loses what is written."""

    def write(self, text: str) -> int:
        """Drops the text, and says that it was written."""
        return len(text)


class Output:
    """A text stream that outlives its reader.

    That is a hang-up then, as when a terminal is closed, and no error.
    """

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes; once nobody reads any more, the text is lost."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._hang_up()
            return len(text)

    def flush(self) -> None:
        """As for any stream."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._hang_up()

    def _hang_up(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError):
            # what its buffer still has goes there, when the process ends
            os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        self._stream = Nowhere()
        with suppress(OSError):
            print("Nobody reads any more what is printed: stopping.", file=sys.stderr)
        signal.raise_signal(signal.SIGHUP)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within it printing does not fail.

    Not for want of a reader, of a stream, or of a character in its encoding.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # None if it was closed by whoever started us.
    sys.stdout, sys.stderr = (Output(Nowhere() if stream is None else stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
