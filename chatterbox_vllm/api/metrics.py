"""``GET /metrics`` for Prometheus: what became of the requests, how soon they were heard, what the vocoder does.

A speech request is counted around its whole route, key and body included, so that the outcomes sum to the requests.
Each app has a registry of its own: two apps in one process do not add up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, cast

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Message, Receive, Scope, Send

from chatterbox_vllm.api.services import Services
from chatterbox_vllm.types import SAMPLE_RATE

router = APIRouter(tags=["metrics"])

OUTCOMES: Final = ("ok", "refused", "invalid", "failed", "cancelled")
_FIRST_AUDIO: Final = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0)
_RTF: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0)
_VOCODER: Final = {
    "batches": "Batches that the vocoder ran.",
    "chunks": "Chunks of speech in those batches.",
    "frames": "Mel frames that the flow worked on, recordings included.",
    "busy_seconds": "Seconds in which a batch ran.",
    "queue_wait_seconds": "Seconds that chunks waited for their batch to begin, summed over the chunks.",
    "failures": "Batches that failed.",
    "restarts": "Times that the vocoder was started anew.",
}
"""Counters among the fields of ``AsyncChatterbox.vocoder_stats``; ``waiting``, a gauge, is the other field."""


@dataclass
class SpeechRecord:
    """One speech request so far. ``delivery`` sets ``admitted`` and ``samples``, the rest is seen on the connection.

    Args:
        began: ``time.perf_counter()`` when the request was routed.
        admitted: it got a place; what fails afterwards is no refusal.
        samples: made so far, at 24 kHz, before ``speed`` changes them.
        status: of the answer; 0 while there is none.
        first_sound: seconds until the first bytes of a streamed answer.
        complete: the answer's last bytes were handed over.
        gone: the client left before that.
        broken: an exception left the route.
    """

    began: float = field(default_factory=time.perf_counter)
    admitted: bool = False
    samples: int = 0
    status: int = 0
    first_sound: float | None = None
    complete: bool = False
    gone: bool = False
    broken: bool = False

    @property
    def outcome(self) -> str:
        """One of ``OUTCOMES``."""
        if self.gone:
            return "cancelled"
        if self.broken or not self.complete:
            return "failed"
        if self.status in (429, 503) and not self.admitted:
            return "refused"
        if self.status >= 500:
            return "failed"
        return "ok" if self.status == 200 else "invalid"

    def receiving(self, receive: Receive) -> Receive:
        """``receive`` that notices the client's leaving."""

        async def watched() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not self.complete:
                self.gone = True
            return message

        return watched

    def sending(self, send: Send) -> Send:
        """``send`` that notices status, first sound and end."""

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            else:
                self._body(message)
            await send(message)

        return watched

    def _body(self, message: Message) -> None:
        more = message.get("more_body", False)
        if more and message.get("body") and self.first_sound is None:
            self.first_sound = time.perf_counter() - self.began
        self.complete = not more


class Metrics:
    """One app's figures.

    Args:
        services: asked for the present state whenever the figures are read.
    """

    def __init__(self, services: Services) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "chatterbox_requests", "Speech requests by what became of them.", ["outcome"], registry=self._registry
        )
        for outcome in OUTCOMES:
            self._requests.labels(outcome)  # shown as 0 until there is one
        self._first_audio = Histogram(
            "chatterbox_first_audio_seconds",
            "From a streamed request to its first sound.",
            buckets=_FIRST_AUDIO,
            registry=self._registry,
        )
        self._audio = Counter(
            "chatterbox_audio_seconds",
            "Seconds of sound made, also for requests that ended badly.",
            registry=self._registry,
        )
        self._rtf = Histogram(
            "chatterbox_rtf",
            "Seconds that a request took for each second of its sound; under 1 is faster than real time.",
            buckets=_RTF,
            registry=self._registry,
        )
        self._registry.register(_State(services))

    def count(self, record: SpeechRecord) -> None:
        """Adds a request that has ended."""
        self._requests.labels(record.outcome).inc()
        seconds = record.samples / SAMPLE_RATE
        self._audio.inc(seconds)
        if record.first_sound is not None:
            self._first_audio.observe(record.first_sound)
        if record.outcome == "ok" and seconds:
            self._rtf.observe((time.perf_counter() - record.began) / seconds)

    def exposition(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)


class CountedRoute(APIRoute):
    """A route whose requests are speech requests; its endpoint's answer finds its record with ``record_of``."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in self.methods:
            await super().handle(scope, receive, send)  # 405
            return
        metrics = cast(Metrics, scope["app"].state.metrics)
        record = scope["speech_record"] = SpeechRecord()
        try:
            await super().handle(scope, record.receiving(receive), record.sending(send))
        except BaseException:
            record.broken = True
            raise
        finally:
            metrics.count(record)


def record_of(scope: Scope) -> SpeechRecord:
    """The record of a request that came by a ``CountedRoute``."""
    return cast(SpeechRecord, scope["speech_record"])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(request.app.state.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


class _State(Collector):
    """What is not counted here but asked for: the admission, and the vocoder once the engine is up."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        active = self._services.admission.active
        yield GaugeMetricFamily("chatterbox_active_requests", "Speech requests in hand.", value=active)
        if self._services.engine is None:
            return
        stats = self._services.engine.vocoder_stats
        for name, text in _VOCODER.items():
            yield CounterMetricFamily(f"chatterbox_vocoder_{name}", text, value=getattr(stats, name))
        yield GaugeMetricFamily("chatterbox_vocoder_waiting", "Chunks that wait for the vocoder.", value=stats.waiting)
