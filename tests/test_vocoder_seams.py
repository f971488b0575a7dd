"""Nobody hears where a stream was cut: at every seam its steps and spectra move no more than elsewhere in the file.

The small networks' sound is as rough as noise, and a click would hide in it. So the parts that are carried from chunk
to chunk are also listened to through a decoder that only smooths its source, with an echo from as far as HiFT looks:
there a break is far louder than anything else, and each way to break a seam is tried.

The rest of a stream is near the whole file, in decibels of log-mel, and so is half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import accumulate, islice, pairwise, repeat
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from chatterbox_vllm.vocoder import noise
from chatterbox_vllm.vocoder.distance import mel_distance, streaming_distance
from chatterbox_vllm.vocoder.hift import DECODER_REACH
from chatterbox_vllm.vocoder.schedule import ChunkSchedule
from chatterbox_vllm.vocoder.source import FRAME_SAMPLES
from chatterbox_vllm.vocoder.stage import Vocoder
from chatterbox_vllm.vocoder.utterance import Step, Utterance
from tests.vocoder_support import speech, streamed, vocoder, voice, whole

TOKENS = 160
DEFAULT = ChunkSchedule()
SCHEDULES = {
    "default": DEFAULT.sizes(alone=False),
    "alone": DEFAULT.sizes(alone=True),
    "short": repeat(15),
    "uneven": iter([18, 50, 1, 40]),
}
SIZES = {name: list(islice(sizes, 10)) for name, sizes in SCHEDULES.items()}
NOISE = 0.05
"""Decibels by which larger chunks may be further from the whole file than smaller ones."""
WINDOW, HOP = 1024, 256
"""Of the spectra whose flux is measured."""
START = 960 + WINDOW
"""Samples at an utterance's start that are not counted: its fade-in is a seam of its own."""
TOLERANCE = 1.25
"""The largest of few values and the largest of many differ by chance, a broken seam by several times."""
SMOOTHED = 97
"""Samples over which the smoothing decoder averages."""
VOICED, UNVOICED = 61.7, 0.0
"""Hertz; a frame is no whole number of the voiced sound's cycles."""


@pytest.fixture(scope="module")
def own() -> Vocoder:
    return vocoder()


def chunks_of(own: Vocoder, sizes: list[int]) -> tuple[Utterance, list[Tensor]]:
    """A stream of ``TOKENS`` tokens, and what each chunk gave; the last one is what the others leave."""
    ends = [end for end in accumulate(sizes) if end < TOKENS]
    utterance = own.open(voice(), seed=3)
    return utterance, streamed(own, utterance, speech(TOKENS), sizes[: len(ends)])


