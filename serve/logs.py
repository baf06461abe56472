"""Log lines as JSON objects. They say what happened to a request and never what it held."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """One object a line. An exception is shown by type and place: its message could quote a request."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _OWN}
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            frames = traceback.extract_tb(record.exc_info[2])[-8:]
            line["at"] = [
                f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames
            ]
        return json.dumps(line, default=str)


def configure_logging(level: str) -> None:
    """Send our lines, the web server's and Python's warnings to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("serve", "uvicorn", "uvicorn.error", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.propagate = name == "uvicorn.error"
        logger.setLevel(level.upper() if name == "serve" else "WARNING")
    root = logging.getLogger()
    if not root.handlers:  # what libraries say goes the same way
        root.addHandler(handler)
        root.setLevel("WARNING")
    logging.getLogger("uvicorn.access").disabled = True
    # It warns of each upload that it cannot read, with a byte of it.
    logging.getLogger("python_multipart").setLevel("ERROR")
    logging.captureWarnings(True)
