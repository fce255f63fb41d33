"""Several GPUs in one service: each has all engines and a scheduler of its own, and a request goes to one of them.

Images of a request stay together. Limits and quotas are those of each replica.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Self

from runtime.errors import QueueFullError
from runtime.serving.requests import AnyRequest, Handle, Limits, Listener
from runtime.serving.service import LocalService, ServedModel


class ReplicatedService:
    """A service over services of the same bundle, which it owns."""

    def __init__(self, replicas: Sequence[LocalService]) -> None:
        self.replicas = tuple(replicas)

    @property
    def model(self) -> ServedModel:
        return self.replicas[0].model

    @property
    def limits(self) -> Limits:
        return self.replicas[0].limits

    def submit(self, request: AnyRequest, listener: Listener) -> Handle:
        """Queues a request where the fewest images and answers wait, or where there is room; see `Service.submit`."""
        *others, last = sorted(self.replicas, key=_work)
        for replica in others:
            try:
                return replica.submit(request, listener)
            except QueueFullError:
                continue
        return last.submit(request, listener)

    def check(self) -> None:
        """Raises `ServiceError` unless every replica works."""
        for replica in self.replicas:
            replica.check()

    def drain(self, timeout: float) -> bool:
        """Refuses new requests and waits for those in flight; returns whether all ended in time."""
        end = time.monotonic() + timeout
        for replica in self.replicas:
            replica.scheduler.drain()
        return all(replica.drain(max(0.0, end - time.monotonic())) for replica in self.replicas)

    def close(self) -> None:
        """Stops all replicas and frees their engines."""
        for replica in self.replicas:
            replica.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _work(replica: LocalService) -> int:
    return replica.scheduler.pending + replica.scheduler.pending_questions
