"""Signals that end a command which owns a server: all do what Ctrl-C does."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def ends_by_interrupt() -> Iterator[None]:
    """Lets SIGTERM, and the end of the terminal, do in the block what Ctrl-C does.

    A signal that is ignored stays ignored: `nohup` asks for that.
    """
    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_endings() -> None:
    """Ignores these signals until the block of `ends_by_interrupt` is left."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
