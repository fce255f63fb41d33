"""The gateway on uvicorn: drains when it is asked to end."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType

import uvicorn

from runtime.gateway.app import Gateway
from runtime.gateway.door import Door

KEEP_ALIVE_SECONDS = 65
"""Longer than the 60 s after which proxies give a connection up, so that none is closed while it is used."""

POLL_SECONDS = 0.05


class GatewayServer(uvicorn.Server):
    """Refuses new requests as soon as it is asked to end, and finishes those in flight."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, door: Door) -> None:
        super().__init__(config)
        self._gateway, self._door = gateway, door

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain; a second signal ends the process without waiting."""
        self._gateway.draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for requests to the API, while new ones are told to ask elsewhere; whoever looks at a page is left."""
        self._door.leaving.set()
        clock = asyncio.get_running_loop().time
        most = self.config.timeout_graceful_shutdown or 0
        end = clock() + most
        while self.server_state.tasks and not self.force_exit and clock() < end:
            await asyncio.sleep(POLL_SECONDS)
        self.config.timeout_graceful_shutdown = max(1, round(end - clock()))
        await super().shutdown(sockets)


def make_server(app: Door, gateway: Gateway, drain_seconds: int) -> GatewayServer:
    """Returns a server that is not started.

    Args:
        drain_seconds: how long requests in flight may take when the server is asked to end.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain_seconds,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    return GatewayServer(config, gateway, app)
