"""Reading a request's body, bounded."""

from __future__ import annotations

import asyncio
from typing import Final

from fastapi import HTTPException, Request

from chatterbox_vllm.errors import TooLarge

MOST_SECONDS: Final = 30.0


async def read_json(request: Request, *, max_bytes: int) -> bytes:
    """The bytes of a JSON body.

    Only ``application/json`` is read: a browser asks for leave before it sends that from another site's page.

    Raises:
        HTTPException: 415, another content type.
        HTTPException: 408, it comes too slowly.
        TooLarge: more than ``max_bytes``, by its header or as it comes.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise HTTPException(415, "the body must be JSON: send the header 'Content-Type: application/json'")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(MOST_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {MOST_SECONDS:.0f} s") from None
    return bytes(body)


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the body is larger than {max_bytes} bytes")
