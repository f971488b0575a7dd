"""What is watched while requests run: the server's own counters, the GPU, and whether this program keeps up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from statistics import fmean
from typing import Any, Final, Self
from urllib.parse import urlsplit

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

_LOCAL: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_GPU_PERIOD: Final = 0.1
_LAG_PERIOD: Final = 0.01
_VOCODER: Final = "chatterbox_vocoder_"


@dataclass(frozen=True)
class ServerView:
    """What our ``/metrics`` says of one level, as differences.

    Args:
        refused: requests that got no place.
        vocoder_wait_ms: mean wait of a chunk for its batch.
        vocoder_batch: mean chunks in a batch.
        vocoder_busy: share of the time in which a batch ran; more than 1 where several workers share the load.
    """

    refused: int
    vocoder_wait_ms: float
    vocoder_batch: float
    vocoder_busy: float


@dataclass
class Counters:
    """The server's counters at one moment; empty for a server that has none of ours."""

    values: dict[str, float] = field(default_factory=dict)
    taken: float = field(default_factory=time.perf_counter)

    @classmethod
    async def read(cls, session: aiohttp.ClientSession, base: str) -> Counters:
        """Asks ``base``'s ``/metrics``."""
        with suppress(aiohttp.ClientError, TimeoutError, UnicodeDecodeError):
            async with session.get(f"{base}/metrics") as response:
                if response.status == 200:
                    return cls.parsed(await response.text("utf-8"))  # whatever charset it claims
        return cls()

    @classmethod
    def parsed(cls, text: str) -> Counters:
        """From Prometheus' text format; text that is none has no counters."""
        values: dict[str, float] = {}
        with suppress(ValueError, IndexError):  # the parser's, of an empty label
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    values[" ".join([sample.name, *sample.labels.values()])] = sample.value
        return cls(values)

    def since(self, before: Counters) -> ServerView | None:
        """What happened between; None for a server that has none of our counters."""
        if f"{_VOCODER}chunks_total" not in self.values or not before.values:
            return None

        def more(name: str) -> float:
            return self.values.get(name, 0.0) - before.values.get(name, 0.0)

        chunks, batches = more(f"{_VOCODER}chunks_total"), more(f"{_VOCODER}batches_total")
        return ServerView(
            refused=round(more("chatterbox_requests_total refused")),
            vocoder_wait_ms=1000 * more(f"{_VOCODER}queue_wait_seconds_total") / max(chunks, 1.0),
            vocoder_batch=chunks / max(batches, 1.0),
            vocoder_busy=more(f"{_VOCODER}busy_seconds_total") / (self.taken - before.taken),
        )


class Gpu:
    """NVML's utilisation of one card, sampled on a thread: the share of time in which any kernel ran, averaged by the
    driver over its own period of up to a second. It says nothing of how much of the card a kernel used.

    Args:
        device: NVML's number of the card.
    """

    def __init__(self, device: int) -> None:
        self._ended = threading.Event()
        self._nvml: Any = None
        with suppress(ImportError):
            self._nvml = import_module("pynvml")  # no dependency: the extra `bench` brings it
        if self._nvml is not None:
            try:
                self._nvml.nvmlInit()
                self._card = self._nvml.nvmlDeviceGetHandleByIndex(device)
            except self._nvml.NVMLError:  # no driver, or no such card
                self._nvml = None

    @classmethod
    def beside(cls, url: str, device: int) -> Self | None:
        """The card of a server on this machine; None for another machine's."""
        return cls(device) if urlsplit(url).hostname in _LOCAL else None

    @contextmanager
    def sampled(self) -> Iterator[Callable[[], float | None]]:
        """Gives a function that returns the mean utilisation, 0 to 1, so far; None where NVML does not answer."""
        samples: list[int] = []
        self._ended.clear()
        thread = threading.Thread(target=self._sample, args=(samples,), daemon=True)
        thread.start()
        try:
            yield lambda: fmean(samples) / 100 if samples else None
        finally:
            self._ended.set()
            thread.join()

    def _sample(self, samples: list[int]) -> None:
        while self._nvml is not None and not self._ended.wait(_GPU_PERIOD):
            samples.append(self._nvml.nvmlDeviceGetUtilizationRates(self._card).gpu)


class Lag:
    """How late this program's event loop was at worst: by so much may the times of arrival be wrong."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _watch(self) -> None:
        while True:
            due = time.perf_counter() + _LAG_PERIOD
            await asyncio.sleep(_LAG_PERIOD)
            self.worst = max(self.worst, time.perf_counter() - due)
