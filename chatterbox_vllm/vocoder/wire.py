"""What a vocoder's worker is told and tells, and the socket on which it does when it is a process of its own.

Tensors travel as NumPy arrays, whose bytes are written as they lie in memory. Torch's own way between processes, shared
memory, leaves files behind when one of them is killed. A voice is the most of a message, so it travels once: both ends
keep the voices that were sent last.
"""

from __future__ import annotations

import asyncio
import io
import logging
import pickle
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, Final

import torch
from torch import Tensor

from chatterbox_vllm.types import VoiceFeatures
from chatterbox_vllm.vocoder.blueprint import Blueprint
from chatterbox_vllm.vocoder.footprint import VocoderFootprint
from chatterbox_vllm.vocoder.utterance import Due, Said, Step, Utterance

_COUNT: Final = struct.Struct("!I")
_PARTS_AT_ONCE: Final = 512
"""Linux takes 1024 in one call."""
VOICES: Final = 64
"""That both ends of a channel keep: 10 MB."""


@dataclass(frozen=True)
class Limits:
    """Of a batch.

    Args:
        max_batch: the most chunks.
        max_frames: the most mel frames, recordings included; None is what the vocoder runs at once.
        max_wait: seconds to wait for company once a chunk is there; 0 takes what is there.
    """

    max_batch: int = 32
    max_frames: int | None = None
    max_wait: float = 0.0


# --- what a worker is told ---


@dataclass(frozen=True)
class Load:
    """The first message to a process: what it is to be."""

    blueprint: Blueprint
    limits: Limits
    log_level: int


@dataclass(frozen=True)
class Build:
    """To a process: it may take the device's memory now."""


@dataclass(frozen=True, eq=False)
class Speak:
    """One chunk to be spoken. Of one utterance, a worker has one at a time.

    Args:
        job: names it in ``Drop`` and in what is told of it.
        step: what is to be said; not idle.
        due: see ``Chunk``.
        came: when it was asked for, by the same clock.
    """

    job: int
    step: Step
    due: Due
    came: float


@dataclass(frozen=True)
class Drop:
    """Nobody waits for this job any more."""

    job: int


# --- what a worker tells ---


@dataclass(frozen=True)
class Read:
    """The checkpoint is in its process's memory."""


@dataclass(frozen=True)
class Ready:
    """It speaks, and takes so much memory."""

    footprint: VocoderFootprint


@dataclass(frozen=True)
class Refused:
    """It cannot be loaded; the process ends."""

    error: Exception


@dataclass(frozen=True)
class Begun:
    """A batch of these jobs runs."""

    jobs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Spoken:
    """A batch is finished.

    Args:
        jobs: as they were begun.
        said: what each says.
        frames: those that the flow worked on.
        busy_seconds: that the batch took.
        waits: seconds that each job had waited when the batch began.
        footprint: of the vocoder, after it.
    """

    jobs: tuple[int, ...]
    said: list[Said] = field(repr=False)
    frames: int
    busy_seconds: float
    waits: tuple[float, ...]
    footprint: VocoderFootprint


@dataclass(frozen=True)
class Failed:
    """A batch came to nothing; ``reason`` is for people."""

    jobs: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Logged:
    """What its process logs, to be logged where the server logs."""

    record: logging.LogRecord


@dataclass(frozen=True)
class Ended:
    """A thread or process is gone, and speaks nothing of what it had. Told by the host that ran it.

    Args:
        error: how it ended.
        final: it does not come back.
    """

    error: Exception
    final: bool


Order = Speak | Drop
News = Read | Ready | Begun | Spoken | Failed | Logged | Ended
Tell = Callable[[News], None]
Part = bytes | memoryview


# --- the socket ---


