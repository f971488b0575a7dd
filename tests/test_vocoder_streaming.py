"""A stream is the whole file, cut where nobody hears it."""

from __future__ import annotations

import time
from itertools import islice
from unittest.mock import patch

import pytest
import torch

from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.types import Listening
from chatterbox_vllm.vocoder.distance import log_mel, mel_distance, streaming_distance
from chatterbox_vllm.vocoder.schedule import MARGIN, PATIENCE, ChunkSchedule, Playback, due_of_file
from chatterbox_vllm.vocoder.utterance import Chunk, Due, Listener, Step
from tests.vocoder_support import speech, streamed, vocoder, voice, whole

SCHEDULES = [[15, 30], [1] * 70, [3, 40, 2, 1, 1, 20], [0, 69, 1], []]


@pytest.fixture(scope="module")
def own():
    return vocoder()


def fixed_mel(own, mel):
    """Has the flow find the same mel every time, so that HiFT alone is put to the test."""
    return patch.object(own, "_flow", lambda batch: [mel[: step.frames] for step in batch])


def hift_streamed(own, count, sizes):
    """Whole and streamed samples of one and the same mel."""
    mel = voice(count, seed=9).prompt_mel
    with fixed_mel(own, mel):
        _, expected = whole(own, speech(count), voice(), seed=3)
        chunks = streamed(own, own.open(voice(), seed=3), speech(count), sizes)
    return expected, chunks


@pytest.mark.parametrize("sizes", SCHEDULES)
def test_samples_of_one_mel_do_not_depend_on_the_chunks(own, sizes):
    expected, chunks = hift_streamed(own, 70, sizes)
    assert expected.std() > 0.01
    assert (torch.cat(chunks) - expected).abs().max() <= 1e-5


