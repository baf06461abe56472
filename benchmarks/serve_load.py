"""A lean load generator: prepared HTTP requests over kept connections, in one epoll loop.

It shares the cores with the server that it measures, so it does nothing while the clock runs that can wait:
of a reply it reads the status and the length, and keeps the rest to be judged afterwards.
"""

from __future__ import annotations

import os
import re
import select
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ANSWER_S = 20.0  # a server that is silent for so long does not answer any more
SEND_BUFFER_BYTES = 1 << 20  # room for a whole request, so that one call sends it (the system may allow less)
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request. status 0: the connection broke, or nothing came for ANSWER_S."""

    request: int  # its index among the prepared ones
    status: int
    seconds: float  # from when it was sent, or was due to be sent
    ended_at: float  # on the clock of time.perf_counter
    reply: bytes  # head and body

    @property
    def body(self) -> bytes:
        return self.reply.partition(b"\r\n\r\n")[2]

    def header(self, name: str) -> str | None:
        """The value of a header of the reply, or None."""
        for line in self.reply.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]:
            key, _, value = line.partition(":")
            if key.lower() == name:
                return value.strip()
        return None


@dataclass
class Run:
    """All answers of a load, how long it took, and what the generator itself cost."""

    answers: list[Answer] = field(default_factory=list)
    lateness_s: list[float] = field(default_factory=list)  # open loop: from when each was due to when it left
    started_at: float = 0.0
    elapsed_s: float = 0.0
    client_cpu_s: float = 0.0  # processor time of this process


def post(path: str, body: bytes, **headers: str) -> bytes:
    """The bytes of a JSON request. headers: names with underscores for dashes."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def closed_loop(
    port: int, requests: Sequence[bytes], picks: Iterator[int], *, clients: int, seconds: float
) -> Run:
    """`clients` with one request under way each, for `seconds`. picks: indices into `requests`."""
    with _Meter() as run, _Wire(port, requests) as wire:
        until = time.perf_counter() + seconds
        for _ in range(clients):
            wire.send(next(picks), since=time.perf_counter())
        while wire.outstanding:
            for answer in wire.wait(1.0):
                run.answers.append(answer)
                now = time.perf_counter()
                if now < until:
                    wire.send(next(picks), since=now)
    return run


def open_loop(port: int, requests: Sequence[bytes], picks: Iterator[int], *, due_s: Iterable[float]) -> Run:
    """A request at each of the times `due_s` (ascending, from now), whatever has come back by then.

    Answers are timed from when their request was due, so that a server which stalls cannot hide it.
    """
    with _Meter() as run, _Wire(port, requests) as wire:
        for offset_s in due_s:
            due = run.started_at + offset_s
            while (left_s := due - time.perf_counter()) > 0:
                run.answers += wire.wait(left_s)
            run.lateness_s.append(-left_s)
            wire.send(next(picks), since=due)
        while wire.outstanding:
            run.answers += wire.wait(1.0)
    return run


class _Meter:
    """Gives a Run whose elapsed and processor times are those of the block."""

    def __enter__(self) -> Run:
        self._cpu_started = time.process_time()
        self._run = Run(started_at=time.perf_counter())
        return self._run

    def __exit__(self, *_: object) -> None:
        self._run.elapsed_s = time.perf_counter() - self._run.started_at
        self._run.client_cpu_s = time.process_time() - self._cpu_started


