"""The sockets that the server listens on, bound before anything heavy is imported: a taken port shows at
once."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

from clipstack.errors import ConfigError

BACKLOG = 2048
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # a name may have addresses that this host lacks
_EVERY_INTERFACE = ("", "0.0.0.0", "::")


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets on every address of `host`. Raises ConfigError where there is none, or one is taken."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((entry[0], entry[4]) for entry in found):
            try:
                sockets.append(socket.create_server((str(address[0]), port), family=family, backlog=BACKLOG))
            except OSError as error:
                if error.errno not in _NO_SUCH_ADDRESS or (not sockets and len(found) == 1):
                    raise
    except OSError as error:
        for listener in sockets:
            listener.close()
        reason = error.strerror or "no such address"
        raise ConfigError(
            f"host = {host!r}, port = {port}: cannot listen there ({reason}); choose another --host or --port"
        ) from error
    return sockets


def url_of(host: str, sockets: Sequence[socket.socket]) -> str:
    """Where a browser on this machine finds what listens there."""
    port = sockets[0].getsockname()[1]
    shown = "127.0.0.1" if host in _EVERY_INTERFACE else host
    return f"http://[{shown}]:{port}/" if ":" in shown else f"http://{shown}:{port}/"
