"""One spoken answer, from an admitted request to its last byte.

Everything happens in one task, which is cancelled as soon as the client is gone: leaving the engine's generator aborts
the request inside the engine.

Until the first byte is out, an error is an HTTP error. After it, the connection is broken: sound has no frame for
an error, and a clean end would pass for the whole speech.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, aclosing
from typing import TYPE_CHECKING

from fastapi import Response
from starlette.types import Receive, Scope, Send

from chatterbox_vllm.api import faults
from chatterbox_vllm.api.disconnect import until_disconnected
from chatterbox_vllm.api.metrics import SpeechRecord, record_of
from chatterbox_vllm.api.reference import recording
from chatterbox_vllm.api.render import Renderer, render
from chatterbox_vllm.api.schemas import SpeechBody
from chatterbox_vllm.api.services import Services
from chatterbox_vllm.api.wire import EventWire, FileWire, Wire, start
from chatterbox_vllm.audio.encode import FORMATS
from chatterbox_vllm.errors import EngineDead, InvalidRequest
from chatterbox_vllm.types import SAMPLES_PER_TOKEN, SpeechRequest

if TYPE_CHECKING:
    from chatterbox_vllm.engine import AsyncChatterbox
    from chatterbox_vllm.types import VoiceFeatures


class StreamBroken(Exception):
    """Raised after the first byte, so that the server closes the connection without ending the body."""


class SpokenAnswer(Response):
    """Speaks ``body`` with ``engine`` and sends it, then leaves the ``place`` that the request has."""

    def __init__(
        self, body: SpeechBody, engine: AsyncChatterbox, services: Services, place: AbstractContextManager[object]
    ) -> None:
        super().__init__()
        self._body = body
        self._engine = engine
        self._admission = services.admission
        self._settings = services.settings
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # a file over HTTP/1.0 has no chunks: a broken one could not be told from a whole one
        streamed = self._body.events or (self._body.streamed and scope["http_version"] != "1.0")
        with self._place:
            try:
                await until_disconnected(self._deliver(send, record_of(scope), streamed=streamed), receive)
            except asyncio.CancelledError:
                if self._admission.draining:  # the drain's time is over
                    raise EngineDead("this server is shutting down") from None
                raise

    async def _deliver(self, send: Send, record: SpeechRecord, *, streamed: bool) -> None:
        try:
            request = await self._request()
            if streamed:
                await self._stream(request, self._wire(send), record)
            else:
                await self._whole(request, send, record)
        except InvalidRequest as error:
            error.param = self._body.spelt(error.param)
            raise

    async def _request(self) -> SpeechRequest:
        voice = await self._voice()
        language = self._body.spoken_language
        if language is None and self._engine.checkpoint.variant.is_multilingual:
            language = self._settings.language
        options = self._body.options(self._settings.options)
        return SpeechRequest(text=self._body.input, voice=voice, language=language, options=options)

    async def _voice(self) -> VoiceFeatures:
        """Looks the voice up, or enrols the request's recording: seconds of work for one that is new."""
        if self._body.ref_audio is None:
            return await self._engine.voices.named(self._body.voice_id)
        limit = self._settings.max_upload_bytes
        audio = await asyncio.to_thread(recording, self._body.ref_audio, max_bytes=limit)
        return await self._engine.voices.enrolled(audio, param="ref_audio", max_bytes=limit)

    async def _whole(self, request: SpeechRequest, send: Send, record: SpeechRecord) -> None:
        samples = await self._engine.speak(request)
        record.samples = len(samples)
        content = await asyncio.to_thread(render, samples, self._body.format, self._body.tempo)
        await send(start(FORMATS[self._body.format], {"Content-Length": str(len(content))}))
        await send({"type": "http.response.body", "body": content})

    def _wire(self, send: Send) -> Wire:
        kind = EventWire if self._body.events else FileWire
        return kind(send, self._body.format, self._settings.stalled_reader_timeout)

    async def _stream(self, request: SpeechRequest, wire: Wire, record: SpeechRecord) -> None:
        try:
            await self._speak_into(wire, request, record)
        except Exception as error:
            if not wire.started:
                raise
            await wire.failed(faults.describe(error))
            raise StreamBroken("a stream broke after its first byte") from error

    async def _speak_into(self, wire: Wire, request: SpeechRequest, record: SpeechRecord) -> None:
        renderer, ready = Renderer(self._body.format, self._body.tempo), b""
        async with aclosing(self._engine.stream(request, renderer.listening)) as pieces:
            async for samples in pieces:
                record.samples += len(samples)
                ready += await renderer.feed(samples)
                if renderer.sounds and ready:
                    await wire.sound(ready)
                    ready = b""
        ready += renderer.finish()
        await wire.sound(ready)
        await wire.done(_usage(request, record.samples))


def _usage(request: SpeechRequest, samples: int) -> dict[str, int]:
    """OpenAI's counts: the characters of the text and the speech tokens of the sound."""
    read, spoken = len(request.text), round(samples / SAMPLES_PER_TOKEN)
    return {"input_tokens": read, "output_tokens": spoken, "total_tokens": read + spoken}
