"""The parts of one request, each an utterance, on their way through T3 and the vocoder.

T3 speaks all of them at once. A stream's are vocoded in order, in chunks, while tokens still come; a whole file's each
in one piece, when its tokens are complete.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import torch

from chatterbox_vllm.t3.generator import T3Generator
from chatterbox_vllm.t3.prompt import LONE_INTERVAL
from chatterbox_vllm.types import SPOKEN_TOKENS, TOKEN_RATE, SpeechRequest
from chatterbox_vllm.vocoder.pace import Arrivals
from chatterbox_vllm.vocoder.schedule import due_of_file
from chatterbox_vllm.vocoder.utterance import Chunk, Utterance, open_utterance
from chatterbox_vllm.vocoder.worker import VocoderPool

T = TypeVar("T")
TOKENS_PER_ID: Final = 4
"""Speech tokens that a text's token is expected to become: mostly it is about three."""


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
        """Speech tokens it will have, as far as is known. Until its end is, there is a second more to come."""
        if self.arrivals.complete:
            return self.arrivals.count
        most = max(self.arrivals.count, TOKENS_PER_ID * len(self.text)) + TOKEN_RATE
        return max(self.arrivals.count, min(self.request.options.max_tokens, most))

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


async def vocoded_whole(vocoder: VocoderPool, part: Part) -> torch.Tensor:
    """A part's sound, (n,) float32, when its tokens are complete."""
    tokens, final = list[int](), False
    while not final:
        new, final = await part.take()
        tokens += new
    return await vocoder.submit(Chunk(part.open(), ids(tokens), final=True, due=due_of_file()))


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; the first failure cancels the rest."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def ids(tokens: list[int]) -> torch.Tensor:
    """Speech tokens as the vocoder takes them: (n,) int64."""
    return torch.tensor(tokens, dtype=torch.int64)
