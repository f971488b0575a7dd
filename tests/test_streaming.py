"""The first sound of a stream waits until it lasts, and no longer. All in simulated time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from statistics import fmean, median
from typing import Any

import pytest
import torch

from chatterbox_vllm import streaming
from chatterbox_vllm.parts import Part, speaking
from chatterbox_vllm.t3.prompt import LONE_INTERVAL, STREAM_INTERVAL
from chatterbox_vllm.types import (
    AT_ONCE,
    SAMPLES_PER_TOKEN,
    SPOKEN_TOKENS,
    TOKEN_RATE,
    Listening,
    SpeechOptions,
    SpeechRequest,
)
from chatterbox_vllm.vocoder import service
from chatterbox_vllm.vocoder.pace import Pace, Rest
from chatterbox_vllm.vocoder.schedule import Playback
from chatterbox_vllm.vocoder.utterance import Due, Listener
from tests.streaming_support import (
    Clock,
    SlowT3,
    Stream,
    listen,
    listen_to_all,
    simulated,
)
from tests.vocoder_support import voice

REQUEST = SpeechRequest("A text.", voice(25), SpeechOptions(seed=1))


SLOW = [(0.060, 1e-5), (0.030, 1e-5), (0.002, 0.006), (0.020, 0.003)]
"""Seconds a token and a frame."""


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("token", "frame"), SLOW)
def test_a_slow_device_s_listener_never_runs_dry(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, token: float, frame: float, alone: bool
) -> None:
    """And would, if the first sound came at once. What is said is the same."""
    held = listen(clock, token, frame, alone=alone)
    monkeypatch.setattr(Pace, "lasts", lambda *_, **__: True)
    eager = listen(clock, token, frame, alone=alone)
    assert held.dry == 0.0
    assert eager.dry > 0.1
    assert eager.first < held.first
    assert (eager.pieces, eager.chunks) == (held.pieces, held.chunks)
    assert sum(held.pieces) == 120 * SAMPLES_PER_TOKEN


CASES: dict[str, dict[str, Any]] = {
    "a text shorter than its silences": {"token": 0.015, "frame": 1e-5, "texts": [4], "counts": [30], "alone": True},
    "more speech than expected": {"token": 0.030, "frame": 1e-5, "texts": [10], "counts": [60]},
    "much more": {"token": 0.020, "frame": 1e-5, "texts": [4], "counts": [60]},
    "less": {"token": 0.050, "frame": 1e-5, "texts": [100], "counts": [60]},
    "the second next chunk is late": {
        "token": 0.010,
        "frame": 0.0002,
        "texts": [120],
        "counts": [356],
        "recording": 100,
    },
    "slowly spoken": {
        "token": 0.045,
        "frame": 0.004,
        "texts": [120],
        "counts": [468],
        "alone": True,
        "recording": 250,
        "listening": Listening(0.5),
    },
    "twice as fast": {"token": 0.015, "frame": 1e-5, "listening": Listening(2.0, 0.1)},
    "an encoder": {"token": 0.007, "frame": 0.0002, "listening": Listening(behind=0.5)},
    "a long recording": {"token": 0.002, "frame": 0.002, "recording": 250},
    "a short part first": {"token": 0.030, "frame": 1e-5, "texts": [5, 90], "counts": [22, 280]},
    "a short part first, slower": {"token": 0.060, "frame": 1e-5, "texts": [5, 90], "counts": [22, 280]},
    "three parts": {"token": 0.030, "frame": 0.001, "texts": [5, 5, 90], "counts": [20, 22, 200]},
}


@pytest.mark.parametrize("case", CASES)
def test_nobody_runs_dry(clock: Clock, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """And would, if the first sound came at once."""
    given = {"first": 0.2, **CASES[case]}
    assert listen(clock, **given).dry == 0.0
    monkeypatch.setattr(Pace, "lasts", lambda *_, **__: True)
    assert listen(clock, **given).dry > 0.0


@pytest.mark.parametrize(
    ("alone", "listening"),
    [
        (False, AT_ONCE),
        (False, Listening(behind=0.112)),
        (True, AT_ONCE),
        (True, Listening(behind=0.112)),
        (True, Listening(2.0, 0.172)),
    ],
)
def test_a_fast_device_s_listener_does_not_wait(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, listening: Listening, alone: bool
) -> None:
    kept = listen(clock, 0.0022, 0.00005, alone=alone, listening=listening)
    monkeypatch.setattr(Pace, "lasts", lambda *_, **__: True)
    assert listen(clock, 0.0022, 0.00005, alone=alone, listening=listening).first == pytest.approx(kept.first)
    assert kept.dry == 0.0


def test_once_it_has_begun_nothing_waits(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a part that follows, either."""
    decided: list[tuple[int, list[int]]] = []
    lasts = Pace.lasts

    def noted(speed: Pace, sound: float, rests: Sequence[Rest], *listening: Any) -> bool:
        decided.append((round(sound * TOKEN_RATE), [coming.spoken for coming in rests]))
        return lasts(speed, sound, rests, *listening)

    monkeypatch.setattr(Pace, "lasts", noted)
    assert len(listen(clock, 0.060, 1e-5, texts=[40, 40], counts=[120, 120]).pieces) == 6
    assert decided == [(13, [26, 0]), (65, [78, 0]), (120, [0])]


