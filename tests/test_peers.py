"""Processes that meet, and one that is lost: here they are threads, and none of them ends."""

import os
import queue
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest

from fjax import _peers
from fjax._peers import LOST, meet
from fjax.hosts import LastToGo


def free_port():
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return there.getsockname()[1]


def all_meet(*told, timeout=20.0):
    """Peers, or what was said, for each (number, how many there are)."""
    address = f"127.0.0.1:{free_port()}"

    def one(process, processes):
        try:
            return meet(address, process, processes, timeout=timeout)
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(len(told)) as pool:
        return [*pool.map(lambda given: one(*given), told)]


def part(*peers):
    """Once nothing more is to be heard."""
    for each in peers:
        each._over = True
    for each in peers:
        for connection in each._connections.values():
            with suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
    for each in peers:
        for listener in each._listeners:
            listener.join(10)


# pytest hears of every thread that is ended by an exception.
quietly = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def ends(monkeypatch):
    """Statuses of the processes that would have ended."""
    found = queue.Queue()

    def end(status):
        found.put(status)
        raise SystemExit  # of its thread

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(_peers, "GRACE", 0.05)
    return found


@quietly
def test_one_that_is_lost_ends_all_others_and_is_named(ends, capfd):
    first, second, third = all_meet((0, 3), (1, 3), (2, 3))
    second.advice = lambda: "Begin again."
    part(third)
    assert [ends.get(timeout=10), ends.get(timeout=10)] == [LOST, LOST]
    lines = sorted(capfd.readouterr().err.splitlines())
    said = "Process 2 of 3 (counted from 0) no longer answers."
    assert lines == [said, f"{said} Begin again."]
    part(first, second)


@quietly
def test_one_that_gives_up_says_so(ends, capfd):
    first, second = all_meet((0, 2), (1, 2))
    first.abandon()
    assert ends.get_nowait() == LOST  # it has waited for that
    part(first, second)
    assert "Process 0 of 2 (counted from 0) has ended early" in capfd.readouterr().err


def test_nobody_is_missed_who_took_leave(ends):
    """Nor are those missed who have not yet."""
    first, second, third = all_meet((0, 3), (1, 3), (2, 3))
    second.leave()
    third.leave()
    for each in (first, second, third):
        each.end_if_lost(within=0.1)
    part(second)  # it ends
    first.end_if_lost(within=0.3)
    part(first, third)
    assert ends.empty()


def test_the_first_keeps_the_service_until_the_others_have_ended(ends):
    """And not for ever."""
    first, second, third = all_meet((0, 3), (1, 3), (2, 3))
    for peers in (first, second, third):
        peers.leave()
    gone = []
    service = LastToGo(SimpleNamespace(shutdown=lambda: gone.append(True)), first)
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(service.shutdown)
        for peers in (second, third):
            time.sleep(0.2)
            assert not gone
            peers._connections[0].shutdown(socket.SHUT_RDWR)  # as the kernel does with the process
        end.result(5)
    assert gone == [True]
    part(first, second, third)
    assert ends.empty()


def test_one_that_does_not_end_is_not_waited_for_long(ends):
    first, second = all_meet((0, 2), (1, 2))
    for peers in (first, second):
        peers.leave()
    began = time.monotonic()
    first.wait_until_ended(0.3)
    assert 0.2 < time.monotonic() - began < 5
    part(first, second)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (
            [(0, 2), (1, 3)],
            "Process 1 was told that there are 3 processes, and process 0 that there are 2",
        ),
        ([(0, 3), (1, 3), (1, 3)], "Two processes were told that they are process 1"),
        ([(0, 3), (1, 3)], r"Of 3 processes 2 have come within 1 s; missing: 2 \(counted from 0\)"),
    ],
)
def test_whoever_was_told_something_else_is_told_so(told, said):
    for each in all_meet(*told, timeout=1.0):
        assert re.search(said, each)


def test_a_stranger_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(_peers, "HELLO_WITHIN", 0.1)
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, f"127.0.0.1:{port}", 0, 2, timeout=20.0)
        strangers = [
            _peers._connection(("127.0.0.1", port), time.monotonic() + 10) for _ in range(2)
        ]
        strangers[0].sendall(b"GET / HTTP/1.1\n")
        second = pool.submit(meet, f"127.0.0.1:{port}", 1, 2, timeout=20.0)
        first, second = first.result(), second.result()
    assert [*first._connections] == [1]
    assert [*second._connections] == [0]
    # the port is free for JAX while they are connected
    with _peers._server(port):
        pass
    part(first, second)
    for stranger in strangers:
        stranger.close()


def test_what_is_no_first_process_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(meet, f"127.0.0.1:{port}", 1, 2, timeout=1.0)
            other.accept()[0].close()
            with pytest.raises(RuntimeError, match=f"{port} is not process 0 of a run"):
                found.result()
        with pytest.raises(RuntimeError, match=f"cannot have the coordinator's port {port}"):
            meet(f"127.0.0.1:{port}", 0, 2, timeout=1.0)
    with pytest.raises(RuntimeError, match="Process 0 does not answer at 127"):
        meet(f"127.0.0.1:{free_port()}", 1, 2, timeout=0.1)
    with pytest.raises(RuntimeError, match="host:port, got 'here'"):
        meet("here", 0, 2, timeout=1.0)
