"""When requests are sent: by clients that wait for their answers, all at once, or at random times."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from chatterbox_vllm.bench.client import Answer, Transfer, answer

Ask = Callable[[], Awaitable[Transfer]]
"""Sends the next request and takes its answer."""
ARRIVALS: Final = ("closed", "burst", "poisson")
BACK_OFF: Final = 1.0
"""Seconds that a client waits after a failure, so that one that is refused at once does not use up all requests."""


async def closed(ask: Ask, *, clients: int, requests: int, ramp: float, listen: bool = False) -> list[Answer]:
    """``clients`` clients, each of which asks again when it has its answer, until ``requests`` are sent.

    Args:
        ramp: seconds over which the clients' first requests are spread evenly.
        listen: a client asks again only when it would have heard its sound to the end.
    """
    answers: list[Answer] = []
    tickets = iter(range(requests))

    async def client(number: int) -> None:
        await asyncio.sleep(ramp * number / clients)
        for _ in tickets:
            got = answer(await ask())
            answers.append(got)
            if got.failure is not None:
                await asyncio.sleep(BACK_OFF)
            elif listen and got.playback is not None:
                await asyncio.sleep(max(0.0, got.playback.ends - time.perf_counter()))

    await asyncio.gather(*(client(number) for number in range(min(clients, requests))))
    return answers


async def burst(ask: Ask, *, size: int, requests: int) -> list[Answer]:
    """``size`` requests at the same instant, again when all are answered, until ``requests`` are sent."""
    transfers: list[Transfer] = []
    while len(transfers) < requests:
        transfers += await asyncio.gather(*(ask() for _ in range(min(size, requests - len(transfers)))))
    return [answer(each) for each in transfers]


async def poisson(ask: Ask, *, rate: float, requests: int, seed: int) -> list[Answer]:
    """``requests`` requests, ``rate`` a second on average, at random times that no answer changes."""
    began = time.perf_counter()

    async def at(moment: float) -> Transfer:
        await asyncio.sleep(began + moment - time.perf_counter())
        return await ask()

    return [answer(each) for each in await asyncio.gather(*map(at, _moments(rate, requests, seed)))]


def _moments(rate: float, requests: int, seed: int) -> Iterator[float]:
    draw, moment = random.Random(seed), 0.0
    for _ in range(requests):
        yield moment
        moment += draw.expovariate(rate)


async def largest(passes: Callable[[int], Awaitable[bool]], *, start: int, limit: int, resolution: int) -> int:
    """The largest number that passes, at most ``limit``: by doubling from ``start``, then by bisection.

    Args:
        resolution: the true one may be up to so much larger, less one.

    Returns:
        0 if none passed.
    """
    good, tried = 0, min(start, limit)
    while await passes(tried):
        good = tried
        if good == limit:
            return good
        tried = min(2 * good, limit)
    bad = tried
    while bad - good > resolution:
        tried = (good + bad) // 2
        if await passes(tried):
            good = tried
        else:
            bad = tried
    return good
