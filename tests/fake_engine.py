"""A stand-in for ``AsyncChatterbox`` that makes sound slowly and knows what became of each request."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import soundfile
import uvicorn

from chatterbox_vllm.api.app import create_app
from chatterbox_vllm.api.drain import DrainingServer
from chatterbox_vllm.api.services import Services
from chatterbox_vllm.audio.decode import MAX_BYTES, decode
from chatterbox_vllm.errors import EngineDead, EngineError, UnknownVoice
from chatterbox_vllm.settings import Settings
from chatterbox_vllm.text.frontend import check_text
from chatterbox_vllm.types import AT_ONCE, Listening, SpeechRequest

PIECE = 4800  # samples: 5 speech tokens


class FakeVoices:
    def names(self) -> list[str]:
        return ["default", "alloy", "vera"]

    def get(self, voice_id: str | None) -> str:
        if voice_id not in (None, *self.names()):
            raise UnknownVoice(f"no voice is called {voice_id!r:.80}", param="voice")
        return voice_id or "default"

    async def named(self, voice_id: str | None) -> str:
        return self.get(voice_id)

    async def enrolled(self, source: Any, *, param: str = "audio_prompt_path", max_bytes: int = MAX_BYTES) -> str:
        return f"{len(decode(source, param=param, max_bytes=max_bytes).samples)} samples"


class FakeChatterbox:
    """Speaks ``pieces`` pieces of noise, ``delay`` seconds each; ``break_at`` raises before that piece."""

    sample_rate = 24_000

    def __init__(self, *, pieces: int = 4, delay: float = 0.0, multilingual: bool = False) -> None:
        self.pieces = pieces
        self.delay = delay
        self.break_at: int | None = None
        self.error: Exception = EngineError("boom at 10.0.0.1")
        self.checkpoint = SimpleNamespace(variant=SimpleNamespace(is_multilingual=multilingual))
        self.voices = FakeVoices()
        self.requests: list[SpeechRequest] = []
        self.active = self.finished = self.aborted = 0
        self.dead = False
        self.vocoder_stats = SimpleNamespace(
            batches=2,
            chunks=6,
            frames=900,
            busy_seconds=0.5,
            queue_wait_seconds=0.25,
            failures=0,
            restarts=0,
            waiting=1,
        )

    def quantization_info(self) -> dict[str, Any]:
        return {
            "quantized": True,
            "strategy": None,
            "method": "int8",
            "components": {"t3": {"method": "int8", "bytes": 100, "bytes_before": 400, "layers": 7}},
        }

    async def memory(self) -> dict[str, Any]:
        process = {"name": "t3", "weights": 100, "allocated": 200, "peak": 300, "reserved": 400}
        return {"processes": [process], "components": {"t3": 100}, "budget": 2**31, "items": {"t3 weights": 100}}

    def health(self) -> SimpleNamespace:
        reason = "the engine has died" if self.dead else None
        return SimpleNamespace(live=not self.dead, ready=not self.dead, reason=reason, active=self.active)

    async def stream(self, request: SpeechRequest, listening: Listening = AT_ONCE) -> AsyncGenerator[np.ndarray, None]:
        if self.dead:
            raise EngineDead("no new requests")
        check_text(request.text)
        self.requests.append(request)
        self.listening = listening
        self.active += 1
        finished = False
        try:
            for index, piece in enumerate(self.sound(request)):
                if index == self.break_at:
                    finished = True
                    raise self.error
                await asyncio.sleep(self.delay)
                yield piece
            finished = True
            self.finished += 1
        finally:
            self.active -= 1
            self.aborted += not finished

    async def speak(self, request: SpeechRequest) -> np.ndarray:
        async with contextlib.aclosing(self.stream(request)) as pieces:
            return np.concatenate([piece async for piece in pieces])

    def sound(self, request: SpeechRequest) -> list[np.ndarray]:
        drawn = np.random.default_rng(request.options.seed or 0).uniform(-0.5, 0.5, self.pieces * PIECE)
        return np.split(drawn.astype(np.float32), self.pieces)

    async def shutdown(self) -> None:
        self.dead = True


@dataclass
class Running:
    """A server on a loopback port."""

    url: str
    port: int
    engine: FakeChatterbox
    server: DrainingServer
    services: Services


@contextlib.contextmanager
def running(engine: FakeChatterbox | None, **settings: Any) -> Iterator[Running]:
    """A real uvicorn around ``engine``, in a thread. None: the app starts its own."""
    chosen = Settings(**settings)
    app = create_app(chosen, engine)  # type: ignore[arg-type]
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="on", log_config=None, timeout_graceful_shutdown=1)
    server = DrainingServer(config, app.state.services.admission, chosen.drain_timeout)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    port = listener.getsockname()[1]
    thread.start()
    wait_for(lambda: server.started)
    yield Running(f"http://127.0.0.1:{port}", port, engine or FakeChatterbox(), server, app.state.services)
    server.should_exit = True
    thread.join(10)


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Seconds until ``condition`` holds; fails if it never does."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "waited in vain"
        time.sleep(0.005)
    return time.monotonic() - started


def free_port() -> int:
    """Of the loopback address, for a server in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def is_ready(url: str) -> bool:
    """Whether the server there says that it can speak."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/ready").status_code == 200
    return False


def wav(seconds: float = 1.0) -> bytes:
    """A recording of a tone."""
    file = io.BytesIO()
    times = np.arange(int(seconds * 24_000)) / 24_000
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * 220 * times), 24_000, format="WAV")
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()
