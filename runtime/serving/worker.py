"""Threads of a service: the one that ticks, and what happens when a thread ends that should not."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from runtime.errors import ServiceError, one_line
from runtime.serving.scheduler import Scheduler

IDLE_SECONDS = 0.05
"""Longest wait for work between two heartbeats."""
OnDeath = Callable[[BaseException], None]
"""Called in a thread that ends by an error. What it does must be visible from outside: a service ends its process."""
_LOG = logging.getLogger("latte_flow")


def start_thread(name: str, work: Callable[[], None], on_death: OnDeath) -> threading.Thread:
    """Starts a thread that never ends silently: an exception is logged and passed to `on_death`."""

    def run() -> None:
        try:
            work()
        except BaseException as error:
            _LOG.critical("the thread %s ended: %s", name, one_line(error), exc_info=error)
            on_death(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


class Worker:
    """A thread that calls `tick` while there is work.

    If it ends by an error, all requests fail, and so does every new one.
    """

    def __init__(self, scheduler: Scheduler, on_death: OnDeath = lambda error: None) -> None:
        self._scheduler = scheduler
        self._on_death = on_death
        self._stop = threading.Event()
        self._beat = time.monotonic()
        self._thread = start_thread("latte-flow-scheduler", self._work, self._die)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def seconds_since_heartbeat(self) -> float:
        """How long the present tick has taken; near zero while there is no work."""
        return time.monotonic() - self._beat

    def check(self) -> None:
        """Raises `ServiceError` if the thread has ended, or does not come back from an engine."""
        if not self.is_alive:
            raise ServiceError("the service broke down and must be started again")
        if (seconds := self.seconds_since_heartbeat) > self._scheduler.limits.max_tick_seconds:
            raise ServiceError(f"an engine has been running for {seconds:.0f} s; the service must be started again")

    def _work(self) -> None:
        while not self._stop.is_set():
            self._beat = time.monotonic()
            if self._scheduler.wait_for_work(IDLE_SECONDS) and not self._scheduler.tick():
                self._scheduler.wait_for_change(IDLE_SECONDS)  # questions are being read

    def _die(self, error: BaseException) -> None:
        try:
            self._scheduler.abort(ServiceError(f"the service broke down and must be started again: {one_line(error)}"))
        except Exception as failure:
            _LOG.error("the requests could not be told: %s", one_line(failure), exc_info=failure)
        self._on_death(error)

    def drain(self, timeout: float) -> bool:
        """Refuses new requests and waits until those in the scheduler were told their end.

        Returns:
            Whether all were told in time.
        """
        self._scheduler.drain()
        return self._scheduler.wait_until_empty(timeout)

    def close(self) -> None:
        """Stops after the current tick."""
        self._stop.set()
        self._thread.join()
        self._scheduler.close()
