"""How a streamed answer looks on the connection: a file in pieces, or server-sent events.

The headers go out with the first sound, so that everything that fails before it can still be an HTTP error.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, Protocol

from starlette.types import Message, Send

from chatterbox_vllm.audio.encode import FORMATS
from chatterbox_vllm.types import SAMPLE_RATE

_UNBUFFERED: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""The second tells nginx to pass the bytes on as they come."""


class Wire(Protocol):
    """One streamed answer. ``started``: bytes are out."""

    started: bool

    async def sound(self, data: bytes) -> None:
        """Sends bytes of the file; nothing for no bytes."""

    async def done(self, usage: Mapping[str, int]) -> None:
        """Ends the answer cleanly."""

    async def failed(self, fault: Mapping[str, Any]) -> None:
        """Tells what can be told; the caller then breaks the connection."""


class FileWire:
    """The file's bytes, chunked.

    Args:
        format: a name in ``FORMATS``.
        timeout: seconds that a client may take no bytes before ``TimeoutError``.
    """

    def __init__(self, send: Send, format: str, timeout: float) -> None:
        self._send = send
        self._timeout = timeout
        self._media_type = FORMATS[format]
        self.started = False

    async def sound(self, data: bytes) -> None:
        if data:
            await self._body(data)

    async def done(self, usage: Mapping[str, int]) -> None:
        await self._body(b"", more=False)

    async def failed(self, fault: Mapping[str, Any]) -> None:
        """A file has no place for an error."""

    async def _body(self, data: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(self._timeout):
            if not self.started:
                await self._send(start(self._media_type, _UNBUFFERED))
                self.started = True
            await self._send({"type": "http.response.body", "body": data, "more_body": more})


class EventWire(FileWire):
    """OpenAI's ``speech.audio.delta`` events, whose sound is the file in pieces, then ``speech.audio.done``."""

    def __init__(self, send: Send, format: str, timeout: float) -> None:
        super().__init__(send, format, timeout)
        self._media_type = "text/event-stream"

    async def sound(self, data: bytes) -> None:
        if data:
            await self._body(_event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()}))

    async def done(self, usage: Mapping[str, int]) -> None:
        await self._body(_event({"type": "speech.audio.done", "usage": usage}), more=False)

    async def failed(self, fault: Mapping[str, Any]) -> None:
        with suppress(TimeoutError):
            await self._body(_event({"type": "error", **fault}))


def start(media_type: str, headers: Mapping[str, str]) -> Message:
    """The message that begins a spoken answer."""
    every = {"Content-Type": media_type, "X-Sample-Rate": str(SAMPLE_RATE), **headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in every.items()]
    return {"type": "http.response.start", "status": 200, "headers": encoded}


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"
