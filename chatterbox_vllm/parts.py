"""The parts of one request, each an utterance, on their way through T3 and the vocoder.

T3 speaks all of them at once. A stream's are vocoded in order, in chunks, while tokens still come; a whole file's each
in one piece, when its tokens are complete. A stream's first sound waits until a player would not run dry after it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Final, TypeVar

import torch

from chatterbox_vllm.t3.generator import T3Generator
from chatterbox_vllm.t3.prompt import LONE_INTERVAL
from chatterbox_vllm.types import SPOKEN_TOKENS, Listening, SpeechRequest
from chatterbox_vllm.vocoder.encoder import FRAMES_PER_TOKEN
from chatterbox_vllm.vocoder.pace import Arrivals, Pace
from chatterbox_vllm.vocoder.prompts import usable_tokens
from chatterbox_vllm.vocoder.schedule import ChunkSchedule, Playback, due_of_file
from chatterbox_vllm.vocoder.utterance import Chunk, Utterance, open_utterance
from chatterbox_vllm.vocoder.worker import VocoderPool

T = TypeVar("T")
TOKENS_PER_ID: Final = 4
"""Speech tokens that a text's token is expected to become, at most: mostly it is about three."""


@dataclass(eq=False)
class Part:
    """One part of a request's text.

    Args:
        text: its text tokens, without start and stop.
        request: of which it is a part.
        seed: its own.
        tokens: speech tokens, as T3 gives them, then None.
        arrivals: when those came.
        task: puts them there; raises what T3 raises.
    """

    text: list[int]
    request: SpeechRequest
    seed: int
    tokens: asyncio.Queue[list[int] | None] = field(default_factory=asyncio.Queue)
    arrivals: Arrivals = field(default_factory=Arrivals)
    task: asyncio.Task[None] | None = None

    def open(self) -> Utterance:
        """Its state in the vocoder."""
        options = self.request.options
        return open_utterance(self.request.voice, seed=self.seed, diffusion_steps=options.diffusion_steps)

    @property
    def expected(self) -> int:
        """Speech tokens it will have, as far as is known."""
        if self.arrivals.complete:
            return self.arrivals.count
        return max(self.arrivals.count, min(self.request.options.max_tokens, TOKENS_PER_ID * len(self.text)))

    async def take(self) -> tuple[list[int], bool]:
        """Waits for tokens and takes all there are; True with the last ones. Raises what T3 raised."""
        taken: list[int] = []
        new = await self.tokens.get()
        while new is not None:
            taken += new
            if self.tokens.empty():
                return taken, False
            new = self.tokens.get_nowait()
        assert self.task is not None
        await self.task
        return taken, True


@asynccontextmanager
async def speaking(
    t3: T3Generator, texts: Sequence[list[int]], request: SpeechRequest, *, interval: int | None, alone: bool = False
) -> AsyncIterator[list[Part]]:
    """Starts T3 on every part; on the way out, whatever still runs is aborted.

    Args:
        t3: speaks.
        texts: tokens of each part's text.
        request: whose text it is.
        interval: tokens between deliveries; None: all at the end.
        alone: no other stream runs: the first part's tokens are delivered one by one.
    """
    seed = request.options.seed if request.options.seed is not None else secrets.randbits(62)
    parts = [Part(text, request, (seed + index) % 2**63) for index, text in enumerate(texts)]
    try:
        for index, part in enumerate(parts):
            told = LONE_INTERVAL if alone and index == 0 else interval
            part.task = asyncio.create_task(_generate(t3, part, interval=told))
        yield parts
    finally:
        tasks = [part.task for part in parts if part.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _generate(t3: T3Generator, part: Part, *, interval: int | None) -> None:
    """Moves T3's tokens into the part's queue, less what is no sound (upstream's ``drop_invalid_tokens``)."""
    options = part.request.options
    if options.seed is not None:
        options = options.but(seed=part.seed)
    tokens = t3.tokens(part.text, part.request.voice, options, interval=interval)
    try:
        async with aclosing(tokens):
            async for new in tokens:
                spoken = [i for i in new if i < SPOKEN_TOKENS]
                part.arrivals.note(len(spoken))
                part.tokens.put_nowait(spoken)
        part.arrivals.complete = True
    finally:
        part.tokens.put_nowait(None)


async def vocoded(
    vocoder: VocoderPool, part: Part, schedule: ChunkSchedule, playback: Playback, *, alone: bool
) -> AsyncGenerator[torch.Tensor, None]:
    """A part's sound in growing chunks, (n,) float32 each, while its tokens still come.

    How fast they come does not decide where they are cut: so a stream with a seed can be repeated. It decides when the
    stream's first sound is handed out: when by this part's pace a player that starts then does not run dry.

    Args:
        vocoder: makes it.
        part: of which T3 speaks.
        schedule: how large chunks are.
        playback: of the stream, by which chunks are due.
        alone: whether no other stream runs, so that the first chunk may be smaller.
    """
    state, waiting, complete, held = part.open(), list[int](), False, list[torch.Tensor]()
    sizes = partial(schedule.sizes, alone=alone, listening=playback.listening)
    for count, size in enumerate(sizes(), start=1):
        while len(waiting) < size and not complete:
            new, complete = await part.take()
            waiting += new
        # Tokens that end exactly with a chunk are followed by an empty one, however soon the end is known.
        final = len(waiting) < size
        began = time.monotonic()
        held.append(await vocoder.submit(Chunk(state, _ids(waiting[:size]), final=final, due=playback.due)))
        seconds = time.monotonic() - began
        spoken, following = len(state.tokens), islice(sizes(), count, None)
        if final or playback.has_begun or _lasts(part, following, spoken, seconds, playback.listening):
            for samples in held:
                playback.delivered(len(samples))
                if len(samples):
                    yield samples
            held = []
        if final:
            return
        waiting = waiting[size:]


def _lasts(part: Part, sizes: Iterable[int], spoken: int, seconds: float, listening: Listening) -> bool:
    """Whether a player that starts now would not run dry.

    Args:
        part: the stream's first.
        sizes: of its chunks that follow.
        spoken: its tokens whose chunks are answered.
        seconds: that the latest chunk took in the vocoder.
        listening: how its sound is heard.
    """
    recording = usable_tokens(part.request.voice)
    pace = Pace(part.arrivals.seconds_per_token, seconds / (FRAMES_PER_TOKEN * (recording + spoken)))
    return pace.lasts(
        sizes,
        spoken=spoken,
        arrivals=part.arrivals,
        expected=part.expected,
        recording=recording,
        listening=listening,
    )


async def vocoded_whole(vocoder: VocoderPool, part: Part) -> torch.Tensor:
    """A part's sound, (n,) float32, when its tokens are complete."""
    tokens, final = list[int](), False
    while not final:
        new, final = await part.take()
        tokens += new
    return await vocoder.submit(Chunk(part.open(), _ids(tokens), final=True, due=due_of_file()))


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; the first failure cancels the rest."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _ids(tokens: list[int]) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int64)
