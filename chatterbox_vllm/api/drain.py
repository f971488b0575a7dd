"""uvicorn that finishes what it has begun before it stops.

uvicorn alone closes its door at SIGTERM, so that new clients see a refused connection; and it ends by the signal, not
with status 0. Here the first signal stops admission (new requests get 503, /ready turns 503), requests in hand go on
for at most the drain's time, and only then does uvicorn shut down. A second signal ends everything at once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType

import uvicorn

from chatterbox_vllm.api.admission import Admission

logger = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """A ``uvicorn.Server`` that drains ``admission`` for at most ``drain_timeout`` seconds when told to end."""

    def __init__(self, config: uvicorn.Config, admission: Admission, drain_timeout: float) -> None:
        super().__init__(config)
        self._admission = admission
        self._drain_timeout = drain_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def _serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super()._serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self._admission.draining:
            self.force_exit = self.should_exit = True
            return
        self._admission.drain()
        self._loop.call_soon_threadsafe(self._begin)

    def stop(self) -> None:
        """Ends the server without waiting for requests."""
        self.should_exit = True

    def _begin(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        logger.info("shutting down; %d requests in hand get %g s", self._admission.active, self._drain_timeout)
        if not await self._admission.idle(self._drain_timeout):
            logger.warning("cutting %d requests", self._admission.active)
            for task in self.server_state.tasks:
                task.cancel()
        self.should_exit = True
