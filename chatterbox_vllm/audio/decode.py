"""Reads a recording of any common format, within stated limits.

libsndfile first, because upstream reads with ``librosa.load`` and so does the same; PyAV for what libsndfile
cannot read (m4a, aac, webm, wma, amr). FFmpeg is told the container, found from the first bytes: left to
guess, it would take a playlist for audio and open the files and addresses in it.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

from chatterbox_vllm.errors import InvalidAudio, TooLarge

Samples = NDArray[np.float32]

MAX_BYTES: Final = 10 * 2**20
MAX_DECODED_BYTES: Final = 32 * 2**20
"""Of float32 samples, all channels counted."""
MAX_SECONDS: Final = 60.0
MIN_SECONDS: Final = 0.5
"""Half a second is 12 speech tokens: enough for every network of the enrolment, if not for a good voice."""
RATES: Final = (1_000, 384_000)
MAX_CHANNELS: Final = 8
SILENCE: Final = 1e-4
"""A peak below this, -80 dB of full scale, is no recording of a voice."""
_LOUDEST: Final = 1e4
_UNKNOWN_SIZE: Final = 0x7FFF_0000
"""Writers that cannot seek put a size near 2 or 4 GiB into a wav header."""


@dataclass(frozen=True, eq=False)
class Waveform:
    """``samples``: (n,) float32, one channel, at ``rate`` Hz, the recording's own."""

    samples: Samples
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


@dataclass(frozen=True)
class Limits:
    """What a recording may be; see the module's constants."""

    bytes: int = MAX_BYTES
    decoded_bytes: int = MAX_DECODED_BYTES
    seconds: float = MAX_SECONDS
    least_seconds: float = MIN_SECONDS


def decode(
    source: str | Path | bytes,
    *,
    param: str = "audio_prompt_path",
    max_bytes: int = MAX_BYTES,
    max_seconds: float = MAX_SECONDS,
    min_seconds: float = MIN_SECONDS,
) -> Waveform:
    """The recording as one channel, the mean of its channels (``librosa.load(source, sr=None)``).

    Args:
        source: a file's path, or a file's content.
        param: the argument that errors name.

    Raises:
        InvalidAudio: not a file, not audio, damaged, truncated, silent, too short or too long.
        TooLarge: more bytes than ``max_bytes``, or more than ``MAX_DECODED_BYTES`` once decoded.
    """
    limits = Limits(bytes=max_bytes, seconds=max_seconds, least_seconds=min_seconds)
    try:
        waveform = _decode(read_bounded(source, param=param, max_bytes=max_bytes), limits)
        return _checked(waveform, limits)
    except (_Unusable, _TooMuch) as error:
        origin = "the recording" if isinstance(source, bytes) else f"{str(source)!r}"
        kind = TooLarge if isinstance(error, _TooMuch) else InvalidAudio
        raise kind(f"{param}: {origin} {error}", param=param) from error


