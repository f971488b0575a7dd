"""The vocoder as a guest of T3's process: the same sound, news of its end, and a way back in."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from chatterbox_vllm.errors import CheckpointError, EngineDead, EngineError
from chatterbox_vllm.vocoder import guest
from chatterbox_vllm.vocoder import host as module
from chatterbox_vllm.vocoder.blueprint import Blueprint
from chatterbox_vllm.vocoder.guest import GuestHost
from chatterbox_vllm.vocoder.stage import Vocoder
from chatterbox_vllm.vocoder.utterance import Chunk, open_utterance
from chatterbox_vllm.vocoder.worker import VocoderPool
from tests.vocoder_support import speech, tensors, voice


@pytest.fixture(scope="module")
def blueprint(tmp_path_factory: pytest.TempPathFactory) -> Blueprint:
    path = tmp_path_factory.mktemp("s3gen") / "s3gen.safetensors"
    save_file(tensors(), path)
    return Blueprint(path)


@pytest.fixture(autouse=True)
def quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)


async def at_home(path: str) -> None:
    """This process plays the engine's."""
    await asyncio.to_thread(guest.serve, path)


def run(scenario: Callable[[VocoderPool], Awaitable[Any]], blueprint: Blueprint, admit: guest.Admit = at_home) -> None:
    async def main() -> None:
        host = GuestHost(blueprint)
        pool = VocoderPool([host])
        pool.start()
        try:
            await pool.read()  # before there is a process to be a guest of
            host.admit(admit)
            await pool.ready()
            await asyncio.wait_for(scenario(pool), 30)
        finally:
            await pool.close(drain=False)

    others = set(threading.enumerate())
    asyncio.run(main())
    for thread in set(threading.enumerate()) - others:
        if thread.name.startswith("vocoder"):
            thread.join(10)
            assert not thread.is_alive()
    assert not logging.getLogger("chatterbox_vllm.vocoder").handlers


def chunk(seed: int) -> Chunk:
    return Chunk(open_utterance(voice(10), seed=seed, diffusion_steps=2), speech(30, seed=seed), final=True)


def test_a_guest_speaks_as_a_vocoder_at_hand(blueprint: Blueprint) -> None:
    own = blueprint.build(blueprint.read())

    async def scenario(pool: VocoderPool) -> None:
        spoken = await asyncio.gather(*(pool.submit(chunk(seed)) for seed in range(3)))
        for seed, samples in enumerate(spoken):
            assert torch.equal(samples, own.advance([chunk(seed)])[0])
        (footprint,) = pool.footprints
        assert sum(footprint.weights.values()) > 0

    run(scenario, blueprint)


def test_a_failed_visit_is_repeated(blueprint: Blueprint) -> None:
    visits = []

    async def admit(path: str) -> None:
        visits.append(path)
        if len(visits) < 3:
            raise EngineError("no room")
        await at_home(path)

    async def scenario(pool: VocoderPool) -> None:
        assert len(await pool.submit(chunk(0)))

    run(scenario, blueprint, admit)
    assert len(visits) == 3


def test_whatever_ends_a_guest_is_told(
    blueprint: Blueprint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    footprint, calls = Vocoder.footprint, count()

    def failing(self: Vocoder) -> Any:
        assert next(calls) != 1, "no count today"  # after the first batch
        return footprint(self)

    monkeypatch.setattr(Vocoder, "footprint", failing)

    async def scenario(pool: VocoderPool) -> None:
        with pytest.raises(EngineError, match="died with this"):
            await pool.submit(chunk(0))
        assert len(await pool.submit(chunk(0)))
        assert pool.stats.restarts == 1

    run(scenario, blueprint)
    assert "no count today" in caplog.text


def test_a_dead_engine_has_no_guests(blueprint: Blueprint) -> None:
    async def admit(path: str) -> None:
        raise EngineDead("the T3 engine has died")

    async def scenario(pool: VocoderPool) -> None:
        raise AssertionError("it was never ready")

    with pytest.raises(EngineError, match="could not be reached: the T3 engine has died"):
        run(scenario, blueprint, admit)


def test_what_is_wrong_with_the_checkpoint_is_told(tmp_path: Path) -> None:
    save_file({"flow.nothing": torch.zeros(1)}, tmp_path / "s3gen.safetensors")

    async def scenario(pool: VocoderPool) -> None:
        raise AssertionError("it was never ready")

    with pytest.raises(CheckpointError, match="flow"):
        run(scenario, Blueprint(tmp_path / "s3gen.safetensors"))
