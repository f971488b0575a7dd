"""``GET /config`` and ``GET /memory``: the fields that other servers' clients read, and nothing that is nobody's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.fake_engine import FakeChatterbox, Running, running

KEY = "a-key-of-the-operator"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    voices = tmp_path_factory.mktemp("voices")
    with running(FakeChatterbox(), api_key=KEY, model=str(voices), voices_dir=voices, vram_budget="2GiB") as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10, headers={"Authorization": f"Bearer {KEY}"}) as made:
        yield made


def test_config(client: httpx.Client) -> None:
    answer = client.get("/config").json()
    assert answer["quantization"] == "int8"
    assert answer["components"]["t3"]["bytes"] == 100
    assert answer["model"] == "chatterbox"
    assert answer["settings"]["max_model_len"] == 2048
    assert answer["settings"]["vram_budget"] == "2GiB"
    assert answer["defaults"]["exaggeration"] == 0.5


def test_config_keeps_secrets(client: httpx.Client, server: Running) -> None:
    text = client.get("/config").text + client.get("/memory").text
    voices = server.services.settings.voices_dir
    assert voices is not None
    for secret in (KEY, str(voices), voices.name, str(Path.home())):
        assert secret not in text


def test_memory(client: httpx.Client) -> None:
    answer = client.get("/memory").json()
    info = answer["memory_info"]
    assert info["cpu_memory_mb"] > 10
    assert 0 < info["cpu_memory_percent"] < 100
    assert info["gpu_memory_allocated_mb"] == 200 / 2**20
    assert info["gpu_memory_reserved_mb"] == 400 / 2**20
    assert info["gpu_memory_max_allocated_mb"] == 300 / 2**20
    assert answer["components"] == {"t3": 100}
    assert answer["processes"][0]["name"] == "t3"
    assert answer["budget"] == {"bytes": 2**31, "items": {"t3 weights": 100}}


def test_memory_without_a_budget(server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def memory() -> dict[str, object]:
        return {"processes": [], "components": {}, "budget": None, "items": {}}

    monkeypatch.setattr(server.engine, "memory", memory)
    answer = client.get("/memory").json()
    assert answer["budget"] is None
    assert answer["memory_info"]["gpu_memory_allocated_mb"] == 0


@pytest.mark.parametrize("path", ["/config", "/memory"])
def test_they_need_the_key_and_a_running_engine(server: Running, client: httpx.Client, path: str) -> None:
    assert httpx.get(server.url + path).status_code == 401
    server.engine.dead = True
    try:
        assert client.get(path).status_code == 503
    finally:
        server.engine.dead = False
