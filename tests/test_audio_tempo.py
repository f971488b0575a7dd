"""Speed changes the length and not the pitch."""

from __future__ import annotations

import numpy as np
import pytest

from chatterbox_vllm.audio.tempo import Tempo
from chatterbox_vllm.errors import InvalidRequest
from tests.audio_support import Samples

TONE = (0.3 * np.sin(2 * np.pi * 220 * np.arange(48_000) / 24_000)).astype(np.float32)


def changed(sound: Samples, speed: float, size: int = 960) -> Samples:
    tempo = Tempo(speed)
    return np.concatenate([*(tempo.feed(sound[at : at + size]) for at in range(0, len(sound), size)), tempo.finish()])


@pytest.mark.parametrize("speed", [0.25, 0.4, 0.5, 0.9, 1.25, 2.0, 3.0, 4.0])
def test_length_and_pitch(speed: float) -> None:
    result = changed(TONE, speed)
    assert result.dtype == np.float32
    assert len(result) == pytest.approx(len(TONE) / speed, rel=0.02)
    spectrum = np.abs(np.fft.rfft(result * np.hanning(len(result))))
    assert spectrum.argmax() * 24_000 / len(result) == pytest.approx(220, abs=4)
    assert np.abs(result).max() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("size", [7, 480, 48_000])
def test_chunks_do_not_matter(size: int) -> None:
    np.testing.assert_array_equal(changed(TONE[:9600], 1.5, size), changed(TONE[:9600], 1.5))


def test_sound_comes_out_while_it_goes_in() -> None:
    tempo = Tempo(1.2)
    assert len(tempo.feed(TONE[:4800])) > 0


@pytest.mark.parametrize("speed", [0.25, 0.5, 0.9, 1.1, 2.0, 4.0])
def test_what_is_kept_back(speed: float) -> None:
    kept = []
    for count in range(4800, 48_000, 960):
        tempo = Tempo(speed)
        kept.append((count / speed - len(tempo.feed(TONE[:count]))) / 24_000)
    assert 0.0 < max(kept) <= tempo.behind
    assert Tempo(1.0).behind == 0.0


def test_speed_one_changes_nothing() -> None:
    np.testing.assert_array_equal(changed(TONE, 1.0), TONE)
    assert len(Tempo(2).finish()) == 0


@pytest.mark.parametrize("speed", [0.2, 4.1, 0, -1, float("nan"), float("inf"), True, "2", None])
def test_other_speeds_are_refused(speed: object) -> None:
    with pytest.raises(InvalidRequest, match=r"0\.25 to 4") as caught:
        Tempo(speed)  # type: ignore[arg-type]
    assert caught.value.param == "speed"
