"""The other processes of a run: who has come, and who is still there.

All meet at the coordinator's address before JAX joins them, so that a wrong number is a sentence at
once; JAX would wait for minutes and end with a page of C++. Each then keeps its connection to the
first one for as long as it lives. The kernel closes it with the process, whatever that was doing,
and notices within half a minute that a whole host is gone: nobody waits in a collective for one
that never comes.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

LOST = 75
"""The exit status of a process that ends because another one is lost: EX_TEMPFAIL, try again."""

GRACE = 3.0
"""Seconds that a process has to say itself what is wrong, before it ends because another has."""

ENDED_WITHIN = 10.0
"""Seconds that others have to end, once all have come to a good end."""

HELLO_WITHIN = 5.0
"""Seconds within which whoever comes must say who it is; others knock at a port, too."""

COME, WELL = "come", "well"
"""All are there; and: this process has come to a good end."""


class Peers:
    """The other processes, as far as this one has a connection to them.

    The first has one to each, each other one to the first, which passes on what it hears.
    """

    def __init__(self, process: int, processes: int, connections: Mapping[int, socket.socket]):
        self._process, self._processes, self._connections = process, processes, connections
        self._lost, self._heard, self._over = "", threading.Event(), False
        self._one_loses, self._one_ends = threading.Lock(), threading.Lock()
        self.advice: Callable[[], str] = lambda: ""
        """What to do once one is lost, asked for only then."""
        for connection in connections.values():
            _keep_alive(connection)
        listen = partial(threading.Thread, target=self._listen, daemon=True)
        self._listeners = [listen(args=pair) for pair in connections.items()]
        for listener in self._listeners:
            listener.start()

    def leave(self) -> None:
        """Tells the others that this process has come to its end, and well.

        It still listens: at its very end JAX waits for them.
        """
        _tell(self._connections.values(), WELL)

    def wait_until_ended(self, within: float = ENDED_WITHIN) -> None:
        """Waits until the processes that it has connections to have ended, at most so many seconds.

        To be asked after they have told that they come to their end: until then they are listened
        to.
        """
        until = time.monotonic() + within
        for listener in self._listeners:
            listener.join(max(until - time.monotonic(), 0))
        for connection in self._connections.values():
            with suppress(OSError):  # of a time out, too
                connection.settimeout(max(until - time.monotonic(), 0.01))
                while connection.recv(1024):  # nothing comes any more but the end
                    pass

    def abandon(self) -> None:
        """Tells the others that they cannot go on without it, and waits until they have ended."""
        self._over = True
        said = f"{self._name(self._process)} has ended early, and says itself why."
        _tell(self._connections.values(), said)
        until = time.monotonic() + 2 * GRACE
        for listener in self._listeners:
            listener.join(max(until - time.monotonic(), 0))

    def end_if_lost(self, within: float = GRACE) -> None:
        """Ends this process if another one is lost, or is found to be within so many seconds."""
        if self._heard.wait(within):
            self._end()

    def _listen(self, number: int, connection: socket.socket) -> None:
        said = _hear(connection)
        if not said:
            # With the first process JAX's own service is gone, and ends this one in no time.
            grace = GRACE if number else 0.0
            self._lose(number, f"{self._name(number)} no longer answers.", grace)
        elif said != WELL:
            self._lose(number, said, GRACE)

    def _lose(self, number: int, said: str, grace: float) -> None:
        """What is heard from one is passed on to the others."""
        with self._one_loses:
            if self._over or self._lost:
                return
            self._lost = said
        _tell((x for other, x in self._connections.items() if other != number), said)
        self._heard.set()
        time.sleep(grace)
        if not self._over:
            self._end()

    def _end(self) -> NoReturn:
        with self._one_ends:  # and only one of two threads speaks
            advice = ""
            with suppress(Exception):
                sys.stdout.flush()
                advice = self.advice()
            with suppress(OSError):
                os.write(2, f"{self._lost} {advice}".rstrip().encode() + b"\n")
            os._exit(LOST)

    def _name(self, number: int) -> str:
        return f"Process {number} of {self._processes} (counted from 0)"


def meet(address: str, process: int, processes: int, *, timeout: float) -> Peers:
    """Waits until all processes have come to host:port, which is free again afterwards.

    Raises:
        RuntimeError: if they do not come in time, or say different things of themselves.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise RuntimeError(f"A coordinator is host:port, got {address!r}.")
    if processes == 1:
        return Peers(process, processes, {})
    if process == 0:
        return Peers(process, processes, _welcome(int(port), processes, timeout))
    first = _come((host.strip("[]"), int(port)), process, processes, timeout)
    return Peers(process, processes, {0: first})