def read_bounded(source: str | Path | bytes, *, param: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of ``source``.

    Raises:
        InvalidAudio: no such file, not a regular file, not readable, or empty.
        TooLarge: over ``max_bytes``.
    """
    if isinstance(source, bytes):
        content = source
    else:
        content = _read_file(Path(source), param, max_bytes)
    if not content:
        raise InvalidAudio(f"{param}: the file is empty (0 bytes)", param=param)
    if len(content) > max_bytes:
        raise TooLarge(f"{param}: the file is larger than {max_bytes / 2**20:g} MiB", param=param)
    return content


def _read_file(path: Path, param: str, max_bytes: int) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            with path.open("rb") as file:
                return file.read(max_bytes + 1)
    except FileNotFoundError:
        raise InvalidAudio(f"{param}: there is no file {str(path)!r}", param=param) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InvalidAudio(f"{param}: {str(path)!r} cannot be read: {reason}", param=param) from error
    what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
    raise InvalidAudio(f"{param}: {str(path)!r} is {what}, an audio file is needed", param=param)


class _Unusable(Exception):
    """The rest of the sentence that begins with the recording's name."""


class _TooMuch(Exception):
    """The same, for a recording over a limit of size."""


def _decode(content: bytes, limits: Limits) -> Waveform:
    if content[:4] in (b"RIFF", b"RIFX") and content[8:12] == b"WAVE":
        _check_wav(content)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            return _read_sound_file(file, limits)
    except soundfile.LibsndfileError:
        container = _container(content)
        if container is None:
            raise _Unusable("is not audio, or of a format that cannot be read (wav, flac, mp3, ogg, m4a can)") from None
        return _read_with_ffmpeg(content, container, limits)


def _check_wav(content: bytes) -> None:
    """Refuses a wav whose header promises more samples than there are; libsndfile would read what is left."""
    order: Literal["little", "big"] = "little" if content[:4] == b"RIFF" else "big"
    at = 12
    while at + 8 <= len(content):
        size = int.from_bytes(content[at + 4 : at + 8], order)
        if content[at : at + 4] == b"data":
            present = len(content) - at - 8
            if present == 0:
                raise _Unusable("has a wav header and no samples after it")
            if present + 1 < size < _UNKNOWN_SIZE:
                raise _Unusable(f"is truncated: its header promises {size} bytes of samples, it has {present}")
            return
        at += 8 + size + size % 2
    raise _Unusable("is truncated: a wav file that ends before its samples")


def _read_sound_file(file: soundfile.SoundFile, limits: Limits) -> Waveform:
    budget = _Budget(file.samplerate, file.channels, limits)
    # In one piece: soundfile seeks after each read, and an mp3 decoder does not go on after that as it would have.
    block = file.read(min(file.frames, budget.frames + 1), dtype="float32", always_2d=True)
    budget.spend(len(block))
    # The count of frames is a promise in a flac, and libsndfile's own finding elsewhere.
    if file.format == "FLAC" and len(block) < file.frames:
        raise _Unusable(f"is truncated: {len(block)} of {file.frames} samples are there")
    return Waveform(_mono(block), file.samplerate)


def _mono(block: Samples) -> Samples:
    """The mean over the channels of a (n, channels) block."""
    return np.mean(block, axis=1, dtype=np.float32) if block.shape[1] > 1 else block[:, 0]


class _Budget:
    """Counts the frames (one sample a channel) that were decoded, and stops at the limits."""

    def __init__(self, rate: int, channels: int, limits: Limits) -> None:
        if not RATES[0] <= rate <= RATES[1]:
            raise _Unusable(f"has {rate} samples a second; {RATES[0]} to {RATES[1]} can be used")
        if not 1 <= channels <= MAX_CHANNELS:
            raise _Unusable(f"has {channels} channels; 1 to {MAX_CHANNELS} can be used")
        self._limits = limits
        self._for_time = int(limits.seconds * rate)
        self._for_space = limits.decoded_bytes // (4 * channels)
        self.frames = min(self._for_time, self._for_space)

    def spend(self, frames: int) -> None:
        self.frames -= frames
        if self.frames >= 0:
            return
        if self._for_time <= self._for_space:
            raise _Unusable(f"is longer than {self._limits.seconds:g} s; cut it, 10 s are enough")
        megabytes = self._limits.decoded_bytes / 2**20
        raise _TooMuch(f"holds more than {megabytes:g} MiB of samples; lower its rate or its length")


_MAGIC: Final[tuple[tuple[str, Callable[[bytes], bool]], ...]] = (
    ("mov", lambda head: head[4:8] == b"ftyp"),
    ("matroska", lambda head: head[:4] == b"\x1aE\xdf\xa3"),
    ("ogg", lambda head: head[:4] == b"OggS"),
    ("flac", lambda head: head[:4] == b"fLaC"),  # a streamed one: libsndfile wants to know its length
    ("wav", lambda head: head[:4] == b"RIFF" and head[8:12] == b"WAVE"),
    ("asf", lambda head: head[:4] == b"\x30\x26\xb2\x75"),
    ("amr", lambda head: head[:5] == b"#!AMR"),
    ("aac", lambda head: head[:1] == b"\xff" and head[1] & 0xF6 == 0xF0),
    ("mp3", lambda head: head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1] & 0xE0 == 0xE0)),
)


def _container(content: bytes) -> str | None:
    """FFmpeg's name of the container that ``content`` begins like."""
    head = content[:16]
    return next((name for name, matches in _MAGIC if len(head) == 16 and matches(head)), None)


def _read_with_ffmpeg(content: bytes, container: str, limits: Limits) -> Waveform:
    try:
        with av.open(io.BytesIO(content), format=container, options={"protocol_whitelist": "none"}) as file:
            stream = next(iter(file.streams.audio), None)
            context = stream.codec_context if stream is not None else None
            if stream is None or context is None:
                raise _Unusable("has no sound track, or one of an unknown codec")
            budget = _Budget(context.sample_rate, context.channels, limits)
            resampler = av.AudioResampler(format="fltp", layout=context.layout, rate=context.sample_rate)
            mono: list[Samples] = []
            for frame in file.decode(stream):
                for converted in resampler.resample(frame):
                    budget.spend(converted.samples)
                    mono.append(_mono(converted.to_ndarray().T))
            return Waveform(np.concatenate(mono) if mono else np.zeros(0, np.float32), context.sample_rate)
    except (av.FFmpegError, ValueError) as error:  # ValueError: the layout changes on the way
        raise _Unusable(f"is damaged or truncated, or not the {container} file it begins like") from error


def _checked(waveform: Waveform, limits: Limits) -> Waveform:
    if waveform.seconds < limits.least_seconds:
        raise _Unusable(f"is {waveform.seconds:.2f} s long; at least {limits.least_seconds:g} s are needed")
    if not np.isfinite(waveform.samples).all():
        raise _Unusable("holds samples that are not numbers (NaN or infinite)")
    peak = float(np.abs(waveform.samples).max())
    if peak < SILENCE:
        raise _Unusable("is silent")
    if peak > _LOUDEST:
        raise _Unusable(f"has samples as large as {peak:.3g}, where 1 is full scale")
    return waveform
