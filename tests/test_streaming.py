"""The first sound of a stream waits until it lasts, and no longer. All in simulated time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from statistics import median
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
from chatterbox_vllm.vocoder.pace import Pace, Rest
from chatterbox_vllm.vocoder.schedule import Playback
from tests.streaming_support import (
    Clock,
    SlowT3,
    SlowVocoder,
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
    part, fast = Part([1], REQUEST, 0), SlowVocoder(1e-4)
    piece = streaming._Piece(torch.empty(0), 1, 75, 0.5, final=False)
    company = [Playback() for _ in range(3)]
    for other in company[:2]:
        other.announce()
    own: Any = fast
    pace = streaming._pace(own, part, piece, Playback(company=company))
    assert pace == Pace(0.0, 0.5 / 200, pytest.approx(3 * 200 * 1e-4))


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
"""A stream that begins alone has 80 ms of sound after 530 frames, which take 45 ms."""
JOINED = [Stream(alone=True, **LONE), Stream(begins=0.008, **LONE), Stream(begins=0.036, **LONE)]
BURST = [Stream(begins=0.0001 * n, **LONE) for n in range(24)]


@pytest.mark.parametrize("streams", [JOINED, BURST], ids=["company comes", "many at once"])
def test_others_chunks_go_first(clock: Clock, monkeypatch: pytest.MonkeyPatch, streams: Sequence[Stream]) -> None:
    """And a listener would run dry meanwhile, if that were not foreseen."""
    frame = 0.045 / 530

    def dry() -> float:
        return sum(heard.dry for heard in listen_to_all(clock, 0.0025, frame, streams))

    assert dry() == 0.0
    monkeypatch.setattr(Playback, "others_waited_for", 0)
    assert dry() > 0.0


def test_a_burst_costs_a_little_of_the_first_sound(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 requests at once on a card, 22 had run dry."""
    streams = [Stream(begins=0.0001 * n, **LONE) for n in range(64)]

    def heard() -> tuple[int, float]:
        all_of_them = listen_to_all(clock, 0.005, 0.015 / 530, streams)
        return sum(each.dry > 0.0 for each in all_of_them), median(each.first for each in all_of_them)

    dry, first = heard()
    monkeypatch.setattr(Playback, "others_waited_for", 0)
    dry_before, first_before = heard()
    assert (dry, dry_before) == (0, 24)
    assert first < 1.15 * first_before


def test_who_is_heard_does_not_fall_silent_for_who_is_not(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose sound is held back may be let go a little later: the next chunk is due as if it had begun."""
    streams = [Stream(alone=True, **LONE), *(Stream(begins=0.05 + 0.0001 * n, **LONE) for n in range(10))]

    def dry() -> float:
        return listen_to_all(clock, 0.0025, 0.045 / 530, streams)[0].dry

    assert dry() < 0.01
    due = Playback.due.fget
    assert due is not None
    monkeypatch.setattr(Playback, "due", property(lambda playback: due(playback) if playback.has_begun else clock.now))
    assert dry() > 0.3


def test_company_counts_from_its_first_token_on(clock: Clock) -> None:
    """And who has none does not care how fast the vocoder was for others."""
    alone = listen(clock, 0.0025, 0.045 / 530, alone=True, **LONE).first
    first, _ = listen_to_all(clock, 0.0025, 0.045 / 530, [JOINED[0], JOINED[2]])
    assert first.first > alone + 0.04
    part = Part([1], REQUEST, 0)
    own: Any = SlowVocoder(100.0)
    piece = streaming._Piece(torch.empty(0), 1, 75, 0.5, final=False)
    assert streaming._pace(own, part, piece, Playback(company=[Playback()])).queue == 0.0


def test_company_that_does_not_speak_yet_is_not_waited_for(clock: Clock) -> None:
    """It may have to wait for its turn in T3."""
    silent = [Stream(**{**LONE, "first": 100.0}) for _ in range(100)]
    heard = listen_to_all(clock, 0.0025, 0.045 / 530, [Stream(alone=True, **LONE), *silent])
    assert heard[0].first == pytest.approx(listen(clock, 0.0025, 0.045 / 530, alone=True, **LONE).first)
