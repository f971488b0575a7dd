"""What is encoded, whole or in chunks, decodes to the same sound in every format."""

from __future__ import annotations

import io
import struct

import av
import numpy as np
import pytest
import soundfile

from chatterbox_vllm.audio.encode import FORMATS, StreamEncoder, encode_whole
from chatterbox_vllm.errors import InvalidRequest
from tests.audio_support import Samples, chirp

SOUND = chirp(2.0)
COMPRESSED = ["mp3", "opus", "aac", "flac"]
TOLERANCE = {"wav": 4e-5, "pcm": 4e-5, "flac": 4e-5, "mp3": 0.02, "opus": 0.01, "aac": 0.01}
MOST_LATE = {"wav": 0, "pcm": 0, "flac": 0, "opus": 0, "mp3": 1300, "aac": 1300}
"""Samples that a decoder may put in front: mp3 and aac tell their own delay only in a whole file's header."""


def streamed(sound: Samples, name: str, size: int) -> list[bytes]:
    encoder = StreamEncoder(name)
    parts = [encoder.encode(sound[at : at + size]) for at in range(0, len(sound), size)]
    return [*parts, encoder.finish()]


def decoded(content: bytes, name: str) -> Samples:
    """24 kHz, by PyAV."""
    if name == "pcm":
        return np.frombuffer(content, "<i2").astype(np.float32) / 32767
    with av.open(io.BytesIO(content)) as file:
        resampler = av.AudioResampler(format="flt", layout="mono")
        frames = [out for frame in file.decode(audio=0) for out in resampler.resample(frame)]
        samples = np.concatenate([frame.to_ndarray()[0] for frame in frames])
    return samples[::2] if frames[0].sample_rate == 48_000 else samples


@pytest.mark.parametrize("size", [480, 6000, 48_000])
@pytest.mark.parametrize("name", FORMATS)
def test_a_stream_decodes_to_what_went_in(name: str, size: int) -> None:
    result = decoded(b"".join(streamed(SOUND, name, size)), name)
    assert_same(result, name)
    assert len(SOUND) <= len(result) <= len(SOUND) + 2200


@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_file_decodes_to_what_went_in(name: str) -> None:
    assert_same(decoded(encode_whole(SOUND, name), name), name)


@pytest.mark.parametrize("name", COMPRESSED)
def test_what_an_encoder_keeps_back(name: str) -> None:
    """By what a player has of so many samples; and it is no more than a frame too much."""
    behind, kept = StreamEncoder(name).behind, list[float]()
    for count in range(6000, 12_000, 240):
        sound = decoded(StreamEncoder(name).encode(SOUND[:count]), name)
        kept.append((count - len(sound)) / 24_000)
    assert max(kept) <= behind <= max(kept) + 0.025


@pytest.mark.parametrize("name", ["wav", "pcm"])
def test_bare_samples_come_at_once(name: str) -> None:
    assert StreamEncoder(name).behind == 0.0


def assert_same(result: Samples, name: str) -> None:
    window = slice(2400, 40_000)
    padded = np.pad(result, (0, 2000))
    errors = [np.abs(padded[late:][window] - SOUND[window]).mean() for late in range(MOST_LATE[name] + 1)]
    assert min(errors) < TOLERANCE[name]


@pytest.mark.parametrize("name", FORMATS)
def test_every_chunk_gives_bytes(name: str) -> None:
    parts = streamed(SOUND, name, 2400)  # 100 ms
    assert all(parts[:-1]), "a tenth of a second went in and nothing came out"


def test_a_streamed_wav_says_that_its_size_is_unknown() -> None:
    header = b"".join(streamed(SOUND, "wav", 4800))[:44]
    assert struct.unpack("<4sI4s", header[:12]) == (b"RIFF", 0xFFFFFFFF, b"WAVE")
    assert struct.unpack("<4sI", header[36:]) == (b"data", 0xFFFFFFFF)


def test_a_whole_wav_has_true_sizes() -> None:
    content = encode_whole(SOUND, "wav")
    assert struct.unpack("<I", content[4:8])[0] == len(content) - 8
    assert struct.unpack("<I", content[40:44])[0] == len(content) - 44 == 2 * len(SOUND)
    info = soundfile.info(io.BytesIO(content))
    assert (info.samplerate, info.channels, info.frames, info.subtype) == (24_000, 1, len(SOUND), "PCM_16")


@pytest.mark.parametrize("name", ["mp3", "flac"])
def test_a_whole_file_knows_its_length(name: str) -> None:
    with av.open(io.BytesIO(encode_whole(SOUND, name))) as file:
        assert file.duration is not None
        assert file.duration / 1e6 == pytest.approx(2.0, abs=0.1)


def test_pcm_has_no_header_and_clips() -> None:
    content = StreamEncoder("pcm").encode(np.array([0.0, 1.0, -1.0, 7.0, -7.0, 0.5], np.float32))
    assert np.frombuffer(content, "<i2").tolist() == [0, 32767, -32767, 32767, -32767, 16384]


@pytest.mark.parametrize("name", COMPRESSED)
def test_loud_sound_is_clipped(name: str) -> None:
    assert encode_whole(5 * SOUND, name) == encode_whole(np.clip(5 * SOUND, -1, 1), name)
    assert b"".join(streamed(5 * SOUND, name, 4800)) == b"".join(streamed(np.clip(5 * SOUND, -1, 1), name, 4800))


@pytest.mark.parametrize("name", FORMATS)
def test_no_sound_at_all(name: str) -> None:
    encoder = StreamEncoder(name)
    nothing = np.zeros(0, np.float32)
    content = encoder.encode(nothing) + encoder.finish()
    assert len(content) == {"wav": 44, "pcm": 0}.get(name, len(content))
    assert len(encode_whole(nothing, name)) == {"wav": 44, "pcm": 0}.get(name, len(encode_whole(nothing, name)))


def test_an_abandoned_encoder_harms_nobody() -> None:
    for name in FORMATS:
        encoder = StreamEncoder(name)
        encoder.encode(SOUND[:2400])
        del encoder


@pytest.mark.parametrize("name", ["ogg", "WAV", "", "mp3 "])
def test_unknown_formats_are_named(name: str) -> None:
    with pytest.raises(InvalidRequest, match="wav, pcm, mp3, opus, aac, flac") as caught:
        StreamEncoder(name)
    assert caught.value.param == "response_format"
    with pytest.raises(InvalidRequest):
        encode_whole(SOUND, name)
