"""The watermark is upstream's on a whole waveform, found in every second of a stream, and makes no clicks there."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from chatterbox_vllm import upstream
from chatterbox_vllm.audio.watermark import Watermarker, WatermarkStream
from chatterbox_vllm.errors import MissingDependency
from tests.audio_support import Samples, voice_like

SOUND = voice_like(2.0)
marker = Watermarker()


def streamed(sound: Samples, size: int) -> Samples:
    stream = WatermarkStream(marker)
    return np.concatenate([*(stream.feed(sound[at : at + size]) for at in range(0, len(sound), size)), stream.finish()])


def test_equal_to_upstreams(capsys: pytest.CaptureFixture[str]) -> None:
    perth = upstream.import_module("perth.perth_net.perth_net_implicit.perth_watermarker").PerthImplicitWatermarker()
    np.testing.assert_allclose(marker(SOUND), perth.apply_watermark(SOUND, sample_rate=24_000), atol=1e-6)


def test_it_is_found() -> None:
    assert marker.confidence(marker(SOUND)) > 0.99
    assert marker.confidence(SOUND) < 0.3
    for at in range(0, len(SOUND), 24_000):
        assert marker.confidence(marker(SOUND[at : at + 24_000])) > 0.99


@pytest.mark.parametrize("size", [1920, 7680, 24_000])
def test_a_stream_is_marked_throughout(size: int) -> None:
    result = streamed(SOUND, size)
    assert result.shape == SOUND.shape
    for at in range(0, len(SOUND), 24_000):
        assert marker.confidence(result[at : at + 24_000]) > 0.99


def test_what_is_kept_back() -> None:
    stream, sound = WatermarkStream(Watermarker()), np.full(9600, 0.1, np.float32)
    assert len(sound) - len(stream.feed(sound)) == 24_000 * stream.behind


def test_chunks_meet_without_a_click() -> None:
    def steepest(marked: Samples) -> float:
        return float(np.abs(np.diff(marked - SOUND)).max())

    alone = np.concatenate([marker(SOUND[at : at + 7680]) for at in range(0, len(SOUND), 7680)])
    assert steepest(streamed(SOUND, 7680)) < 1.2 * steepest(marker(SOUND))
    assert steepest(alone) > 1.2 * steepest(marker(SOUND)), "then WatermarkStream is not needed"


@pytest.mark.parametrize("count", [0, 1, 100, 700, 2399, 24_007])
def test_any_length(count: int) -> None:
    result = marker(SOUND[:count])
    assert result.shape == (count,)
    assert result.dtype == np.float32
    assert np.isfinite(result).all()
    assert len(streamed(SOUND[:count], 50 if count < 3000 else 5000)) == count


def test_silence_stays_silent() -> None:
    assert np.abs(marker(np.zeros(24_000, np.float32))).max() == 0


def test_threads_share_it() -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: marker(SOUND[:24_000]), range(8)))
    for result in results:
        np.testing.assert_array_equal(result, results[0])


def test_its_absence_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "perth"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingDependency, match="pip install resemble-perth"):
        Watermarker()
