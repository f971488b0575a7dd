"""The Python API's streams: as long and as good as the whole, and gone when nobody listens."""

from __future__ import annotations

import gc
import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from chatterbox_vllm.errors import InvalidAudio, InvalidRequest
from chatterbox_vllm.vocoder.distance import streaming_distance
from tests.fake_engine import wait_for

if TYPE_CHECKING:
    from chatterbox_vllm.tts import ChatterboxTTS

TEXT = "Hello there, this is a stream."
LONG = " ".join(f"This is sentence number {i}, and it goes on for a while." for i in range(12))

ENDLESS = " ".join([LONG] * 20)
"""T3 is at work on its 60 parts for seconds after the first sound."""


def is_idle(model: ChatterboxTTS) -> bool:
    engine = model._engine
    streams = engine._streams + len(model._streams)
    return engine._t3.unfinished == engine.health().active == engine._worker.waiting == streams == 0


def test_a_stream_is_as_long_as_the_whole(model: ChatterboxTTS) -> None:
    chunks = list(model.generate_stream(TEXT, seed=1, max_tokens=70))
    whole = model.generate(TEXT, seed=1, max_tokens=70)
    assert len(chunks) >= 3
    assert all(chunk.dtype == torch.float32 and chunk.ndim == 2 and chunk.numel() for chunk in chunks)
    streamed = torch.cat(chunks, 1)
    assert streamed.shape == whole.shape
    assert chunks[0].shape[1] < whole.shape[1] / 4
    other = model.synthesize(model.speech_tokens(TEXT, seed=1, max_tokens=70), seed=2)
    assert streaming_distance(whole[0], streamed[0]) < 0.9 * streaming_distance(whole[0], other[0])
    assert is_idle(model)


def test_a_long_text_is_streamed_part_by_part(model: ChatterboxTTS) -> None:
    streamed = torch.cat(list(model.generate_stream(LONG, seed=1, max_tokens=25)), 1)
    assert streamed.shape == model.generate(LONG, seed=1, max_tokens=25).shape == (1, 3 * 25 * 960)


def test_the_shortest_stream(model: ChatterboxTTS) -> None:
    assert sum(chunk.shape[1] for chunk in model.generate_stream("No!", max_tokens=1)) == 960


@pytest.mark.parametrize("way", ["close", "break", "error", "forgotten"])
def test_leaving_a_stream_aborts_it(model: ChatterboxTTS, way: str) -> None:
    stream = model.generate_stream(ENDLESS)
    assert next(stream).shape[1] > 0
    assert model._engine._t3.unfinished > 0
    if way == "close":
        stream.close()
    elif way == "error":
        with pytest.raises(KeyError):
            stream.throw(KeyError("the listener's"))
    elif way == "break":
        for _ in stream:
            break
    del stream
    wait_for(lambda: is_idle(model))


def test_a_stream_that_nobody_begins_costs_nothing(model: ChatterboxTTS) -> None:
    stream = model.generate_stream(ENDLESS)
    assert is_idle(model)
    stream.close()


def test_the_garbage_collector_may_end_a_stream_in_the_engines_thread(model: ChatterboxTTS) -> None:
    stream: Any = model.generate_stream(ENDLESS)
    next(stream)
    cycle = [stream]
    cycle.append(cycle)
    del stream, cycle

    async def collect() -> None:
        gc.collect()

    model._loop.run(collect())
    wait_for(lambda: is_idle(model))


def test_streams_side_by_side(model: ChatterboxTTS) -> None:
    seeds = [1, 2, 3]
    streams = [model.generate_stream(TEXT, seed=seed, max_tokens=40) for seed in seeds]
    chunks = list(itertools.zip_longest(*streams))
    for seed, pieces in zip(seeds, zip(*chunks, strict=True), strict=True):
        alone = list(model.generate_stream(TEXT, seed=seed, max_tokens=40))
        together = [piece for piece in pieces if piece is not None]
        assert torch.equal(torch.cat(together, 1), torch.cat(alone, 1))


def test_how_often_tokens_are_told(model: ChatterboxTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one for a stream that begins alone, unless a seed wants the same sound in any company."""
    asked: list[int | None] = []
    tokens = model._engine._t3.tokens

    def noted(*arguments: Any, interval: int | None) -> Any:
        asked.append(interval)
        return tokens(*arguments, interval=interval)

    monkeypatch.setattr(model._engine._t3, "tokens", noted)
    lone = model.generate_stream(TEXT, max_tokens=40)
    next(lone)
    next(model.generate_stream(TEXT, max_tokens=40))
    lone.close()
    wait_for(lambda: is_idle(model))
    list(model.generate_stream(TEXT, max_tokens=1, seed=1))
    model.generate(TEXT, max_tokens=1)
    assert asked == [1, 5, 5, None]


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"text": ""}, "text"),
        ({"text": [TEXT]}, "text"),
        ({"text": TEXT, "temperature": 3.0}, "temperature"),
        ({"text": TEXT, "nonsense": 3.0}, "nonsense"),
        ({"text": TEXT, "seed": [1, 2]}, "seed"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once(model: ChatterboxTTS, arguments: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        model.generate_stream(**arguments)
    assert refusal.value.param == param


def test_a_voice_that_cannot_be_used(model: ChatterboxTTS) -> None:
    with pytest.raises(InvalidAudio):
        model.generate_stream(TEXT, b"no sound")


def test_a_language_that_is_not_spoken(model: ChatterboxTTS) -> None:
    with pytest.raises(InvalidRequest, match="English only"):
        next(model.generate_stream(TEXT, language_id="fr"))
    assert is_idle(model)
