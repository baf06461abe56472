"""Which threads go first on busy cores."""

from __future__ import annotations

import os
import sys
import threading

NICENESS = 2
"""One step is about a quarter more processor time for the other. Not more than it takes: a thread that holds
the interpreter and gets no core, because other programs want it, holds up the event loop as well."""


def give_way() -> None:
    """Let the event loop go before the calling thread, which computes, wherever cores are short.

    Five computing threads on two cores would leave the loop a fifth of them. Requests then wait unread, where
    no limit and no deadline sees them. On Linux niceness belongs to a thread; elsewhere nothing is done.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