class Channel:
    """The worker's end. ``receive`` belongs to one thread, ``send`` may be called from any."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._incoming = end.makefile("rb")
        self._received, self._sent = Latest(), Latest()
        self._sending = Lock()
        self._unsent: SimpleQueue[list[Part] | None] = SimpleQueue()
        self._behind = 0
        self._writer = Thread(target=self._write, name="vocoder-out", daemon=True)
        self._writer.start()

    def send(self, message: object) -> None:
        """Sends ``message`` at once, as far as the socket takes it; a thread sends the rest.

        What is told before a crash is therefore known after it, and a large answer does not hold up the next batch.
        """
        with self._sending:
            parts = framed(message, self._sent)
            if not self._behind:
                parts = self._left_over(parts)
            if parts:
                self._behind += 1
                self._unsent.put(parts)

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: the other end is gone.
        """
        (count,) = _COUNT.unpack(self._taken(_COUNT.size))
        sizes = _sizes(count).unpack(self._taken(_sizes(count).size))
        return _unpickled([self._taken(size) for size in sizes], self._received)

    def close(self) -> None:
        """Ends it on both sides, once what was sent is gone."""
        self._unsent.put(None)
        self._writer.join()
        with suppress(OSError):  # the other end may have done it
            self._end.shutdown(socket.SHUT_RDWR)

    def _taken(self, size: int) -> bytearray:
        taken = bytearray(size)
        with suppress(ConnectionError):
            if self._incoming.readinto(taken) == size:
                return taken
        raise EOFError

    def _left_over(self, parts: list[Part]) -> list[Part]:
        """What the socket does not take without waiting."""
        try:
            gone = self._end.sendmsg(parts[:_PARTS_AT_ONCE], [], socket.MSG_DONTWAIT)
        except OSError:  # it takes nothing now, or the other end is gone, which ``receive`` finds out
            gone = 0
        for place, part in enumerate(parts):
            if gone < len(part):
                return [memoryview(part)[gone:], *parts[place + 1 :]]
            gone -= len(part)
        return []

    def _write(self) -> None:
        with suppress(OSError):
            while (parts := self._unsent.get()) is not None:
                for part in parts:
                    self._end.sendall(part)
                with self._sending:
                    self._behind -= 1


async def received(reader: asyncio.StreamReader, voices: Latest) -> Any:
    """The next message at the server's end.

    Raises:
        asyncio.IncompleteReadError, ConnectionError: the other end is gone.
    """
    (count,) = _COUNT.unpack(await reader.readexactly(_COUNT.size))
    sizes = _sizes(count).unpack(await reader.readexactly(_sizes(count).size))
    return _unpickled([bytearray(await reader.readexactly(size)) for size in sizes], voices)


def framed(message: object, voices: Latest) -> list[Part]:
    """What is written for a message: the sizes of its parts, its pickle, and the arrays of that, which are not copied.

    Args:
        voices: those that were sent the same way before.
    """
    head, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(head, voices, buffers).dump(message)
    parts: list[Part] = [head.getvalue(), *(buffer.raw() for buffer in buffers)]
    return [_COUNT.pack(len(parts)) + _sizes(len(parts)).pack(*map(len, parts)), *parts]


def _sizes(count: int) -> struct.Struct:
    return struct.Struct(f"!{count}Q")


def _unpickled(parts: list[bytearray], voices: Latest) -> Any:
    head, *buffers = parts
    return _Unpickler(io.BytesIO(head), voices, buffers).load()


class Latest:
    """The voices that were used last. Both ends of a channel use the same ones in the same order."""

    def __init__(self) -> None:
        self._voices: OrderedDict[str, VoiceFeatures] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._voices

    def use(self, digest: str, voice: VoiceFeatures | None = None) -> VoiceFeatures:
        """Counts as a use of a voice, which has to be given if it is not there."""
        voice = self._voices[digest] = voice or self._voices[digest]
        self._voices.move_to_end(digest)
        if len(self._voices) > VOICES:
            self._voices.popitem(last=False)
        return voice


class _Pickler(pickle.Pickler):
    """Leaves out what a vocoder does not read."""

    def __init__(self, head: io.BytesIO, voices: Latest, buffers: list[pickle.PickleBuffer]) -> None:
        super().__init__(head, protocol=5, buffer_callback=buffers.append)
        self._voices = voices

    def persistent_id(self, value: Any) -> tuple[str, *tuple[Tensor, ...]] | None:
        if not isinstance(value, VoiceFeatures):
            return None
        if value.digest in self._voices:
            self._voices.use(value.digest)
            return (value.digest,)
        self._voices.use(value.digest, value)
        return value.digest, value.prompt_tokens, value.prompt_mel, value.x_vector

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.from_numpy, (value.numpy(),)
        if isinstance(value, Utterance):
            turned = (value.cycles, value.cycles_frame)
            return _utterance, (value.voice, value.seed, value.diffusion_steps, *turned, value.released)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, head: io.BytesIO, voices: Latest, buffers: list[bytearray]) -> None:
        super().__init__(head, buffers=buffers)
        self._voices = voices

    def persistent_load(self, sent: tuple[str, *tuple[Tensor, ...]]) -> VoiceFeatures:
        """A voice without T3's features, under the digest that it has with them."""
        digest, *features = sent
        if not features:
            return self._voices.use(digest)
        voice = VoiceFeatures(torch.empty(0), torch.empty(0, dtype=torch.int64), *features)
        vars(voice)["digest"] = digest
        return self._voices.use(digest, voice)


def _utterance(
    voice: VoiceFeatures, seed: int, diffusion_steps: int, cycles: Tensor | None, cycles_frame: int, released: int
) -> Utterance:
    """An utterance as a step needs it: the step has the tokens and the mel."""
    return Utterance(voice, seed, diffusion_steps, cycles=cycles, cycles_frame=cycles_frame, released=released)
