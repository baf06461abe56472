"""The benchmark's load generator: what it counts, against servers whose behaviour is known."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from benchmarks.serve_load import closed_loop, open_loop, post, session_cpu_s

REQUEST = post("/", b"x" * 300_000)
REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Behaviour = Callable[[socket.socket], None]


def read_request(connection: socket.socket) -> bool:
    """Whether a whole request came before the other side closed."""
    left = len(REQUEST)
    while left > 0:
        data = connection.recv(65536)
        if not data:
            return False
        left -= len(data)
    return True


@contextmanager
def server(behaviour: Behaviour) -> Iterator[int]:
    """The port of a server that hands each connection to `behaviour`, one after another."""
    stopped = threading.Event()

    def run() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                if stopped.is_set():
                    return
                behaviour(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield port
        finally:
            stopped.set()
            socket.create_connection(("127.0.0.1", port)).close()
            thread.join(30)
            assert not thread.is_alive()


def test_a_closed_loop_has_one_request_under_way_and_counts_each() -> None:
    served = itertools.count()

    def keep_answering(connection: socket.socket) -> None:
        while read_request(connection):
            next(served)
            for part in (REPLY[:20], REPLY[20:]):
                connection.sendall(part)

    with server(keep_answering) as port:
        run = closed_loop(port, [REQUEST], itertools.repeat(0), clients=1, seconds=0.2)
    assert {answer.status for answer in run.answers} == {200} and run.answers[0].body == b"ok"
    assert len(run.answers) == next(served)
    assert sum(answer.seconds for answer in run.answers) <= run.elapsed_s
    assert 0 < run.client_cpu_s <= run.elapsed_s * 2


def test_an_open_loop_times_from_when_a_request_was_due() -> None:
    def answer_late(connection: socket.socket) -> None:
        assert read_request(connection)
        time.sleep(0.1)
        connection.sendall(REPLY.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))

    with server(answer_late) as port:
        run = open_loop(port, [REQUEST], itertools.repeat(0), due_s=[0.0, 0.0, 0.05])
    waited = sorted(answer.seconds for answer in run.answers)
    assert [answer.status for answer in run.answers] == [200] * 3
    for seconds, least in zip(waited, (0.1, 0.2, 0.25), strict=True):
        assert seconds >= least
    assert len(run.lateness_s) == 3


def test_a_kept_connection_that_was_closed_is_replaced() -> None:
    def answer_once(connection: socket.socket) -> None:
        if read_request(connection):
            connection.sendall(REPLY)

    with server(answer_once) as port:
        run = closed_loop(port, [REQUEST], itertools.repeat(0), clients=1, seconds=0.1)
    assert len(run.answers) > 1 and {answer.status for answer in run.answers} == {200}


def test_silence_and_refused_connections_are_answers_of_status_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.serve_load.ANSWER_S", 0.1)

    def say_nothing(connection: socket.socket) -> None:
        while connection.recv(65536):
            pass

    with server(say_nothing) as port:
        silent = closed_loop(port, [REQUEST], itertools.repeat(0), clients=1, seconds=0)
    refused = closed_loop(port, [REQUEST], itertools.repeat(0), clients=1, seconds=0)
    assert [answer.status for answer in (*silent.answers, *refused.answers)] == [0, 0]


BUSY = """
import sys, time
while time.process_time() < 0.3: pass
print("done", flush=True)
sys.stdin.read()
"""


def test_processor_time_of_a_session_is_that_of_its_processes() -> None:
    """Of a session of its own: in this one, processes of other tests end, and take their time with them."""
    with subprocess.Popen(
        [sys.executable, "-c", BUSY],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    ) as leader:  # fmt: skip
        assert leader.stdout is not None and leader.stdout.readline() == b"done\n"
        assert 0.25 <= session_cpu_s(leader.pid) < 5