class _Connection:
    """A kept connection with at most one request under way."""

    __slots__ = ("is_reused", "length", "received", "request", "sent_at", "since", "socket", "unsent")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self.socket.setblocking(False)
        self.received = bytearray()
        self.unsent = memoryview(b"")
        self.length: int | None = None  # of the whole reply, once its head has come
        self.request, self.since, self.sent_at, self.is_reused = -1, 0.0, 0.0, False

    def begin(self, request: int, content: bytes, since: float) -> None:
        self.request, self.since, self.sent_at = request, since, time.perf_counter()
        self.unsent = memoryview(content)
        self.received.clear()
        self.length = None

    def push(self) -> None:
        """Send what the socket takes now. A peer that has closed is noticed when its silence is read."""
        try:
            self.unsent = self.unsent[self.socket.send(self.unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self.unsent = memoryview(b"")

    def pull(self) -> bool:
        """Read what has come; whether there may be more. False: the peer has closed."""
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.received += data
        if self.length is None and (end := self.received.find(b"\r\n\r\n")) >= 0:
            found = _LENGTH.search(self.received, 0, end + 2)
            assert found is not None, "the servers that are measured send Content-Length"
            self.length = end + 4 + int(found[1])
        return bool(data)

    @property
    def is_answered(self) -> bool:
        return self.length is not None and len(self.received) >= self.length

    def answer(self) -> Answer:
        status, now = int(self.received[9:12]) if self.is_answered else 0, time.perf_counter()
        return Answer(self.request, status, now - self.since, now, bytes(self.received))

    @property
    def may_be_kept(self) -> bool:
        return self.is_answered and _CLOSE.search(self.received, 0, self.received.find(b"\r\n\r\n")) is None


class _Wire:
    """Connections to one server: sends requests, gives answers."""

    def __init__(self, port: int, requests: Sequence[bytes]) -> None:
        self._port, self._requests = port, requests
        self._idle: list[_Connection] = []
        self._busy: dict[int, _Connection] = {}
        self._refused: list[Answer] = []
        self._epoll = select.epoll()
        self._checked_at = time.perf_counter()

    def __enter__(self) -> _Wire:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in (*self._idle, *self._busy.values()):
            connection.socket.close()
        self._epoll.close()

    @property
    def outstanding(self) -> int:
        return len(self._busy) + len(self._refused)

    def send(self, request: int, *, since: float) -> None:
        """Send a prepared request on an idle connection, or on a new one."""
        is_reused = bool(self._idle)
        try:
            connection = self._idle.pop() if is_reused else self._connect()
        except OSError:
            now = time.perf_counter()
            self._refused.append(Answer(request, 0, now - since, now, b""))
            return
        connection.is_reused = is_reused
        connection.begin(request, self._requests[request], since)
        self._busy[connection.socket.fileno()] = connection
        connection.push()
        if connection.unsent:
            self._epoll.modify(connection.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _connect(self) -> _Connection:
        connection = _Connection(self._port)
        self._epoll.register(connection.socket.fileno(), select.EPOLLIN)
        return connection

    def wait(self, timeout_s: float) -> list[Answer]:
        """Answers that have come, after at most `timeout_s`."""
        answers, self._refused = self._refused, []
        for number, event in self._epoll.poll(0 if answers else timeout_s):
            connection = self._busy.get(number)
            if connection is None:
                self._idle = [idle for idle in self._idle if not self._has_closed(idle, number)]
                continue
            if event & select.EPOLLOUT:
                connection.push()
                if not connection.unsent:
                    self._epoll.modify(number, select.EPOLLIN)
            if event & ~select.EPOLLOUT:
                answers += self._pull(connection)
        return answers + self._silent()

    def _has_closed(self, connection: _Connection, number: int) -> bool:
        """Whether this is the idle connection `number`, of which nothing but its end can be news."""
        if connection.socket.fileno() != number:
            return False
        connection.socket.close()
        return True

    def _pull(self, connection: _Connection) -> list[Answer]:
        """The answer of a connection, if it is whole. A kept connection that closes without a word idled too
        long; its request is sent again, as clients do.
        """
        is_open = connection.pull()
        if is_open and not connection.is_answered:
            return []
        del self._busy[connection.socket.fileno()]
        answer = connection.answer()
        if is_open and connection.may_be_kept:
            self._idle.append(connection)
            return [answer]
        connection.socket.close()
        if connection.is_reused and not connection.received:
            self.send(connection.request, since=connection.since)
            return []
        return [answer]

    def _silent(self) -> list[Answer]:
        """Requests that have waited for ANSWER_S: given up."""
        now = time.perf_counter()
        if now - self._checked_at < 1.0:
            return []
        self._checked_at = now
        late = [connection for connection in self._busy.values() if now - connection.sent_at > ANSWER_S]
        for connection in late:
            del self._busy[connection.socket.fileno()]
            connection.socket.close()
        return [connection.answer() for connection in late]


def session_cpu_s(leader: int) -> float:
    """Processor time of all living processes of a session (a server that was started as its leader)."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended since
        if int(fields[3]) == leader:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
