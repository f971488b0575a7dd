"""An event loop on a thread of its own: how code that is not asynchronous uses what is."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from threading import Lock, RLock, Thread
from typing import Any, TypeVar

from chatterbox_vllm.errors import EngineDead

T = TypeVar("T")
_LAST_SECONDS = 5.0


class LoopThread:
    """Runs coroutines for other threads; every method may be called from any of them."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._running: set[Future[Any]] = set()
        self._ended = False
        self._state = RLock()  # the garbage collector may end a stream, and so call run_soon, anywhere
        self._ending = Lock()
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for ``work``; an interrupt cancels it.

        Raises:
            EngineDead: the loop was ended, before or meanwhile.
        """
        future = self._scheduled(work)
        try:
            return future.result()
        except CancelledError:
            raise EngineDead("this model was shut down; build a new one") from None
        except BaseException:
            future.cancel()
            raise

    def run_soon(self, work: Coroutine[Any, Any, Any]) -> None:
        """Has ``work`` done without waiting, which the loop's own thread may ask for, too; nothing after the end."""
        with suppress(EngineDead):
            self._scheduled(work)

    def end(self, last: Coroutine[Any, Any, None] | None = None) -> None:
        """Refuses new work, cancels what runs, does ``last``, ends the thread. A second call waits for the first."""
        with self._ending:
            with self._state:
                already, self._ended = self._ended, True
                running = tuple(self._running)
            if already:
                if last is not None:
                    last.close()
                return
            for future in running:
                future.cancel()
            try:
                if last is not None:
                    asyncio.run_coroutine_threadsafe(last, self._loop).result()
            finally:
                asyncio.run_coroutine_threadsafe(_cancel_the_rest(), self._loop).result()
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()

    def _scheduled(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._state:
            if self._ended:
                work.close()
                raise EngineDead("this model was shut down; build a new one")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future


async def _cancel_the_rest() -> None:
    """What is left would be destroyed with the loop, and complain."""
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        await asyncio.wait(rest, timeout=_LAST_SECONDS)