def excess(chunks: list[Tensor]) -> dict[str, float]:
    """The largest value at a seam over the largest elsewhere: of |x[n] - x[n - 1]|, and of the spectral flux."""
    samples = torch.cat(chunks)
    ends = torch.tensor([len(chunk) for chunk in chunks]).cumsum(0)[:-1]
    seams = ends[ends > 0]
    assert len(seams) >= 2
    window = torch.hann_window(WINDOW)
    spectra = torch.stft(samples, WINDOW, HOP, window=window, center=False, return_complex=True).abs()
    span = WINDOW + HOP  # of two neighbours
    return {
        "step": _ratio(samples.diff().abs(), seams, hop=1, after=1, reach=2),
        "flux": _ratio(spectra.diff().norm(dim=0), seams, hop=HOP, after=span // 2, reach=span // 2),
    }


def _ratio(values: Tensor, seams: Tensor, *, hop: int, after: int, reach: int) -> float:
    """``values[i]`` lies at the sample ``hop * i + after``; those within ``reach`` of a seam are at it."""
    places = hop * torch.arange(len(values)) + after
    at_seam = ((places[:, None] - seams).abs() <= reach).any(dim=1)
    return float(values[at_seam].max() / values[~at_seam & (places >= START)].max())


@contextmanager
def smooth(own: Vocoder, hertz: float) -> Iterator[None]:
    """Has HiFT only smooth its source, of one pitch; the mel does not matter then, and the flow need not run."""
    kernel = torch.hann_window(SMOOTHED, periodic=False)
    kernel /= kernel.sum()

    def decode(mel: Tensor, source: Tensor, edges: object) -> Tensor:
        sound = F.conv1d(source[:, None], kernel[None, None], padding="same")[:, 0]
        echo = (DECODER_REACH - 1) * FRAME_SAMPLES
        padded = F.pad(sound, (echo, echo), mode="replicate")
        return sound + 0.5 * (padded[:, : sound.shape[1]] + padded[:, 2 * echo :])

    network = own.networks.mel2wav
    with (
        patch.object(own, "_flow", lambda batch: [torch.zeros(step.frames, 80) for step in batch]),
        patch.object(network.f0_predictor, "forward", lambda mel, edges: torch.full_like(mel[:, 0], hertz)),
        patch.object(network, "decode", decode),
    ):
        yield


def without_cycles(own: Vocoder) -> AbstractContextManager[object]:
    settle = Step.settle

    def forgetful(step: Step, said: object) -> None:
        settle(step, said)
        step.utterance.cycles = torch.zeros_like(step.utterance.cycles)

    return patch.object(Step, "settle", forgetful)


def with_new_offsets(own: Vocoder) -> AbstractContextManager[object]:
    phases, drawn = noise.phases, iter(range(1000))
    return patch.object(noise, "phases", lambda keys, harmonics: phases(keys + next(drawn), harmonics))


def with_noise_from_the_chunks_start(own: Vocoder) -> AbstractContextManager[object]:
    stretch = own._stretch

    def restarted(batch: list[Step], mels: list[Tensor]) -> object:
        made = stretch(batch, mels)
        return replace(made, first=torch.zeros_like(made.first))

    return patch.object(own, "_stretch", restarted)


def with_a_fade_in_each_chunk(own: Vocoder) -> AbstractContextManager[object]:
    released = own._released

    def faded(step: Step, samples: Tensor) -> Tensor:
        new = released(step, samples)
        fade = own._fade[: len(new)]
        return torch.cat([new[: len(fade)] * fade, new[len(fade) :]])

    return patch.object(own, "_released", faded)


def with_little_context(own: Vocoder) -> AbstractContextManager[object]:
    return patch("chatterbox_vllm.vocoder.utterance._left", lambda released: max(0, released - DECODER_REACH + 5))


BREAKS: dict[Callable[[Vocoder], AbstractContextManager[object]], float] = {
    without_cycles: VOICED,
    with_new_offsets: VOICED,
    with_noise_from_the_chunks_start: UNVOICED,  # a voice hides it
    with_a_fade_in_each_chunk: VOICED,
    with_little_context: VOICED,
}
"""Each way to break a seam, and the pitch at which it is listened to."""


@pytest.mark.parametrize("schedule", SIZES)
def test_seams_are_no_rougher_than_the_rest(own, schedule):
    _, chunks = chunks_of(own, SIZES[schedule])
    assert max(excess(chunks).values()) <= TOLERANCE


@pytest.mark.parametrize("hertz", [VOICED, UNVOICED])
@pytest.mark.parametrize("schedule", SIZES)
def test_seams_of_a_smooth_sound_are_no_rougher_than_the_rest(own, schedule, hertz):
    with smooth(own, hertz):
        _, chunks = chunks_of(own, SIZES[schedule])
    assert torch.cat(chunks).std() > 1e-3
    assert max(excess(chunks).values()) <= TOLERANCE


@pytest.mark.parametrize("schedule", SIZES)
@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.__name__)
def test_a_broken_seam_is_rougher(own, broken, schedule):
    with smooth(own, BREAKS[broken]), broken(own):
        _, chunks = chunks_of(own, SIZES[schedule])
    assert max(excess(chunks).values()) > TOLERANCE


def test_the_larger_the_chunks_the_nearer_the_whole_file(own):
    """Random weights make another sound of a slightly different pitch, so it is the mel that tells."""
    mel, samples = whole(own, speech(TOKENS), voice(), seed=3)
    _, another = whole(own, speech(TOKENS), voice(), seed=4)
    distances = []
    for size in (15, 20, 40, 120):
        utterance, chunks = chunks_of(own, [size] * 10)
        distances.append(mel_distance(mel, utterance.mel))
        assert streaming_distance(samples, torch.cat(chunks)) < streaming_distance(samples, another)
    assert 0.0 < max(distances) < 1.0
    assert all(larger <= smaller + NOISE for smaller, larger in pairwise(distances))
    assert distances[-1] < distances[0] / 2


def test_half_precision_is_nearer_than_a_stream(own):
    mel, samples = whole(own, speech(TOKENS), voice(), seed=3)
    half, half_samples = whole(vocoder(dtype=torch.bfloat16), speech(TOKENS), voice(), seed=3)
    _, another = whole(own, speech(TOKENS), voice(), seed=4)
    assert 0.0 < mel_distance(mel, half) < 0.15
    assert streaming_distance(samples, half_samples) < streaming_distance(samples, another)
