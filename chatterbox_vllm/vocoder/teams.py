"""Independent pieces of work side by side on a CPU, each done by a team of torch's threads.

torch shares every operation out to all of its threads and waits for the slowest, hundreds of times in each step of the
diffusion. The two halves of the guidance have nothing to tell each other before a step's end: given a team each, they
wait for nobody, and a core's cache holds the activations of one half only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from threading import Barrier, local
from typing import Final, TypeVar

import torch

T = TypeVar("T")

TEAMS: Final = 2
_member: Final = local()


def can_share(device: torch.device) -> bool:
    """Whether ``together`` would do two things at once: on a CPU with threads for it, and not within a team."""
    return device.type == "cpu" and not hasattr(_member, "of") and torch.get_num_threads() >= TEAMS


def threads() -> int:
    """torch's threads, all teams' together; within a team, torch itself tells the team's."""
    return getattr(_member, "of", torch.get_num_threads())


def together(works: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """The results of ``works``, which run two at a time if they ``can_share``; the first ones start first.

    They run in inference mode if the caller does. What one of them raises is raised here, when all have ended.
    """
    if not can_share(device):
        return [work() for work in works]
    pool, inference = _pool(torch.get_num_threads()), torch.is_inference_mode_enabled()
    results = [pool.submit(_run, work, inference) for work in works]
    wait(results)
    return [result.result() for result in results]


def _run(work: Callable[[], T], inference: bool) -> T:
    with torch.inference_mode(inference):
        return work()


@cache
def _pool(of: int) -> ThreadPoolExecutor:
    """The two teams that ``of`` threads make; they wait for work until the process ends."""
    ready = Barrier(TEAMS + 1)
    pool = ThreadPoolExecutor(TEAMS, "vocoder-team", partial(_join, of, ready))
    for _ in range(TEAMS):
        pool.submit(int)  # a thread starts with the first work for it
    ready.wait()
    torch.set_num_threads(of)  # the teams' number is now also what torch gives to new threads: it should not be
    return pool


def _join(of: int, ready: Barrier) -> None:
    torch.get_num_threads()  # the first call in a thread resets the number
    torch.set_num_threads(of // TEAMS)
    _member.of = of
    ready.wait()
