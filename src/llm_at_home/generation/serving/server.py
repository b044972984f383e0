"""Runs the endpoint until SIGINT or SIGTERM, which break off the answers that are under way."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import uvicorn

from llm_at_home.generation.serving.api import Service, application

GRACE_S = 5  # for a step that is under way, and for who is told that the server ends


class Server(uvicorn.Server):
    """The endpoint of a service.

    Args:
        service: what is served.
        host: address to listen at.
        port: the same; 0 is any that is free.
        on_ready: called as soon as it can be asked.
    """

    def __init__(self, service: Service, host: str, port: int, on_ready: Callable[[], None] | None = None) -> None:
        settings = uvicorn.Config(
            application(service),
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE_S,
        )
        super().__init__(settings)
        self.service, self.on_ready = service, on_ready

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until Ctrl-C; SIGTERM ends the process as well, afterwards."""
        with contextlib.suppress(KeyboardInterrupt):
            super().run(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().startup(sockets)
        if self.started and self.on_ready is not None:
            self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which would otherwise wait for the answers that are under way and for those that wait."""
        self.service.scheduler.close()
        await super().shutdown(sockets)