def test_phases_hold_for_forty_seconds():
    own = vocoder()
    own.networks.mel2wav.f0_predictor.double()  # in float32 the pitch's last bits change with the stretch's length
    sizes = list(islice(ChunkSchedule(largest=120).sizes(alone=True), 9))
    expected, chunks = hift_streamed(own, 1000, sizes)
    assert len(chunks) == 10
    assert (torch.cat(chunks) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("broken", ["phase", "noise", "context", "fade"])
def test_a_broken_seam_would_be_noticed(own, broken):
    """The tests above are worth something: each part of what is carried on is needed."""
    settle, released = Step.settle, own._released

    def without_phase(step, said):
        settle(step, said)
        step.utterance.cycles = torch.zeros(9, dtype=torch.float64)

    def with_another_seed(step, said):
        settle(step, said)
        step.utterance.seed += 1

    def with_fade(step, samples):
        new = released(step, samples)
        return torch.cat([new[:960] * own._fade[: len(new)], new[960:]])

    breaks = {
        "phase": patch.object(Step, "settle", without_phase),
        "noise": patch.object(Step, "settle", with_another_seed),
        "context": patch("chatterbox_vllm.vocoder.utterance.REACH", 10),
        "fade": patch.object(own, "_released", with_fade),
    }
    expected, _ = hift_streamed(own, 70, [])
    with breaks[broken]:
        _, chunks = hift_streamed(own, 70, [30, 20])
    assert (torch.cat(chunks) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("sizes", SCHEDULES)
def test_no_token_is_lost(own, sizes):
    chunks = streamed(own, own.open(voice(), seed=3, diffusion_steps=2), speech(70), sizes)
    assert sum(map(len, chunks)) == 960 * 70


def test_a_final_chunk_may_be_empty(own):
    utterance = own.open(voice(), seed=3, diffusion_steps=2)
    first = own.advance([Chunk(utterance, speech(20), final=False)])[0]
    last = own.advance([Chunk(utterance, speech(0), final=True)])[0]
    assert len(first) == 960 * (20 - 13)
    assert len(last) == 960 * 13
    assert utterance.finished


def test_frames_are_committed_once_and_samples_follow(own):
    utterance, tokens = own.open(voice(), seed=3, diffusion_steps=2), speech(60)
    commitments = []
    for start in range(0, 60, 10):
        own.advance([Chunk(utterance, tokens[start : start + 10], final=start == 50)])
        commitments.append(torch.empty(0, 80) if utterance.mel is None else utterance.mel)
    assert [len(mel) for mel in commitments] == [0, 29, 49, 69, 89, 120]
    assert all(torch.equal(mel, commitments[-1][: len(mel)]) for mel in commitments)
    assert not any(mel.is_inference() for mel in commitments)


def test_what_settles_nothing_costs_nothing(own):
    utterance = own.open(voice(), seed=3)
    with patch.object(own, "_flow", side_effect=AssertionError("the flow ran")):
        assert len(own.advance([Chunk(utterance, speech(13), final=False)])[0]) == 0
        assert len(own.advance([Chunk(utterance, speech(0), final=False)])[0]) == 0
    assert utterance.released == 0
    assert len(own.advance([Chunk(utterance, speech(1), final=False)])[0]) == 960
    assert utterance.released == 2


def test_a_stream_does_not_depend_on_its_company(own):
    tokens = speech(40)
    alone = streamed(own, own.open(voice(), seed=3, diffusion_steps=2), tokens, [20])
    utterance = own.open(voice(), seed=3, diffusion_steps=2)
    company = [own.open(voice(10), seed=seed, diffusion_steps=2) for seed in (4, 5)]
    first = own.advance([Chunk(company[0], speech(33), final=True), Chunk(utterance, tokens[:20], final=False)])[1]
    last = own.advance([Chunk(utterance, tokens[20:], final=True), Chunk(company[1], speech(16), final=False)])[0]
    assert (torch.cat([first, last]) - torch.cat(alone)).abs().max() <= 1e-5


def test_streams_are_near_the_whole_file(own):
    """Random weights are no speech, so the numbers are no promise; another seed is much further away."""
    tokens = speech(100)
    mel, samples = whole(own, tokens, voice(), seed=3)
    other, other_samples = whole(own, tokens, voice(), seed=4)
    utterance = own.open(voice(), seed=3)
    chunks = streamed(own, utterance, tokens, [15, 30])
    assert 0.0 < mel_distance(mel, utterance.mel) < 1.0
    assert mel_distance(mel, other) > 5.0
    assert streaming_distance(samples, torch.cat(chunks)) < streaming_distance(samples, other_samples)


def test_seams_are_no_rougher_than_the_rest(own):
    chunks = streamed(own, own.open(voice(), seed=3), speech(100), [15, 30])
    step = torch.cat(chunks).diff().abs()
    seams = torch.tensor([len(chunks[0]), len(chunks[0]) + len(chunks[1])])
    around = torch.stack([step[seam - 5 : seam + 5].max() for seam in seams])
    assert around.max() <= step[960:].max()


def test_distance():
    generator = torch.Generator().manual_seed(0)
    sound = torch.randn(24_000, generator=generator) * 0.1
    assert streaming_distance(sound, sound) == 0.0
    assert streaming_distance(sound, 2 * sound) == pytest.approx(20 * torch.log10(torch.tensor(2.0)).item(), abs=0.01)
    assert log_mel(sound).shape == (80, 51)
    tone = torch.sin(2 * torch.pi * 973 * torch.arange(24_000) / 24_000)
    assert log_mel(tone)[:, 25].argmax() == 27  # 973 Hz is 982 mel, 28 of 81 parts of the 2840 mel that 8000 Hz are
    with pytest.raises(ValueError, match="length"):
        streaming_distance(sound, sound[1:])


def test_schedule():
    def sizes(count: int, schedule: ChunkSchedule, *, alone: bool) -> list[int]:
        return list(islice(schedule.sizes(alone=alone), count))

    assert sizes(7, ChunkSchedule(), alone=True) == [15, 15, 30, 60, 120, 240, 240]
    assert list(islice(ChunkSchedule().sizes(alone=True, listening=Listening(behind=0.04)), 4)) == [16, 16, 32, 64]
    assert next(ChunkSchedule().sizes(alone=True, listening=Listening(behind=0.28))) == 22  # 0.28 x 25 is not quite 7
    assert list(islice(ChunkSchedule().sizes(alone=True, listening=Listening(2.0, 0.02)), 4)) == [18, 18, 36, 72]
    assert list(islice(ChunkSchedule().sizes(alone=False, listening=Listening(2.0, 0.02)), 2)) == [26, 52]
    assert sizes(6, ChunkSchedule(), alone=False) == [26, 52, 104, 208, 240, 240]
    assert sizes(5, ChunkSchedule(first=10, growth=1.5, largest=30), alone=False) == [10, 15, 22, 30, 30]
    assert sizes(3, ChunkSchedule(first=12, alone=8, growth=1.0, largest=12), alone=True) == [8, 8, 8]


def test_when_chunks_are_due(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    listener = Playback()
    listener.made(0)
    listener.begin()
    assert (listener.due, due_of_file()) == (Due(100.0, Listener.WAITING), Due(100.0 + PATIENCE))
    assert not listener.has_begun
    listener.made(24_000)
    listener.begin()
    assert listener.has_begun
    assert listener.due == Due(101.0 - MARGIN, Listener.HEARING)
    now = 100.5
    listener.made(12_000)  # in time
    listener.begin()
    assert listener.due.at == 101.5 - MARGIN
    now = 103.0
    assert listener.due.at == 101.5 - MARGIN  # too late: a second and a half of silence
    listener.made(24_000)
    assert listener.due.at == 104.0 - MARGIN
    hurried = Playback(Listening(2.0, 0.1))
    hurried.made(24_000)
    assert hurried.due == Due(pytest.approx(103.5 - 0.1 - MARGIN), Listener.HELD)
    now = 103.3  # whose first sound is held back is due as if it were heard
    hurried.made(12_000)
    assert hurried.due.at == pytest.approx(103.75 - 0.1 - MARGIN)
    assert not hurried.has_begun
    hurried.begin()
    assert hurried.due.at == pytest.approx(103.3 + 0.75 - 0.1 - MARGIN)


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("first", {"first": 0}),
        ("growth", {"growth": 0.5}),
        ("growth", {"growth": float("nan")}),
        ("largest", {"largest": 3}),
    ],
)
def test_a_schedule_out_of_range_is_refused(param, values):
    with pytest.raises(ConfigurationError) as caught:
        ChunkSchedule(**values)
    assert caught.value.param == param
