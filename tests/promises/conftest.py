"""What stands in for an engine, and what is loaded once for all of these tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_vllm import checkpoint, sources
from chatterbox_vllm.api import app
from chatterbox_vllm.checkpoint import Checkpoint
from chatterbox_vllm.errors import EngineError
from chatterbox_vllm.settings import Settings, variables
from tests.memory_support import Headers, full_headers
from tests.promises.support import Started

if TYPE_CHECKING:
    from chatterbox_vllm.tts import ChatterboxTTS


@pytest.fixture
def started(demo: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Started:
    """The hub holds the demo checkpoint; both stages are written down instead of being loaded."""
    from chatterbox_vllm import engine, loading

    seen = Started([])

    def blueprint(path: Path, **options: Any) -> Any:
        seen.attempts.append(options)
        return real(path, **options)

    def launch(weights: Path, **options: Any) -> Any:
        seen.last.update(options)
        raise EngineError("there is no T3 in this test")

    real = loading.Blueprint
    monkeypatch.setattr(checkpoint, "download", lambda *_, **__: demo)
    monkeypatch.setattr(engine, "_warm_up", lambda *_: None)
    monkeypatch.setattr(loading, "Blueprint", blueprint)
    monkeypatch.setattr(loading, "launch", launch)
    return seen


@pytest.fixture(scope="package")
def full(tmp_path_factory: pytest.TempPathFactory) -> Headers:
    """A full-size English checkpoint of headers."""
    return full_headers(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="package")
def int8(demo: Checkpoint, cache: Path) -> Iterator[ChatterboxTTS]:
    """What a CPU can quantise, really loaded."""
    from chatterbox_vllm.tts import ChatterboxTTS

    with ChatterboxTTS.from_local(demo, use_int8_quantization=True, max_model_len=512, max_batch_size=4) as made:
        yield made


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Settings]:
    """What ``serve`` would run with; no .env and no variables of the developer's, and a GPU for the presets."""
    monkeypatch.chdir(tmp_path)
    for variable in (each for name in Settings.model_fields for each in variables(name)):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sources, "_has_nvidia_gpu", lambda: True)
    seen: list[Settings] = []
    monkeypatch.setattr(app, "serve", seen.append)
    return seen
