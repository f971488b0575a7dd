"""uvicorn that finishes what it has begun before it stops.

uvicorn alone closes its door at SIGTERM, so that new clients see a refused connection; and it ends by the signal, not
with status 0. Here the first signal stops admission (new requests get 503, /ready turns 503), requests in hand go on
for at most the drain's time, and only then does uvicorn shut down. A second signal cuts what is still in hand.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from types import FrameType
from typing import Final

import uvicorn

from chatterbox_vllm.api.admission import Admission

logger = logging.getLogger(__name__)
ECHO: Final = 1.0
"""Seconds after the first signal in which others are the same one: supervisors pass on what the terminal sent, too."""


class DrainingServer(uvicorn.Server):
    """A ``uvicorn.Server`` that drains ``admission`` for at most ``drain_timeout`` seconds when told to end."""

    def __init__(self, config: uvicorn.Config, admission: Admission, drain_timeout: float) -> None:
        super().__init__(config)
        self._admission = admission
        self._drain_timeout = drain_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._told = 0.0
        self._hurry = asyncio.Event()

    async def _serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super()._serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None:
            self.force_exit = self.should_exit = True
        elif not self._admission.draining:
            self._told = time.monotonic()
            self._admission.drain()
            self._loop.call_soon_threadsafe(self._begin)
        elif time.monotonic() - self._told > ECHO:
            self._loop.call_soon_threadsafe(self._hurry.set)

    def stop(self) -> None:
        """Ends the server without waiting for requests."""
        self.should_exit = True

    def _begin(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        logger.info("shutting down; %d requests in hand get %g s", self._admission.active, self._drain_timeout)
        waits = [
            asyncio.create_task(self._admission.idle(self._drain_timeout)),
            asyncio.create_task(self._hurry.wait()),
        ]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._admission.active:
            logger.warning("cutting %d requests", self._admission.active)
            for task in self.server_state.tasks:
                task.cancel()
        self.should_exit = True
