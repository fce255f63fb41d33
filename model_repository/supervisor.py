"""Keeps a server alive: notices when it, or the process of one of its models, has died, and starts it again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from model_repository.client import Client
from model_repository.server import Stub, TritonServer
from runtime.errors import ServiceError

LOOK_SECONDS = 0.5
PING_EVERY_SECONDS = 10.0
PING_SECONDS = 20.0
REMOVAL_SECONDS = 2.0
"""The shared memory of a process that ended in order is removed within so many seconds."""
MAX_RESTARTS = 5
RESTARTS_SECONDS = 300.0
"""More restarts within so many seconds are given up: a restart does not cure what is wrong."""


class Supervisor:
    """Watches one server.

    Triton calls itself ready when the process of a model is dead, and never answers that process's requests, even when
    the model is loaded again. So the whole server is restarted, and the requests in flight fail at once.

    Example:
        >>> Supervisor(server, print).run()
    """

    def __init__(self, server: TritonServer, report: Callable[[str], None]) -> None:
        """Begins to watch a server that is ready.

        Args:
            report: called with one line for each restart.
        """
        self._server = server
        self._report = report
        self._client = Client(server.grpc_url, retries=0, token="", own=True)
        self._restarts: deque[float] = deque(maxlen=MAX_RESTARTS + 1)
        self._stubs: set[Stub] = set()
        self._ended: dict[Stub, float] = {}
        """Processes whose shared memory is still there, and when they were missed."""
        self._models: set[str] = set()
        self._pinged = 0.0
        self._remember()

    def run(self) -> None:
        """Watches until an exception, for example `KeyboardInterrupt`, ends it.

        Raises:
            ServiceError: the server dies again and again, or does not start again.
        """
        while True:
            time.sleep(LOOK_SECONDS)
            self.look()

    def look(self) -> bool:
        """Starts the server again if something is wrong with it; returns whether it did.

        Raises:
            ServiceError: as `run`.
        """
        if (fault := self.fault()) is None:
            return False
        self._restart(fault)
        return True

    def fault(self) -> str | None:
        """Returns what is wrong with the server, or None."""
        if (code := self._server.process.poll()) is not None:
            return f"the Triton server ended with code {code}"
        if (fault := self._fault_of_stubs()) is not None:
            return fault
        if time.monotonic() - self._pinged > PING_EVERY_SECONDS:
            self._pinged = time.monotonic()
            if not self._client.answers(PING_SECONDS):
                return f"the model did not answer within {PING_SECONDS:g} s"
        return None

    def _fault_of_stubs(self) -> str | None:
        before, self._stubs = self._stubs, self._server.stubs()
        ended = before - self._stubs
        for stub in ended:
            self._ended[stub] = time.monotonic()
        if ended:
            # A process that ended may have belonged to a model that was replaced or unloaded.
            for model in self._models - {stub.model for stub in self._stubs}:
                if self._server.control.is_ready(model):
                    return f"the process of the model {model} ended"
        for stub, moment in list(self._ended.items()):
            if not stub.region.exists():
                del self._ended[stub]
            elif time.monotonic() - moment > REMOVAL_SECONDS:
                # Triton finishes what the other process of the model does, and never answers what this one did.
                return f"a process of the model {stub.model} ended with requests in flight while it was replaced"
        return None

    def _restart(self, fault: str) -> None:
        while True:
            self._restarts.append(time.monotonic())
            if len(self._restarts) > MAX_RESTARTS and self._restarts[-1] - self._restarts[0] < RESTARTS_SECONDS:
                raise ServiceError(f"{fault}; given up after {MAX_RESTARTS} restarts in {RESTARTS_SECONDS:g} s")
            self._report(f"{fault}; starting the server again")
            self._server.restart()
            try:
                self._server.wait_until_ready()
            except ServiceError as error:  # clients that do not wait for it can end a server that starts
                fault = str(error)
            else:
                self._remember()
                return

    def _remember(self) -> None:
        self._stubs = self._server.stubs()
        self._models = {stub.model for stub in self._stubs}
        self._ended.clear()
        self._pinged = time.monotonic()
