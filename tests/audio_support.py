"""Sounds to test with."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

Samples = NDArray[np.float32]


def voice_like(seconds: float, rate: int = 24_000, pitch: float = 140.0) -> Samples:
    """(n,) float32: a harmonic hum that rises, falls and pauses, with a little noise. Always the same."""
    time = np.arange(int(seconds * rate)) / rate
    phase = np.cumsum(2 * np.pi * (pitch + 20 * np.sin(2 * np.pi * 1.3 * time)) / rate)
    hum = sum(np.sin(k * phase) / k for k in range(1, 20))
    loudness = 0.55 + 0.45 * np.sin(2 * np.pi * 3 * time)
    noise = np.random.default_rng(0).standard_normal(len(time))
    return (0.15 * hum * loudness + 0.003 * noise).astype(np.float32)


def chirp(seconds: float, rate: int = 24_000) -> Samples:
    """(n,) float32: a tone that rises from 100 Hz, so that a delay of one sample shows."""
    time = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (100 * time + 200 * time**2))).astype(np.float32)


def sound_file(samples: NDArray[Any], rate: int = 24_000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """What libsndfile makes of (n,) or (n, channels) samples."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def ffmpeg_file(samples: Samples, container: str, codec: str, rate: int = 24_000) -> bytes:
    """What FFmpeg makes of (n,) samples."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=rate)
        stream.codec_context.layout = "mono"
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate = rate
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()
