"""How many requests are in hand, how many may be, and whether new ones are taken at all."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from chatterbox_vllm.errors import EngineDead, Overloaded


class Admission:
    """Counts requests in hand. Belongs to one event loop.

    Args:
        limit: requests in hand at which further ones are refused. The engine batches what is in hand itself, so
            there is no second queue here.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.active = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Holds one place, from before a request's body is read until its answer is sent.

        Raises:
            EngineDead: the server is shutting down.
            Overloaded: ``limit`` requests are in hand.
        """
        if self.draining:
            raise EngineDead("this server is shutting down")
        if self.active >= self.limit:
            raise Overloaded(f"this server already has {self.active} requests in hand; try again shortly")
        self.active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.active -= 1
            if not self.active:
                self._idle.set()

    def drain(self) -> None:
        """From now on no request is admitted; those in hand go on."""
        self.draining = True

    async def idle(self, seconds: float) -> bool:
        """Waits until no request is in hand, at most ``seconds``; whether it came to that."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
