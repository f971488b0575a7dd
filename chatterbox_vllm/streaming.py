"""A stream's sound: in growing chunks, while T3 still speaks, and none before a player would not run dry after it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from itertools import islice

from torch import Tensor

from chatterbox_vllm.parts import Part, ids
from chatterbox_vllm.vocoder.encoder import FRAMES_PER_TOKEN
from chatterbox_vllm.vocoder.pace import Pace, Rest
from chatterbox_vllm.vocoder.prompts import usable_tokens
from chatterbox_vllm.vocoder.schedule import ChunkSchedule, Playback
from chatterbox_vllm.vocoder.utterance import Chunk
from chatterbox_vllm.vocoder.worker import VocoderPool


@dataclass(frozen=True, eq=False)
class _Piece:
    """What the vocoder has made of one chunk.

    Args:
        samples: (n,) float32; n may be 0.
        number: of the chunk in its part, from 1.
        spoken: tokens of its part, up to here.
        seconds: that it took, the wait in the queue included.
        final: the part's last one.
    """

    samples: Tensor
    number: int
    spoken: int
    seconds: float
    final: bool


async def vocoded(
    vocoder: VocoderPool, parts: Sequence[Part], schedule: ChunkSchedule, playback: Playback, *, alone: bool
) -> AsyncGenerator[Tensor, None]:
    """The sound of parts, one after the other, (n,) float32 each.

    How fast their tokens come does not decide where they are cut: so a stream with a seed can be repeated. It decides
    when the first sound is handed out: when, by the pace so far, a player that starts then does not run dry.

    Args:
        vocoder: makes it.
        parts: of which T3 speaks.
        schedule: how large chunks are.
        playback: of the stream, by which chunks are due.
        alone: whether no other stream runs, so that the first chunk may be smaller.
    """
    held = list[Tensor]()
    for index, part in enumerate(parts, start=1):
        sizes = partial(schedule.sizes, alone=alone, listening=playback.listening)
        alone = False  # the parts that follow are not waited for
        async with aclosing(_pieces(vocoder, part, sizes(), playback)) as pieces:
            async for piece in pieces:
                held.append(piece.samples)
                playback.made(len(piece.samples))
                if not playback.has_begun:
                    rests = [_rest(other, schedule.sizes(alone=False)) for other in parts[index:]]
                    if not piece.final:
                        rests.insert(0, _rest(part, islice(sizes(), piece.number, None), piece.spoken))
                    if not _pace(part, piece).lasts(playback.sound, rests, playback.listening):
                        continue
                    playback.begin()
                for samples in held:
                    if len(samples):
                        yield samples
                held = []


async def _pieces(
    vocoder: VocoderPool, part: Part, sizes: Iterator[int], playback: Playback
) -> AsyncGenerator[_Piece, None]:
    """A part's, each when it is asked for and its tokens are there."""
    state, waiting, complete = part.open(), list[int](), False
    for number, size in enumerate(sizes, start=1):
        while len(waiting) < size and not complete:
            new, complete = await part.take()
            waiting += new
        # Tokens that end exactly with a chunk are followed by an empty one, however soon the end is known.
        final = len(waiting) < size
        began = time.monotonic()
        samples = await vocoder.submit(Chunk(state, ids(waiting[:size]), final=final, due=playback.due))
        yield _Piece(samples, number, len(state.tokens), time.monotonic() - began, final)
        if final:
            return
        waiting = waiting[size:]


def _rest(part: Part, sizes: Iterator[int], spoken: int = 0) -> Rest:
    return Rest(sizes, spoken, part.arrivals, part.expected, usable_tokens(part.request.voice))


def _pace(part: Part, latest: _Piece) -> Pace:
    frames = FRAMES_PER_TOKEN * (usable_tokens(part.request.voice) + latest.spoken)
    return Pace(part.arrivals.seconds_per_token, latest.seconds / frames)
