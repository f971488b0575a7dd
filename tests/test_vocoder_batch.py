"""A sound does not depend on what it is spoken together with."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from chatterbox_vllm.vocoder import noise
from chatterbox_vllm.vocoder.batching import packed, padded, row_mask
from chatterbox_vllm.vocoder.noise import Stream
from chatterbox_vllm.vocoder.stage import frames_at_once
from chatterbox_vllm.vocoder.utterance import Chunk, plan
from tests.vocoder_support import speech, vocoder, voice, whole

REQUESTS = [  # tokens, tokens of the recording, its odd frame, seed, steps
    (25, 25, False, 1, 4),
    (3, 10, True, 2, 2),
    (60, 40, False, 3, 4),
    (18, 25, False, 4, 2),
    (1, 7, False, 5, 4),
]


def requests(own):
    """The requests' chunks, and what each is alone: (mel, samples)."""
    chunks, alone = [], []
    for count, prompt, odd, seed, steps in REQUESTS:
        of, tokens = voice(prompt, seed=prompt, odd_frame=odd), speech(count, seed=seed)
        chunks.append(Chunk(own.open(of, seed=seed, diffusion_steps=steps), tokens, final=True))
        alone.append(whole(own, tokens, of, seed=seed, steps=steps))
    return chunks, alone


def test_mixed_lengths_voices_and_steps_sound_as_alone():
    own = vocoder()
    chunks, alone = requests(own)
    for samples, (_, expected) in zip(own.advance(chunks), alone, strict=True):
        assert samples.shape == expected.shape
        assert (samples - expected).abs().max() <= 1e-5


def test_padded_rows_have_the_mel_they_have_alone():
    own = vocoder(max_frames=100_000)
    chunks, alone = requests(own)
    with patch.object(own.networks.flow, "solve", wraps=own.networks.flow.solve) as solve:
        own.advance(chunks)
    assert [call.args[0].shape[0] for call in solve.call_args_list] == [3, 2]
    for chunk, (expected, _) in zip(chunks, alone, strict=True):
        assert (chunk.utterance.mel - expected).abs().max() <= 1e-5


def test_padded_rows_have_the_samples_they_have_alone():
    """Given their mels and pitches: otherwise the last bits of those, summed up in a phase, would tell."""
    own = vocoder(max_frames=100_000)
    own.networks.mel2wav.f0_predictor.double()
    chunks, alone = requests(own)
    mels = {id(chunk.utterance): mel for chunk, (mel, _) in zip(chunks, alone, strict=True)}
    with (
        patch.object(own, "_flow", lambda batch: [mels[id(step.utterance)] for step in batch]),
        patch.object(own.networks.mel2wav, "decode", wraps=own.networks.mel2wav.decode) as decode,
    ):
        sounds = own.advance(chunks)
    assert [call.args[0].shape[0] for call in decode.call_args_list] == [3, 2]
    for samples, (_, expected) in zip(sounds, alone, strict=True):
        assert samples.shape == expected.shape
        assert (samples - expected).abs().max() <= 1e-5


def test_rows_in_different_places_of_their_streams_sound_as_alone():
    own = vocoder(max_frames=100_000)
    own.networks.mel2wav.f0_predictor.double()
    mels = {seed: whole(own, speech(60, seed=seed), voice(), seed=seed, steps=2)[0] for seed in (1, 2, 3)}

    def advance(group, told):
        with patch.object(own, "_flow", lambda batch: [mels[step.utterance.seed][: step.frames] for step in batch]):
            chunks = [Chunk(each, speech(60, seed=each.seed)[a:b], final=b == 60) for each, a, b in group]
            for chunk, samples in zip(chunks, own.advance(chunks), strict=True):
                told[chunk.utterance.seed].append(samples)

    def run(groups):
        utterances = {seed: own.open(voice(), seed=seed, diffusion_steps=2) for seed in mels}
        told = {seed: [] for seed in mels}
        for group in groups:
            advance([(utterances[seed], a, b) for seed, a, b in group], told)
        return {seed: torch.cat(sounds) for seed, sounds in told.items()}

    parts = [[(1, 0, 30)], [(1, 30, 45), (2, 0, 20)], [(1, 45, 60), (2, 20, 60), (3, 0, 25)], [(3, 25, 60)]]
    together, alone = run(parts), run([[part] for group in parts for part in group])
    for seed, samples in together.items():
        assert samples.shape == (960 * 60,)
        assert (samples - alone[seed]).abs().max() <= 1e-5


def memory_for(own, rows):
    """Has the networks run out of memory for more than ``rows`` utterances at once."""
    network, sizes = own.backend.hift, []

    def limited(stretch):
        sizes.append(len(stretch.mel))
        if len(stretch.mel) > rows:
            raise torch.OutOfMemoryError("no memory")
        return network(stretch)

    own.backend.hift = limited
    return sizes


def test_a_batch_without_the_memory_for_it_is_split():
    own = vocoder(max_frames=100_000)
    chunks, alone = requests(own)
    sizes = memory_for(own, 1)
    sounds = own.advance(chunks)
    assert sizes == [3, 1, 2, 1, 1, 2, 1, 1]
    for samples, (_, expected) in zip(sounds, alone, strict=True):
        assert samples.shape == expected.shape


