"""A server whose engine dies, with the fake engine; ``test_server_process`` kills a real one."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref

import httpx
import pytest

from chatterbox_vllm.api import app
from chatterbox_vllm.errors import EngineDead
from chatterbox_vllm.settings import Settings
from tests.fake_engine import FakeChatterbox, running, wait_for

GOOD = {"model": "chatterbox", "input": "Hello.", "response_format": "pcm"}


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("/live", 200, False),
        ("/ready", 200, False),
        ("/ready?from=here", 200, False),
        ("/health", 200, False),
        ("/metrics", 200, False),
        ("/ready", 503, True),
        ("/metrics", 401, True),
        ("/v1/audio/speech", 200, True),
        ("/v1/audio/speech?path=/ready", 200, True),
    ],
)
def test_probes_that_are_content_are_not_logged(path: str, status: int, told: bool) -> None:
    """uvicorn's records: client, method, path, version, status."""
    access = logging.getLogger("uvicorn.access")
    record = access.makeRecord(
        access.name, logging.INFO, "", 0, "%s - %s %s HTTP/%s %d", ("127.0.0.1:1", "GET", path, "1.1", status), None
    )
    app.log_to_stderr(Settings(log_level="debug"))
    assert access.filter(record)
    app.log_to_stderr(Settings())
    assert bool(access.filter(record)) is told


def test_a_dead_engine_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[FakeChatterbox] = []
    may_start = threading.Event()
    may_start.set()

    async def start(_settings: Settings) -> FakeChatterbox:
        await asyncio.to_thread(may_start.wait)
        engines.append(FakeChatterbox())
        return engines[-1]

    monkeypatch.setattr(app, "_engine", start)
    with running(None) as server, httpx.Client(base_url=server.url) as client:
        wait_for(lambda: client.get("/ready").status_code == 200)
        may_start.clear()
        engines[0].dead = True
        assert client.get("/ready").status_code == 503
        wait_for(lambda: client.get("/health").json()["status"] == "starting")
        may_start.set()
        wait_for(lambda: client.get("/ready").status_code == 200)
        assert client.post("/v1/audio/speech", json=GOOD).status_code == 200
        assert len(engines) == 2
        assert server.services.engine is engines[1]
    assert all(engine.dead for engine in engines)


def test_a_collection_of_garbage_leaves_out_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it stops the server for half a second, and listeners fall silent."""

    class Model:
        """Of an engine: in a circle, so that only the collector ends it."""

        def __init__(self) -> None:
            self.self = self

    models: list[weakref.ref[Model]] = []

    async def start(_settings: Settings) -> FakeChatterbox:
        engine = FakeChatterbox()
        engine.model = Model()  # type: ignore[attr-defined]
        models.append(weakref.ref(engine.model))  # type: ignore[attr-defined]
        return engine

    monkeypatch.setattr(app, "_engine", start)
    try:
        with running(None) as server, httpx.Client(base_url=server.url) as client:
            wait_for(lambda: client.get("/ready").status_code == 200)
            kept = gc.get_freeze_count()
            assert kept > len(gc.get_objects())
            server.services.engine.dead = True  # type: ignore[attr-defined]
            wait_for(lambda: len(models) == 2 and client.get("/ready").status_code == 200)
            assert gc.get_freeze_count() > 0.9 * kept
            assert models[0]() is None, "an engine that is gone is garbage, though it was left out before"
    finally:
        gc.unfreeze()
        gc.collect()  # here, and not within a test of how long something takes


def test_a_server_whose_engines_keep_dying_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[FakeChatterbox] = []

    async def start(_settings: Settings) -> FakeChatterbox:
        engines.append(FakeChatterbox())
        engines[-1].dead = True
        return engines[-1]

    monkeypatch.setattr(app, "_engine", start)
    with pytest.raises(EngineDead, match="died 3 times in a row"):
        app.serve(Settings(port=0))
    assert len(engines) == 3
