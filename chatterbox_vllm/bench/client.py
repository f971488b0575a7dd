"""One streamed request to a server with OpenAI's speech API: when which bytes came, and what that means in sound.

While bytes come, only their number and time are noted. What they mean is worked out afterwards by ``answer``, so that
64 streams do not wait for each other's bookkeeping.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from chatterbox_vllm.bench.playback import Playback, playback
from chatterbox_vllm.types import SAMPLE_RATE

HEAD: Final = 2**18
"""Bytes of an answer that are kept, to find the first that is no silence: five seconds."""
_SAMPLE_BYTES: Final = 2
_NEVER: Final = (0, 0x7FFF0000)
"""Sizes in a wav header that say nothing: none, and from this one on."""
_LINEAR: Final = (1, 3, 0xFFFE)
"""Wav's codes for integers, floats, and either."""
_RATE: Final = re.compile("[1-9][0-9]{0,8}")
"""What X-Sample-Rate may say: samples a second, and few enough to reckon with."""


@dataclass
class Transfer:
    """What came, raw. Times are ``time.perf_counter()``'s.

    Args:
        sent: when the request was.
        reads: (arrival, bytes) of each piece.
        head: the first bytes.
        ended: when the answer was complete, or failed.
        sample_rate: by the server's X-Sample-Rate.
        failure: why it is no answer; None for one that came whole.
    """

    sent: float
    reads: list[tuple[float, int]] = field(default_factory=list)
    head: bytearray = field(default_factory=bytearray)
    ended: float = 0.0
    sample_rate: int = SAMPLE_RATE
    failure: str | None = None


@dataclass(frozen=True)
class Answer:
    """What came, as sound. Of a failed request only ``sent``, ``ended`` and ``failure`` mean anything.

    Args:
        sent, ended: as in ``Transfer``.
        failure: a few words, the same for all failures of a kind.
        first_byte: seconds until the first sample came.
        first_audible: seconds until the first sample came that is not zero.
        audio_seconds: how long the sound is.
        playback: what a listener would have heard.
    """

    sent: float
    ended: float
    failure: str | None = None
    first_byte: float = 0.0
    first_audible: float = 0.0
    audio_seconds: float = 0.0
    playback: Playback | None = None

    @property
    def total(self) -> float:
        """Seconds from the request to the answer's end."""
        return self.ended - self.sent

    @property
    def rtf(self) -> float:
        """Seconds for each second of sound."""
        return self.total / self.audio_seconds


async def transfer(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Transfer:
    """Asks and takes the whole answer. What goes wrong with the request is its ``failure``."""
    clock = time.perf_counter
    made = Transfer(clock())
    begun = False
    try:
        async with session.post(url, json=body) as response:
            begun = True
            made.failure = _refusal(response)
            if made.failure is not None:
                await response.read()
            else:
                made.sample_rate = int(response.headers.get("X-Sample-Rate", SAMPLE_RATE))
                reads, head = made.reads, made.head
                async for data in response.content.iter_any():
                    reads.append((clock(), len(data)))
                    if len(head) < HEAD:
                        head += data
    except TimeoutError:
        made.failure = "timeout"
    except aiohttp.ClientConnectorError:
        made.failure = "no connection"
    except (aiohttp.ClientError, OSError):
        made.failure = made.failure or ("cut off" if begun else "connection lost")
    made.ended = clock()
    return made


def _refusal(response: aiohttp.ClientResponse) -> str | None:
    if response.status != 200:
        return f"HTTP {response.status}"
    if not response.content_type.startswith(("audio/", "application/octet-stream")):
        return f"not audio but {response.content_type}"
    if not _RATE.fullmatch(response.headers.get("X-Sample-Rate", str(SAMPLE_RATE))):
        return "bad sample rate"
    return None


def answer(made: Transfer) -> Answer:
    """What ``made`` is as sound: PCM of 16 bit in one channel, or any linear wav."""
    if made.failure is not None:
        return Answer(made.sent, made.ended, made.failure)
    try:
        start, frame, rate, size = _layout(bytes(made.head), made.sample_rate)
    except (ValueError, struct.error):
        return Answer(made.sent, made.ended, "unreadable wav")
    received = sum(count for _, count in made.reads) - start
    if (size is not None and received < size) or received % frame:
        return Answer(made.sent, made.ended, "cut off")
    chunks = list(_samples(made.reads, start, frame))
    played = playback(chunks, sample_rate=rate)
    if played is None:
        return Answer(made.sent, made.ended, "empty")
    loud = _first_loud(made.head, start)
    if loud is None:
        return Answer(made.sent, made.ended, "silent")
    return Answer(
        made.sent,
        made.ended,
        first_byte=next(arrival for arrival, count in chunks if count) - made.sent,
        first_audible=_arrival(made.reads, loud) - made.sent,
        audio_seconds=received / frame / rate,
        playback=played,
    )


def _layout(head: bytes, sample_rate: int) -> tuple[int, int, int, int | None]:
    """(first byte of sound, bytes of a frame, frames a second, bytes of sound if the header knows) of a file.

    Raises:
        ValueError, struct.error: it begins as a wav file and does not go on as one.
    """
    if not head.startswith(b"RIFF"):
        return 0, _SAMPLE_BYTES, sample_rate, None
    at, frame, rate = 12, 0, 0
    while True:
        kind, size = struct.unpack_from("<4sI", head, at)
        at += 8
        if kind == b"fmt ":
            code, _, rate, _, frame, _ = struct.unpack_from("<HHIIHH", head, at)
            if code not in _LINEAR or not frame or not rate:
                raise ValueError(f"wav of format {code}")
        if kind == b"data":
            if not frame:
                raise ValueError("wav without a format")
            return at, frame, rate, None if size == _NEVER[0] or size >= _NEVER[1] else size
        at += size + size % 2


def _samples(reads: list[tuple[float, int]], start: int, frame: int) -> Iterator[tuple[float, int]]:
    """(arrival, samples that are whole by then and were not before) of each read."""
    taken, whole = -start, 0
    for arrival, count in reads:
        taken += count
        now = max(0, taken // frame)
        yield arrival, now - whole
        whole = now


def _first_loud(head: bytearray, start: int) -> int | None:
    """The first byte of sound that is not zero."""
    sound = head[start:]
    loud = len(sound) - len(sound.lstrip(b"\0"))
    return start + loud if loud < len(sound) else None


def _arrival(reads: list[tuple[float, int]], byte: int) -> float:
    """When that byte came."""
    for arrival, count in reads:
        byte -= count
        if byte < 0:
            return arrival
    raise ValueError("there are fewer bytes")
