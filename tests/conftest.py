"""Fixtures that several files share: those dear to make, checkpoints and one running engine, and simulated time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Read when vLLM and torch are imported, so before any test is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The networks here are tiny: more threads only get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On a CPU: the engine's one worker lives in the engine's process.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

if TYPE_CHECKING:
    from chatterbox_vllm.checkpoint import Checkpoint
    from chatterbox_vllm.tts import ChatterboxTTS
    from tests.streaming_support import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of streams that are simulated."""
    from tests.streaming_support import simulated_clock

    return simulated_clock(monkeypatch)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny English demo checkpoint."""
    from chatterbox_vllm.demo_checkpoint import write_demo

    return write_demo(tmp_path_factory.mktemp("demo") / "english")


@pytest.fixture(scope="session")
def multilingual_demo(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny multilingual demo checkpoint."""
    from chatterbox_vllm.checkpoint import Variant
    from chatterbox_vllm.demo_checkpoint import write_demo

    return write_demo(tmp_path_factory.mktemp("demo") / "multilingual", variant=Variant.MULTILINGUAL)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of this test run's own, also for the programs that tests start."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("CHATTERBOX_CACHE_DIR")
    os.environ["CHATTERBOX_CACHE_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["CHATTERBOX_CACHE_DIR"]
    else:
        os.environ["CHATTERBOX_CACHE_DIR"] = before


@pytest.fixture(scope="session")
def model(demo: Checkpoint, cache: Path) -> Iterator[ChatterboxTTS]:
    """The Python API over the one engine that tests share: the demo checkpoint on this machine."""
    from chatterbox_vllm.tts import ChatterboxTTS

    with ChatterboxTTS.from_local(demo, max_model_len=1024, max_batch_size=32) as made:
        yield made
