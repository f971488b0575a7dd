"""``GET /metrics``: every speech request is counted once, by what became of it, and each app counts its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from chatterbox_vllm.api.app import create_app
from chatterbox_vllm.errors import EngineDead
from chatterbox_vllm.settings import Settings
from tests.fake_engine import PIECE, FakeChatterbox, Running, running, wait_for

GOOD = {"input": "Hello there.", "response_format": "pcm"}
SPEECH = "/v1/audio/speech"


@pytest.fixture
def server() -> Iterator[Running]:
    with running(FakeChatterbox(), max_concurrent_requests=2) as started:
        yield started


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as made:
        yield made


def figures(client: httpx.Client, **options: Any) -> dict[str, float]:
    response = client.get("/metrics", **options)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(response.text)
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def outcomes(client: httpx.Client) -> dict[str, float]:
    """Those that occurred."""
    name = "chatterbox_requests_total "
    return {key.removeprefix(name): value for key, value in figures(client).items() if key.startswith(name) and value}


def test_a_fresh_server_counts_nothing_and_shows_the_vocoder(client: httpx.Client) -> None:
    shown = figures(client)
    assert outcomes(client) == {}
    assert sum(key.startswith("chatterbox_requests_total ") for key in shown) == 5
    assert shown["chatterbox_active_requests"] == shown["chatterbox_audio_seconds_total"] == 0
    vocoder = {key.removeprefix("chatterbox_vocoder_"): value for key, value in shown.items() if "vocoder" in key}
    assert vocoder == {
        "batches_total": 2, "chunks_total": 6, "frames_total": 900, "busy_seconds_total": 0.5,
        "queue_wait_seconds_total": 0.25, "failures_total": 0, "restarts_total": 0, "waiting": 1,
    }  # fmt: skip


def test_whole_and_streamed_answers_are_timed(client: httpx.Client) -> None:
    client.post(SPEECH, json=GOOD)
    client.post("/audio/speech", json={**GOOD, "stream": True})
    shown = figures(client)
    assert outcomes(client) == {"ok": 2}
    assert shown["chatterbox_audio_seconds_total"] == pytest.approx(2 * 4 * PIECE / 24_000)
    assert shown["chatterbox_rtf_count"] == 2
    assert shown["chatterbox_first_audio_seconds_count"] == 1
    assert 0 < shown["chatterbox_first_audio_seconds_sum"] < 5


def test_outcomes_sum_to_the_requests(server: Running, client: httpx.Client) -> None:
    client.post(SPEECH, json=GOOD)
    client.post(SPEECH, json={**GOOD, "voice": "nobody"})
    client.post(SPEECH, json={})
    client.post(SPEECH, content=b"x")
    client.get(SPEECH)  # 405 is no speech request
    server.engine.break_at = 0
    client.post(SPEECH, json=GOOD)
    server.engine.break_at = 2
    with pytest.raises(httpx.RemoteProtocolError):
        client.post(SPEECH, json={**GOOD, "stream": True})
    assert outcomes(client) == {"ok": 1, "invalid": 3, "failed": 2}


def test_leaving_is_cancelled_and_a_full_server_refuses(server: Running, client: httpx.Client) -> None:
    server.engine.delay, server.engine.pieces = 0.05, 400
    with (
        client.stream("POST", SPEECH, json={**GOOD, "stream": True}) as one,
        client.stream("POST", SPEECH, json={**GOOD, "stream": True}) as two,
    ):
        sounds = [one.iter_raw(), two.iter_raw()]  # kept: a generator that is dropped closes its connection
        assert all(map(next, sounds))
        assert client.post(SPEECH, json=GOOD).status_code == 429
        assert figures(client)["chatterbox_active_requests"] == 2
    wait_for(lambda: sum(outcomes(client).values()) == 3)
    assert outcomes(client) == {"refused": 1, "cancelled": 2}


def test_an_engine_that_dies_at_work_has_failed_and_not_refused(server: Running, client: httpx.Client) -> None:
    server.engine.dead = True
    assert client.post(SPEECH, json=GOOD).status_code == 503
    assert outcomes(client) == {"refused": 1}
    server.engine.dead = False
    server.engine.break_at, server.engine.error = 0, EngineDead("died")
    assert client.post(SPEECH, json=GOOD).status_code == 503
    assert outcomes(client) == {"refused": 1, "failed": 1}


def test_a_missing_key_is_an_invalid_request_and_hides_the_figures() -> None:
    with running(FakeChatterbox(), api_key="s3cret") as started, httpx.Client(base_url=started.url) as client:
        assert client.get("/metrics").status_code == 401
        assert client.post(SPEECH, json=GOOD).status_code == 401
        client.headers["authorization"] = "Bearer s3cret"
        assert outcomes(client) == {"invalid": 1}


def test_before_the_engine_is_up_there_is_no_vocoder() -> None:
    shown = create_app(Settings()).state.metrics.exposition().decode()
    assert "chatterbox_active_requests 0.0" in shown
    assert "vocoder" not in shown
