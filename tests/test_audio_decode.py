"""Recordings are read as upstream reads them, and what is no usable recording is refused by name."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import librosa
import numpy as np
import pytest

from chatterbox_vllm.audio.decode import MAX_BYTES, decode
from chatterbox_vllm.audio.encode import wav_header
from chatterbox_vllm.errors import InvalidAudio, TooLarge
from tests.audio_support import chirp, ffmpeg_file, sound_file, voice_like

STEREO = np.stack([chirp(1.0, 44_100), 0.5 * voice_like(1.0, 44_100)], axis=1)
WAV = sound_file(STEREO, 44_100)
FLAC = sound_file(STEREO, 44_100, "FLAC")
SURROUND = sound_file(np.repeat(chirp(1.0)[:, None], 6, axis=1))


@pytest.mark.parametrize(
    ("kind", "subtype", "rate"),
    [("WAV", "PCM_16", 44_100), ("WAV", "FLOAT", 8_000), ("WAV", "PCM_24", 96_000), ("FLAC", None, 44_100),
     ("OGG", None, 44_100), ("MP3", None, 44_100), ("AIFF", None, 22_050)],
)  # fmt: skip
def test_reads_what_librosa_reads(kind: str, subtype: str | None, rate: int) -> None:
    content = sound_file(np.tile(STEREO, (3, 1)), rate, kind, subtype)
    expected, _ = librosa.load(io.BytesIO(content), sr=None)
    waveform = decode(content)
    assert waveform.rate == rate
    assert waveform.samples.dtype == np.float32
    np.testing.assert_array_equal(waveform.samples, expected)


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [("ipod", "aac", 24_000), ("mp4", "aac", 44_100), ("adts", "aac", 24_000), ("webm", "libopus", 48_000),
     ("matroska", "aac", 24_000), ("ogg", "libopus", 48_000), ("asf", "libmp3lame", 24_000)],
)  # fmt: skip
def test_reads_what_libsndfile_does_not(container: str, codec: str, rate: int) -> None:
    sound = chirp(2.0, rate)
    waveform = decode(ffmpeg_file(sound, container, codec, rate))
    assert waveform.rate == rate
    assert waveform.seconds == pytest.approx(2.0, abs=0.2)
    errors = [np.abs(waveform.samples[k : k + rate] - sound[:rate]).mean() for k in range(2500)]
    assert min(errors) < 0.02, "another sound came out than went in"


def test_channels_are_averaged() -> None:
    np.testing.assert_allclose(decode(SURROUND).samples, chirp(1.0), atol=1e-4)


def test_paths_and_streamed_headers(tmp_path: Path) -> None:
    file = tmp_path / "voice.wav"
    file.write_bytes(WAV)
    np.testing.assert_array_equal(decode(file).samples, decode(WAV).samples)
    np.testing.assert_array_equal(decode(str(file)).samples, decode(WAV).samples)
    streamed = wav_header(44_100) + bytes(2) * 44_100 + WAV[44:]
    assert decode(streamed).seconds == pytest.approx(3.0)


def with_nan(value: float) -> bytes:
    samples = STEREO.copy()
    samples[99, 1] = value
    return sound_file(samples, 44_100, subtype="FLOAT")


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/hostname\n"
UNUSABLE = {
    "0 bytes": (b"", "0 bytes"),
    "a text file called wav": (b"Dear diary, this is no recording.", "not audio"),
    "zeros": (bytes(5000), "not audio"),
    "noise": (np.random.default_rng(0).bytes(5000), "not audio"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(500), "not audio"),
    "avi": (b"RIFF\0\0\0\0AVI LIST" + bytes(50), "not audio"),
    "playlist": (PLAYLIST, "not audio"),
    "playlist behind a film's magic": (b"\0\0\0\x18ftyp" + PLAYLIST, "damaged"),
    "wav cut in its header": (WAV[:20], "truncated"),
    "wav cut before its samples": (WAV[:44], "no samples"),
    "wav cut in its samples": (WAV[:50_000], "truncated"),
    "flac cut": (FLAC[: len(FLAC) // 2], "truncated"),
    "m4a cut": (ffmpeg_file(chirp(2.0), "ipod", "aac")[:9000], "damaged or truncated"),
    "wav without samples": (sound_file(STEREO[:0], 44_100), "no samples"),
    "too short": (sound_file(chirp(0.4)), "at least 0.5 s"),
    "too long": (sound_file(np.tile(chirp(1.0), 61), kind="FLAC"), "longer than 60 s"),
    "m4a too long": (ffmpeg_file(np.tile(chirp(1.0), 61), "ipod", "aac"), "longer than 60 s"),
    "an hour in 200 KB": (sound_file(np.zeros(3600 * 8000, np.int16), 8000, "FLAC"), "longer than 60 s"),
    "silence": (sound_file(np.zeros(24_000)), "silent"),
    "channels that cancel": (sound_file(np.stack([chirp(1.0), -chirp(1.0)], axis=1)), "silent"),
    "nearly silence": (sound_file(chirp(1.0) * 1e-4, subtype="FLOAT"), "silent"),
    "NaN": (with_nan(np.nan), "NaN"),
    "infinite": (with_nan(np.inf), "infinite"),
    "absurdly loud": (sound_file(chirp(1.0) * 1e20, subtype="FLOAT"), "full scale"),
    "10 samples a second": (wav_header(10) + bytes(1000), "samples a second"),
    "4 million samples a second": (wav_header(4_000_000) + bytes(1000), "samples a second"),
    "200 channels": (WAV[:22] + struct.pack("<H", 200) + WAV[24:], "channels"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable(name: str) -> None:
    content, reason = UNUSABLE[name]
    with pytest.raises(InvalidAudio, match=reason) as caught:
        decode(content, param="ref_audio")
    assert caught.value.param == "ref_audio"
    assert str(caught.value).startswith("ref_audio: ")


def test_too_large() -> None:
    with pytest.raises(TooLarge, match="10 MiB"):
        decode(WAV + bytes(MAX_BYTES))
    tone = np.tile((0.1 * np.sin(np.arange(192_000) * 0.01))[:, None], (25, 2))
    with pytest.raises(TooLarge, match="32 MiB of samples"):
        decode(sound_file(tone, 192_000, "FLAC"))


def test_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    refused = {
        tmp_path: "a directory",
        tmp_path / "absent.wav": "no file",
        tmp_path / "pipe": "not a regular file",
        "a\0b.wav": "null byte",
    }
    for path, reason in refused.items():
        with pytest.raises(InvalidAudio, match=reason):
            decode(path)


def test_every_cut_and_every_damaged_byte_is_survived() -> None:
    """Whatever is done to a file, the answer is a waveform or an InvalidAudio."""
    random = np.random.default_rng(1)
    for good in (sound_file(chirp(0.6)), sound_file(chirp(0.6), kind="OGG"), ffmpeg_file(chirp(0.6), "ipod", "aac")):
        for _ in range(40):
            content = bytearray(good)
            content[random.integers(min(200, len(content)))] = random.integers(256)
            content[random.integers(len(content))] = random.integers(256)
            try:
                decode(bytes(content[: random.integers(1, len(content))]), min_seconds=0.01)
            except (InvalidAudio, TooLarge) as error:
                assert error.param == "audio_prompt_path"  # noqa: PT017 - either outcome is right
