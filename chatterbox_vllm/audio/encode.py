"""Writes speech as wav, pcm, mp3, opus, aac or flac, to memory, as the samples come.

Every chunk gives bytes at once, but for what a codec needs to complete its frames (``StreamEncoder.behind``). Encoders
are PyAV's, so no ffmpeg has to be installed. A stream's wav header has 0xFFFFFFFF for its sizes, as nobody knows them
yet.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import av
import numpy as np
from numpy.typing import NDArray

from chatterbox_vllm.errors import InvalidRequest
from chatterbox_vllm.types import SAMPLE_RATE

Samples = NDArray[np.float32]

FORMATS: Final[dict[str, str]] = {
    "wav": "audio/wav",
    "pcm": "audio/pcm",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg; codecs=opus",
    "aac": "audio/aac",
    "flac": "audio/flac",
}
"""Media type of each format; ``pcm`` is raw little-endian signed 16-bit, one channel, 24 kHz, no header."""

_UNKNOWN_SIZE: Final = 0xFFFFFFFF


@dataclass(frozen=True)
class _Codec:
    """
    Args:
        behind: seconds of sound, at most, whose bytes come with what follows it: frames are complete, and look ahead.
    """

    name: str
    container: str
    behind: float
    bit_rate: int | None = None
    sample_format: str = "flt"
    codec_options: dict[str, str] = field(default_factory=dict)
    stream_options: dict[str, str] = field(default_factory=dict)


_CODECS: Final[dict[str, _Codec]] = {
    "mp3": _Codec("libmp3lame", "mp3", 0.072, 96_000, stream_options={"write_xing": "0", "id3v2_version": "0"}),
    "opus": _Codec("libopus", "ogg", 0.047, 64_000, stream_options={"page_duration": "20000"}),
    "aac": _Codec("aac", "adts", 0.086, 96_000),
    # 48 ms frames instead of 96; no 8 KiB of padding in front of the first one
    "flac": _Codec("flac", "flac", 0.048, None, "s16", {"frame_size": "1152"}, {"metadata_header_padding": "0"}),
}


class _Encoder(Protocol):
    @property
    def behind(self) -> float: ...
    def encode(self, samples: Samples) -> bytes: ...
    def finish(self) -> bytes: ...


class StreamEncoder:
    """Encodes one utterance chunk by chunk.

    Args:
        format: a name in ``FORMATS``.
        rate: of the samples, in Hz.

    Raises:
        InvalidRequest: an unknown format (``param="response_format"``).
    """

    def __init__(self, format: str, rate: int = SAMPLE_RATE) -> None:
        check_format(format)
        self._encoder: _Encoder = _Raw(format, rate) if format in ("wav", "pcm") else _Compressed(format, rate)

    @property
    def behind(self) -> float:
        """Seconds of sound that it keeps back, at most."""
        return self._encoder.behind

    def encode(self, samples: Samples) -> bytes:
        """The bytes ready after these (n,) float32 samples, which are clipped to -1..1; may be empty."""
        return self._encoder.encode(np.clip(samples, -1.0, 1.0, dtype=np.float32))

    def finish(self) -> bytes:
        """The last bytes. The encoder is of no use afterwards."""
        return self._encoder.finish()


def check_format(format: str) -> str:
    """``format`` if it is one of ``FORMATS``.

    Raises:
        InvalidRequest: it is not (``param="response_format"``).
    """
    if format not in FORMATS:
        known = ", ".join(FORMATS)
        raise InvalidRequest(f"response_format must be one of {known}, not {format!r:.40}", param="response_format")
    return format


def encode_whole(samples: Samples, format: str, rate: int = SAMPLE_RATE) -> bytes:
    """All (n,) float32 samples as one file, whose header knows the true sizes.

    Raises:
        InvalidRequest: an unknown format (``param="response_format"``).
    """
    check_format(format)
    clipped = np.clip(samples, -1.0, 1.0, dtype=np.float32)
    if format == "wav":
        return wav_header(rate, 2 * len(clipped)) + _pcm(clipped)
    if format == "pcm":
        return _pcm(clipped)
    encoder = _Compressed(format, rate, whole=True)
    return encoder.encode(clipped) + encoder.finish()


def wav_header(rate: int, size: int | None = None) -> bytes:
    """The 44 bytes in front of ``size`` bytes of 16-bit mono samples; None = not known."""
    data = _UNKNOWN_SIZE if size is None else size
    riff = _UNKNOWN_SIZE if size is None else size + 36
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", riff, b"WAVE") + layout + struct.pack("<4sI", b"data", data)


def _pcm(samples: Samples) -> bytes:
    return bytes(np.rint(samples * 32767.0).astype("<i2").tobytes())


class _Raw:
    behind: Final = 0.0

    def __init__(self, format: str, rate: int) -> None:
        self._header = wav_header(rate) if format == "wav" else b""

    def encode(self, samples: Samples) -> bytes:
        header, self._header = self._header, b""
        return header + _pcm(samples)

    def finish(self) -> bytes:
        header, self._header = self._header, b""
        return header


class _Sink:
    """A file FFmpeg can only append to, and the stream takes from."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def write(self, data: bytes) -> int:
        self._bytes += data
        return len(data)

    def take(self) -> bytes:
        taken = bytes(self._bytes)
        self._bytes.clear()
        return taken


class _Compressed:
    """A PyAV muxer. ``whole``: it may go back and complete its header when the end is known."""

    def __init__(self, format: str, rate: int, *, whole: bool = False) -> None:
        self._codec = codec = _CODECS[format]
        self._sink: Any = io.BytesIO() if whole else _Sink()
        self._rate, self._position = rate, 0
        options = {"metadata_header_padding": "0"} if whole else {**codec.stream_options, "flush_packets": "1"}
        options["fflags"] = "bitexact"  # equal sound, equal bytes: no random serial number in an ogg
        self._container = av.open(self._sink, "w", format=codec.container, options=options)
        self._stream: Any = self._container.add_stream(codec.name, rate=rate, options=codec.codec_options)
        self._stream.codec_context.layout = "mono"
        if codec.bit_rate is not None:
            self._stream.codec_context.bit_rate = codec.bit_rate

    @property
    def behind(self) -> float:
        return self._codec.behind

    def encode(self, samples: Samples) -> bytes:
        if len(samples):
            self._mux(self._frame(samples))
        return self._taken()

    def finish(self) -> bytes:
        if self._position:
            self._mux(None)
        self._container.close()
        return self._sink.getvalue() if isinstance(self._sink, io.BytesIO) else self._sink.take()

    def _taken(self) -> bytes:
        return b"" if isinstance(self._sink, io.BytesIO) else self._sink.take()

    def _frame(self, samples: Samples) -> av.AudioFrame:
        values = np.rint(samples * 32767.0).astype(np.int16) if self._codec.sample_format == "s16" else samples
        frame = av.AudioFrame.from_ndarray(values[None], format=self._codec.sample_format, layout="mono")
        frame.sample_rate = self._rate
        frame.pts = self._position
        self._position += len(samples)
        return frame

    def _mux(self, frame: av.AudioFrame | None) -> None:
        self._container.mux(self._stream.encode(frame))