def _welcome(port: int, processes: int, timeout: float) -> dict[int, socket.socket]:
    """The connections of all others, by their numbers, once the last has come."""
    until, told = time.monotonic() + timeout, []
    came: dict[int, socket.socket] = {}
    try:
        with _server(port) as server:
            while len(came) < processes - 1:
                server.settimeout(max(until - time.monotonic(), 0.01))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    raise RuntimeError(_missing(came, processes, timeout)) from None
                if (hello := _hear_hello(connection)) is None:
                    connection.close()
                    continue
                told.append(connection)
                _check(hello, came, processes)
                came[hello["process"]] = connection
    except RuntimeError as error:
        _tell(told, str(error))
        for connection in told:
            connection.close()
        raise
    _tell(told, COME)
    return came


def _server(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except (OSError, OverflowError) as error:
        raise RuntimeError(
            f"Process 0 cannot have the coordinator's port {port} ({error}); give another one."
        ) from error


def _come(address: tuple[str, int], process: int, processes: int, timeout: float) -> socket.socket:
    """The connection to the first process, once the last has come."""
    connection = _connection(address, time.monotonic() + timeout)
    connection.settimeout(timeout + HELLO_WITHIN)  # the first one gives up sooner, and says why
    _tell([connection], json.dumps({"process": process, "processes": processes}))
    said = _hear(connection)
    if said != COME:
        connection.close()
        stranger = f"{_spell(address)} is not process 0 of a run that waits for this one."
        raise RuntimeError(said if said.endswith(".") else stranger)
    connection.settimeout(None)
    return connection


def _connection(address: tuple[str, int], until: float) -> socket.socket:
    while True:
        try:
            connection = socket.create_connection(address, timeout=HELLO_WITHIN)
            # The kernel may connect a free port to itself.
            if connection.getsockname() != connection.getpeername():
                return connection
            connection.close()
        except (OSError, OverflowError) as error:  # it has not begun, or its name is not known yet
            if time.monotonic() > until:
                raise RuntimeError(
                    f"Process 0 does not answer at {_spell(address)} ({error})."
                ) from error
        time.sleep(0.2)


def _spell(address: tuple[str, int]) -> str:
    return ":".join(map(str, address))


def _hear_hello(connection: socket.socket) -> dict[str, Any] | None:
    """Who has come; None if it is nobody of ours."""
    connection.settimeout(HELLO_WITHIN)
    try:
        hello = json.loads(_hear(connection))
        hello = {name: int(hello[name]) for name in ("process", "processes")}
    except (ValueError, TypeError, KeyError):
        return None
    connection.settimeout(None)
    return hello


def _check(hello: Mapping[str, int], came: Mapping[int, Any], processes: int) -> None:
    """Whether who has come says the same as the first process, and has a number of its own."""
    process, said = hello["process"], hello["processes"]
    if said != processes:
        raise RuntimeError(
            f"Process {process} was told that there are {said} processes, and process 0 that there "
            f"are {processes}: give all of them the same number."
        )
    if process in came or not 0 < process < processes:
        raise RuntimeError(
            f"Two processes were told that they are process {process}, counted from 0."
        )


def _missing(came: Mapping[int, Any], processes: int, timeout: float) -> str:
    numbers = [str(number) for number in range(1, processes) if number not in came]
    named = f"{', '.join(numbers[:8])}{', …' if numbers[8:] else ''}"
    return (
        f"Of {processes} processes {len(came) + 1} have come within {timeout:.0f} s; missing: "
        f"{named} (counted from 0). Start as many as were said, or say as many as there are."
    )


def _keep_alive(connection: socket.socket) -> None:
    """The kernels ask one another now and then; a host that is gone for 20 s is lost."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _tell(connections: Iterable[socket.socket], text: str) -> None:
    for connection in connections:
        with suppress(OSError):  # it says so itself, to whoever listens
            connection.sendall(text.encode() + b"\n")


def _hear(connection: socket.socket, most: int = 1000) -> str:
    """The next line; "" if there is none, whatever the reason."""
    line = b""
    with suppress(OSError):
        while not line.endswith(b"\n") and len(line) < most and (part := connection.recv(1)):
            line += part
    return line.decode(errors="replace").rstrip() if line.endswith(b"\n") else ""