def test_an_utterance_without_the_memory_for_it_changes_none():
    own = vocoder(max_frames=100_000)
    (chunk, *_), _ = requests(own)
    other = Chunk(own.open(voice(), seed=1, diffusion_steps=2), speech(30), final=False)
    network = own.backend.hift
    memory_for(own, 0)
    with pytest.raises(torch.OutOfMemoryError):
        own.advance([chunk, other])
    own.backend.hift = network
    for each in (chunk, other):
        assert (each.utterance.mel, each.utterance.released, len(each.utterance.tokens)) == (None, 0, 0)
    assert [len(samples) > 0 for samples in own.advance([chunk, other])] == [True, True]


@pytest.mark.parametrize(("free", "frames"), [(2**20, 2048), (4 * 2**30, 4096), (80 * 2**30, 8_192)])
def test_a_gpus_free_memory_bounds_its_batches(free, frames, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2 * free))
    assert frames_at_once(torch.device("cuda"), weights=0) == frames


def test_one_batch_holds_an_utterance_once():
    own = vocoder()
    utterance = own.open(voice(), seed=1)
    with pytest.raises(ValueError, match="two chunks"):
        own.advance([Chunk(utterance, speech(3), final=False), Chunk(utterance, speech(3), final=True)])


def test_nothing_is_read_back_from_the_device():
    """On the meta device a value that is asked for, or a tensor left on the CPU, is an error."""
    own = vocoder(device="meta", max_frames=100_000)
    streams = [own.open(voice(count), seed=count) for count in (10, 20)]
    steps = [plan(Chunk(each, speech(30), final=each is streams[0])) for each in streams]
    with torch.inference_mode():
        mels = own._flow(steps)
        samples, _ = own.backend.hift(own._stretch(steps, mels))
    assert [tuple(mel.shape) for mel in mels] == [(60, 80), (54, 80)]
    assert samples.is_meta
    assert samples.shape == (2, 480 * 60)


def test_packing_keeps_to_the_budget_and_loses_nothing():
    lengths = torch.randint(1, 400, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    items = [SimpleNamespace(place=place, length=length) for place, length in enumerate(lengths)]
    batches = list(packed(items, lambda item: item.length, 1000))
    assert sorted(item.place for batch in batches for item in batch) == list(range(200))
    assert all(len(batch) * max(item.length for item in batch) <= 1000 for batch in batches)
    assert len(batches) < 1.3 * sum(lengths) / 1000
    assert [len(batch) for batch in packed(items[:3], lambda item: item.length, 1)] == [1, 1, 1]
    assert list(packed([], len, 10)) == []


def test_padding():
    rows = padded([torch.ones(3, 2), torch.ones(1, 2)])
    assert rows.tolist() == [[[1, 1]] * 3, [[1, 1], [0, 0], [0, 0]]]
    assert row_mask([3, 1], torch.device("cpu")).tolist() == [[True] * 3, [True, False, False]]
    assert row_mask([3, 3], torch.device("cpu")) is None


class TestNoise:
    keys = torch.tensor([noise.key(7, Stream.SOURCE), noise.key(8, Stream.SOURCE), noise.key(7, Stream.MEL)])

    def normals(self, first, count, channels=9):
        return noise.normals(self.keys, torch.tensor(first), count, channels)

    def test_a_value_depends_on_its_position_alone(self):
        all_of_it = self.normals([0, 0, 0], 1000)
        parts = self.normals([0, 400, 999], 1)
        assert torch.equal(
            parts[:, :, 0], torch.stack([all_of_it[0, :, 0], all_of_it[1, :, 400], all_of_it[2, :, 999]])
        )

    def test_it_is_normal_and_streams_have_nothing_in_common(self):
        values = self.normals([0, 0, 0], 50_000).double()
        assert values.mean(-1).abs().max() < 0.02
        assert (values.std(-1) - 1).abs().max() < 0.02
        assert (values.pow(4).mean(-1) - 3).abs().max() < 0.2
        common = torch.corrcoef(values.flatten(0, 1)).fill_diagonal_(0)
        assert common.abs().max() < 0.025
        shifted = torch.corrcoef(torch.cat([values[0, :, 1:], values[0, :, :-1]]))
        assert shifted.fill_diagonal_(0).abs().max() < 0.025

    def test_it_is_splitmix64(self):
        """Against the algorithm in Python's integers: torch's wrap around, and shift their sign in."""
        high, low = noise._hash(self.keys, torch.tensor([5, 6, 2**40]), 3, 2)
        for row, key in enumerate(self.keys.tolist()):
            counter = ((5, 6, 2**40)[row] + 2) * 2 + 1
            value = noise.splitmix64(key + counter * 0x9E3779B97F4A7C15)
            assert (high[row, 1, 2].item(), low[row, 1, 2].item()) == (value >> 40, (value >> 8) & 0xFFFFFF)
        assert noise.splitmix64(1234567) == 6457827717110365317  # the generator's published first output

    def test_phases(self):
        phases = noise.phases(torch.tensor([noise.key(seed, Stream.PHASE) for seed in range(500)]), 8)
        assert phases.shape == (500, 9)
        assert not phases[:, 0].any()
        assert phases[:, 1:].abs().max() <= torch.pi
        assert (phases[:, 1:].std() - torch.pi / 3**0.5).abs() < 0.05