def test_the_pace_is_that_of_the_latest_chunk() -> None:
    part, piece = Part([1], REQUEST, 0), streaming._Piece(torch.empty(0), 1, 75, 0.5, final=False)
    assert streaming._pace(part, piece) == Pace(0.0, 0.5 / 200)


def test_chunks_are_longer_for_who_hears_less_of_them(clock: Clock) -> None:
    """And only those of a lone stream's first part are short."""
    two = {"texts": [40, 40], "counts": [40, 40], "alone": True}
    assert listen(clock, 0.002, 1e-5, **two).chunks == [15, 15, 10, 26, 14]
    assert listen(clock, 0.002, 1e-5, **two, listening=Listening(behind=0.112)).chunks == [18, 18, 4, 26, 14]


def test_what_is_no_sound_does_not_count(clock: Clock) -> None:
    class Stuttering(SlowT3):
        async def tokens(self, *_: Any, interval: int | None) -> AsyncGenerator[list[int], None]:
            yield [1, SPOKEN_TOKENS]
            yield [2, SPOKEN_TOKENS + 1, 3]

    async def said() -> Part:
        t3: Any = Stuttering(0.0, [])
        async with speaking(t3, [[1]], REQUEST, interval=STREAM_INTERVAL) as (part,):
            while not (await part.take())[1]:
                pass
            return part

    arrivals = simulated(clock, said()).arrivals
    assert (arrivals.count, arrivals.complete) == (3, True)


def test_only_a_lone_stream_s_first_part_is_told_token_by_token(clock: Clock) -> None:
    async def intervals(**options: Any) -> list[int | None]:
        t3: Any = SlowT3(0.0, [1, 1])
        async with speaking(t3, [[1], [1]], REQUEST, **options) as spoken:
            for part in spoken:
                await part.take()
        said: list[int | None] = t3.intervals
        return said

    assert simulated(clock, intervals(interval=STREAM_INTERVAL, alone=True)) == [LONE_INTERVAL, STREAM_INTERVAL]
    assert simulated(clock, intervals(interval=STREAM_INTERVAL)) == [STREAM_INTERVAL, STREAM_INTERVAL]


LONE = {"recording": 250, "texts": [40], "counts": [165], "first": 0.010}
"""A stream that begins alone has 80 ms of sound after 530 frames."""
JOINED = [Stream(alone=True, **LONE), Stream(begins=0.008, **LONE), Stream(begins=0.036, **LONE)]
"""The others' first chunks come before the first one's second chunk."""
SURPRISE = [Stream(**LONE), *(Stream(begins=0.1 + 0.0001 * n, **LONE) for n in range(40))]
"""A stream is heard when many others come."""
BURST = [Stream(begins=0.0001 * n, **LONE) for n in range(64)]
CROWD = [Stream(begins=0.03 * n, **LONE) for n in range(150)]
"""Half as many again as the device can serve: it makes 143 s of sound a second, and 220 are wanted."""


@pytest.mark.parametrize("streams", [JOINED, SURPRISE, BURST, CROWD], ids=["joined", "surprise", "burst", "crowd"])
def test_who_is_heard_does_not_fall_silent_for_who_is_not(clock: Clock, streams: Sequence[Stream]) -> None:
    assert [heard.dry for heard in listen_to_all(clock, 0.004, 0.012 / 530, streams)] == [0.0] * len(streams)


@pytest.mark.parametrize(
    ("streams", "silent"), [(SURPRISE, 20), (BURST, 20), (CROWD, 60)], ids=["surprise", "burst", "crowd"]
)
def test_and_would_if_it_went_as_it_is_due(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, streams: Sequence[Stream], silent: int
) -> None:
    """Namely so many. For that, their first sounds come no more than 0.3 s later on average."""

    def heard() -> tuple[int, float]:
        all_of_them = listen_to_all(clock, 0.004, 0.012 / 530, streams)
        return sum(each.dry > 0.0 for each in all_of_them), fmean(each.first for each in all_of_them)

    _, first = heard()
    monkeypatch.setattr(service, "ordered", lambda jobs, *_: sorted(jobs, key=lambda job: job.due.at))
    dry, first_before = heard()
    assert dry > silent
    assert first < first_before + 0.3


def test_a_held_stream_begins_before_more_do(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next chunk is due as if it were heard."""

    def first() -> float:
        return median(heard.first for heard in listen_to_all(clock, 0.004, 0.012 / 530, BURST))

    soon, due = first(), Playback.due.fget
    assert due is not None
    as_first = property(lambda playback: due(playback) if playback.has_begun else Due(clock.now, Listener.WAITING))
    monkeypatch.setattr(Playback, "due", as_first)
    assert soon < 0.8 * first()
