"""What the gateway keeps for a while: images that were asked for by URL, and answers that may be given again."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

MAX_BYTES = 256 << 20
EXPIRY_SECONDS = 3600.0
T = TypeVar("T")


@dataclass(frozen=True)
class _Entry(Generic[T]):
    value: T
    size: int
    expires: float


class BoundedStore(Generic[T]):
    """Values by key, for a time and up to a number of bytes; the oldest go first. For one thread.

    Args:
        clock: seconds, from any start.
    """

    def __init__(
        self,
        max_bytes: int = MAX_BYTES,
        seconds: float = EXPIRY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes, self._seconds, self._clock = max_bytes, seconds, clock
        self._entries: OrderedDict[str, _Entry[T]] = OrderedDict()
        self._bytes = 0

    def put(self, key: str, value: T, size: int) -> None:
        """Keeps a value of so many bytes; one that is larger than the store is not kept."""
        self._drop(key)
        if size > self._max_bytes:
            return
        self._entries[key] = _Entry(value, size, self._clock() + self._seconds)
        self._bytes += size
        for old in list(self._entries):
            if self._bytes <= self._max_bytes and self._entries[old].expires > self._clock():
                break
            self._drop(old)

    def get(self, key: str) -> T | None:
        """Returns a value, or None if it is not there any more."""
        entry = self._entries.get(key)
        if entry is not None and entry.expires <= self._clock():
            self._drop(key)
            return None
        return None if entry is None else entry.value

    @property
    def bytes(self) -> int:
        """Size of all values."""
        return self._bytes

    def _drop(self, key: str) -> None:
        if (entry := self._entries.pop(key, None)) is not None:
            self._bytes -= entry.size


def new_name() -> str:
    """Returns a name that nobody can guess."""
    return secrets.token_urlsafe(24)


def key_of(*parts: object) -> str:
    """Returns the key of a request: a hash of all that its answer depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
