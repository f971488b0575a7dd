"""Stopping work whose client has gone. Neither uvicorn nor Starlette does so for a handler that is still at work."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive


async def until_disconnected(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Runs ``work`` in a task of its own, to its end or until the client is gone, when it is cancelled and awaited.

    Call it once the request's body is read. Raises what ``work`` raises.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait((task, gone))
    if not task.cancelled():
        task.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
