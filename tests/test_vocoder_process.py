"""The vocoder in a process of its own: the same sound, and what a crash, a lost device or the server's death does."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from chatterbox_vllm import loading
from chatterbox_vllm.checkpoint import Checkpoint
from chatterbox_vllm.engine import AsyncChatterbox, Health
from chatterbox_vllm.errors import CheckpointError, ConfigurationError, EngineDead, EngineError
from chatterbox_vllm.tts import ChatterboxTTS
from chatterbox_vllm.vocoder import host as module
from chatterbox_vllm.vocoder import worker
from chatterbox_vllm.vocoder.blueprint import Blueprint, best_dtype
from chatterbox_vllm.vocoder.host import ProcessHost, ThreadHost
from chatterbox_vllm.vocoder.stage import Vocoder
from chatterbox_vllm.vocoder.utterance import Chunk, open_utterance
from chatterbox_vllm.vocoder.wire import VOICES, Begun, Channel, Latest, framed
from chatterbox_vllm.vocoder.worker import GONE, RESTARTING, VocoderPool
from tests.fake_engine import wait_for
from tests.vocoder_support import Order, Scripted, held, speech, tensors, told, voice

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("s3gen") / "s3gen.safetensors"
    save_file(tensors(), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "running")
    os.mkfifo(tmp_path / "gate")
    return tmp_path


@pytest.fixture(autouse=True)
def quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)


def run(scenario: Callable[..., Awaitable[Any]], *blueprints: Blueprint) -> Any:
    """Runs ``scenario(pool, hosts)`` with a process for each blueprint, none of which outlives it."""

    async def main() -> Any:
        hosts = [ProcessHost(blueprint) for blueprint in blueprints]
        pool = VocoderPool(hosts)
        pool.start()
        try:
            await pool.read()
            await pool.ready()
            return await asyncio.wait_for(scenario(pool, hosts), 60)
        finally:
            await pool.close(drain=False)
            assert not any(host.pid and psutil.pid_exists(host.pid) for host in hosts)

    return asyncio.run(main())


def kill(host: ProcessHost) -> None:
    assert host.pid is not None
    os.kill(host.pid, signal.SIGKILL)


def parts(tokens: Tensor) -> list[tuple[Tensor, bool]]:
    return [(tokens[:20], False), (tokens[20:34], False), (tokens[34:35], False), (tokens[35:], True)]


def alone(own: Vocoder, seed: int) -> Tensor:
    """What one of the streams below is, spoken by a vocoder at hand."""
    of = own.open(voice(10 + seed, seed=seed), seed=seed, diffusion_steps=2)
    return torch.cat([own.advance([Chunk(of, *part)])[0] for part in parts(speech(40 + seed, seed=seed))])


async def stream(pool: VocoderPool, seed: int) -> Tensor:
    of = open_utterance(voice(10 + seed, seed=seed), seed=seed, diffusion_steps=2)
    return torch.cat([await pool.submit(Chunk(of, *part)) for part in parts(speech(40 + seed, seed=seed))])


def test_it_sounds_as_in_this_process(checkpoint: Path) -> None:
    async def scenario(pool: VocoderPool, _: Any) -> list[Tensor]:
        return await asyncio.gather(*(stream(pool, seed) for seed in range(4)))

    own = Vocoder.from_checkpoint(checkpoint)
    for seed, samples in enumerate(run(scenario, Blueprint(checkpoint))):
        assert len(samples) == 960 * (40 + seed)
        assert torch.equal(samples, alone(own, seed))


def test_a_crash_fails_its_batch_only(checkpoint: Path, folder: Path) -> None:
    """Streams in mid-flight and what waits go on in the next process, and sound as if nothing had been."""

    async def scenario(pool: VocoderPool, hosts: list[ProcessHost]) -> list[Tensor]:
        of = open_utterance(voice(10), seed=0, diffusion_steps=2)
        first, *later = parts(speech(40))
        begun = [await pool.submit(Chunk(of, *first))]
        running = await held(pool, folder)
        others = [asyncio.create_task(stream(pool, seed)) for seed in (1, 2)]
        next_one = asyncio.create_task(pool.submit(Chunk(of, *later[0])))
        await asyncio.sleep(0)
        kill(hosts[0])
        with pytest.raises(EngineError, match=r"died with this, try again: .* killed by SIGKILL"):
            await running
        assert (pool.trouble, pool.is_alive) == (RESTARTING, True)
        begun += [await next_one] + [await pool.submit(Chunk(of, *part)) for part in later[1:]]
        assert pool.trouble is None
        sounds = await asyncio.gather(*others)
        assert (pool.stats.failures, pool.stats.restarts, pool.stats.waiting) == (1, 1, 0)
        return [torch.cat(begun), *sounds]

    own = Vocoder.from_checkpoint(checkpoint)
    sounds = run(scenario, Scripted(checkpoint, folder=folder))
    assert [torch.equal(samples, alone(own, seed)) for seed, samples in enumerate(sounds)] == [True] * 3


def test_a_lost_device_fails_its_batch_and_a_new_process_comes(folder: Path) -> None:
    async def scenario(pool: VocoderPool, hosts: list[ProcessHost]) -> None:
        (before,) = {host.pid for host in hosts}
        bad, good = (
            asyncio.create_task(pool.submit(told(order, due=order))) for order in (Order.LOSE_DEVICE, Order.TELL_PID)
        )
        with pytest.raises(EngineError, match="illegal memory access"):
            await bad
        assert (await good)[0].item() == hosts[0].pid != before
        assert (pool.stats.failures, pool.stats.restarts) == (1, 1)

    run(scenario, Scripted(folder=folder))


def test_what_crashes_every_process_is_given_up_before_they_are(folder: Path) -> None:
    async def scenario(pool: VocoderPool, _: Any) -> None:
        with pytest.raises(EngineError, match="with exit code 3"):
            await pool.submit(told(Order.CRASH))
        assert pool.trouble == RESTARTING
        assert (await pool.submit(told(Order.COUNT)))[0].item() == 0

    run(scenario, Scripted(folder=folder))


def test_its_collector_leaves_out_what_is_loaded(folder: Path) -> None:
    """Torch's modules alone are more than 100,000 objects; to look through them stops all streams."""

    async def scenario(pool: VocoderPool, _: Any) -> float:
        return float((await pool.submit(told(Order.TELL_KEPT)))[0])

    assert run(scenario, Scripted(folder=folder)) > 100_000


def test_a_process_that_cannot_start_again_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STARTS", 2)

    async def scenario(pool: VocoderPool, hosts: list[ProcessHost]) -> None:
        running = await held(pool, folder)
        waiting = asyncio.create_task(pool.submit(told(Order.COUNT)))
        await asyncio.sleep(0)
        kill(hosts[0])
        ends = await asyncio.gather(running, waiting, return_exceptions=True)
        assert [type(end) for end in ends] == [EngineError, EngineDead]
        assert (pool.trouble, pool.is_alive) == (GONE, False)

    run(scenario, Scripted(folder=folder, starts=1))


def test_a_process_that_cannot_start_at_all_says_how_it_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STARTS", 2)
    with pytest.raises(EngineError, match="with exit code 7"):
        run(lambda *_: asyncio.sleep(0), Scripted(folder=folder, starts=0))
    assert (folder / "starts").read_text() == "xx"


def no_descriptors() -> None:
    raise OSError(errno.EMFILE, "Too many open files")


def test_a_want_of_descriptors_may_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(pool: VocoderPool, hosts: list[ProcessHost]) -> None:
        with monkeypatch.context() as scarce:
            scarce.setattr(socket, "socketpair", no_descriptors)
            kill(hosts[0])
            while pool.stats.restarts < 2:  # noqa: ASYNC110  # at which it has been tried again
                await asyncio.sleep(0)
        assert pool.trouble == RESTARTING
        assert (await pool.submit(told(Order.COUNT)))[0].item() == 0

    run(scenario, Scripted(folder=folder))


def test_a_want_of_descriptors_may_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(socket, "socketpair", no_descriptors)
        pool = VocoderPool([ProcessHost(Scripted(folder=folder))])
        pool.start()
        with pytest.raises(EngineError, match="Too many open files"):
            await asyncio.wait_for(pool.read(), 10)
        assert pool.trouble == GONE

    asyncio.run(main())


def test_a_process_that_talks_nonsense_is_started_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    garbled: list[Begun] = []

    async def received(*arguments: Any) -> Any:
        news = await read(*arguments)
        if isinstance(news, Begun) and not garbled:
            garbled.append(news)
            raise pickle.UnpicklingError("invalid load key")
        return news

    read = module.received
    monkeypatch.setattr(module, "received", received)

    async def scenario(pool: VocoderPool, _: Any) -> None:
        assert (await pool.submit(told(Order.COUNT)))[0].item() == 0
        assert pool.stats.restarts == 1

    run(scenario, Scripted(folder=folder))
    assert "failed: UnpicklingError: invalid load key; starting it again" in caplog.text


def test_a_process_that_is_long_in_ending_gets_no_more_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "import os, time; os._exit = lambda code: time.sleep(60); "
    monkeypatch.setattr(module, "_PROGRAM", slow + module._PROGRAM)
    monkeypatch.setattr(module, "GRACE", 60.0)
    monkeypatch.setattr(module, "_LAST_WORDS", 0.05)

    async def scenario(pool: VocoderPool, hosts: list[ProcessHost]) -> None:
        with pytest.raises(EngineError, match="illegal memory access"):
            await pool.submit(told(Order.LOSE_DEVICE))
        async with asyncio.timeout(10):
            while pool.trouble != RESTARTING:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert hosts[0].pid is not None
        assert psutil.pid_exists(hosts[0].pid)
        monkeypatch.setattr(module, "GRACE", 0.1)

    run(scenario, Scripted(folder=folder))


def test_a_wrong_checkpoint_is_named(checkpoint: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "s3gen.safetensors"
    save_file({key: tensor for key, tensor in tensors().items() if "encoder_proj.bias" not in key}, wrong)
    with pytest.raises(CheckpointError) as here:
        Blueprint(wrong).read()
    with pytest.raises(CheckpointError) as there:
        run(lambda *_: asyncio.sleep(0), Blueprint(wrong))
    assert str(there.value) == str(here.value)


def test_who_leaves_is_not_spoken_to(folder: Path) -> None:
    async def scenario(pool: VocoderPool, _: Any) -> None:
        running = await held(pool, folder)
        left, kept = (asyncio.create_task(pool.submit(told(Order.COUNT, due=due))) for due in (1.0, 2.0))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        assert pool.waiting == 1
        await asyncio.to_thread((folder / "gate").write_bytes, b"")
        assert [samples[0].item() for samples in (await running, await kept)] == [0, 1]

    run(scenario, Scripted(folder=folder))


def test_two_processes_share_the_work(folder: Path) -> None:
    async def scenario(pool: VocoderPool, hosts: list[ProcessHost]) -> None:
        sounds = await asyncio.gather(*(pool.submit(told(Order.TELL_PID)) for _ in range(6)))
        pids = sorted(int(samples[0].item()) for samples in sounds)
        assert pids == sorted([host.pid for host in hosts] * 3)
        assert pool.stats.chunks == 6

    run(scenario, Scripted(folder=folder), Scripted(folder=folder))


def test_signals_are_for_the_server_and_logs_are_the_server_s(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "chatterbox_vllm")

    async def scenario(pool: VocoderPool, hosts: list[ProcessHost]) -> None:
        process = psutil.Process(hosts[0].pid)
        for number in (signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
        await pool.submit(told(Order.LOG))
        assert (await pool.submit(told(Order.TELL_PID)))[0].item() == process.pid
        assert process.name() == "vocoder cpu"

    run(scenario, Scripted(folder=folder))
    assert [record.getMessage() for record in caplog.records if record.name == "chatterbox_vllm.test"] == ["1 steps"]


def test_a_process_that_hangs_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 0.1)

    async def scenario(pool: VocoderPool, hosts: list[ProcessHost]) -> None:
        assert hosts[0].pid is not None
        os.kill(hosts[0].pid, signal.SIGSTOP)
        waiting = asyncio.create_task(pool.submit(told(Order.COUNT)))
        await asyncio.sleep(0)
        await pool.close(drain=False)
        with pytest.raises(EngineDead):
            await waiting

    run(scenario, Scripted(folder=folder))


def test_the_work_of_a_process_that_hangs_is_done_by_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_ON_CPU", 0.5)
    monkeypatch.setattr(worker, "TICK", 0.05)

    async def scenario(pool: VocoderPool, hosts: list[ProcessHost]) -> None:
        assert hosts[0].pid is not None
        os.kill(hosts[0].pid, signal.SIGSTOP)
        await asyncio.gather(*(pool.submit(told(Order.COUNT)) for _ in range(4)))
        assert pool.stats.restarts == 1

    run(scenario, Scripted(folder=folder), Scripted(folder=folder))


def test_only_what_a_vocoder_reads_is_sent() -> None:
    """The voice's features for T3, and the mel that is no context any more, stay where they are."""
    of, voices = open_utterance(voice(10), seed=0), Latest()
    of.mel, of.released = torch.zeros(5000, 80), 4985
    assert 4 * 20 * 80 < sum(map(len, framed(of, voices))) < 4 * 20 * 80 + 4000
    assert sum(map(len, framed(of, voices))) < 500, "a voice is sent once"


def test_both_ends_of_a_channel_know_the_same_voices() -> None:
    ours, theirs = map(Channel, socket.socketpair())
    voices = [voice(2, seed=seed) for seed in range(VOICES + 2)]
    order = [*range(VOICES + 2), 1, 2, VOICES, 0, 3, 2]
    for place in order:
        ours.send(voices[place])
    received = [theirs.receive() for _ in order]
    assert [each.digest for each in received] == [voices[place].digest for place in order]
    assert all(
        torch.equal(each.prompt_mel, voices[place].prompt_mel) for each, place in zip(received, order, strict=True)
    )
    assert received[-5] is received[-1] is not received[2]
    ours.close()
    with pytest.raises(EOFError):
        theirs.receive()
    theirs.close()


SCRIPT = """
import asyncio, sys, torch
from pathlib import Path
from chatterbox_vllm.vocoder.host import ProcessHost
from chatterbox_vllm.vocoder.worker import VocoderPool
from tests.vocoder_support import Order, Scripted, held, told

async def main():
    hosts = [ProcessHost(Scripted(folder=Path(sys.argv[1]))) for _ in range(2)]
    closed, left = pools = [VocoderPool([host]) for host in hosts]
    for pool in pools:
        pool.start()
    await asyncio.gather(*(pool.ready() for pool in pools))
    print(*(host.pid for host in hosts), flush=True)
    if sys.argv[2] == "killed":
        await asyncio.gather(*(held(pool, Path(sys.argv[1])) for pool in pools))
        print("held", flush=True)
        await asyncio.Event().wait()
    await closed.submit(told(Order.COUNT))
    await left.submit(told(Order.COUNT))
    await closed.close()

asyncio.run(main())
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """It has no ``if __name__ == "__main__"``."""
    path = tmp_path / "speak.py"
    path.write_text(SCRIPT)
    return path


def test_a_killed_server_leaves_no_process(script: Path, folder: Path) -> None:
    """Not even in the middle of a batch."""
    command, environment = [sys.executable, str(script), str(folder), "killed"], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        pids = server.stdout.readline().split()
        assert server.stdout.readline() == "held\n"
        assert all(map(is_running, pids))
        server.kill()
    wait_for(lambda: not any(map(is_running, pids)))


def test_the_program_s_end_is_quiet(script: Path, folder: Path) -> None:
    """Whether it closes its pool or not."""
    command, environment = [sys.executable, str(script), str(folder), "ended"], {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert (ended.stderr, ended.returncode) == ("", 0)
    pids = ended.stdout.split()
    assert len(pids) == 2, "the script has not run again in them"
    wait_for(lambda: not any(map(is_running, pids)))


def is_running(pid: str) -> bool:
    """A zombie is not: that its parent in the end, a container's first process, may not look after it is no matter."""
    try:
        return bool(psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# --- the engine ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"vocoder_device": "cpu,cpu", "vocoder_process": False}, "vocoder_process=False .* vocoder_device='cpu,cpu'"),
        ({"vocoder_device": "cpu,cuda:99"}, "vocoder_device must be cpu.*, not 'cuda:99'"),
        ({"vocoder_device": ""}, "vocoder_device must be cpu"),
        ({"vocoder_device": "cuda:"}, "vocoder_device must be cpu.*, not 'cuda:'"),
        ({"vocoder_device": "cuda:00"}, "vocoder_device must be cpu.*, not 'cuda:00'"),
        ({"vocoder_dtype": "float8"}, "vocoder_dtype must be one of auto, float32, .*, not 'float8'"),
    ],
)
def test_a_bad_engine_argument_is_named(demo: Checkpoint, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{said}") as refusal:
        asyncio.run(AsyncChatterbox.start(demo, **arguments))
    assert said.startswith(str(refusal.value.param))


def test_a_card_has_one_worker(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget counts it once."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigurationError, match=r"^vocoder_device='cuda,cuda:0' names cuda:0 twice") as refusal:
        asyncio.run(AsyncChatterbox.start(demo, vocoder_device="cuda,cuda:0"))
    assert refusal.value.param == "vocoder_device"


@pytest.mark.parametrize(
    ("arguments", "devices", "kind"),
    [
        ({}, ["cpu"], ThreadHost),
        ({"vocoder_process": True}, ["cpu"], ProcessHost),
        ({"vocoder_device": " cpu, cpu"}, ["cpu", "cpu"], ProcessHost),
        ({"vocoder_device": "cuda:1"}, ["cuda:1"], ProcessHost),
        ({"vocoder_device": "cuda:1", "vocoder_process": False}, ["cuda:1"], ThreadHost),
    ],
)
def test_where_the_vocoder_runs(
    demo: Checkpoint, arguments: dict[str, Any], devices: list[str], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked: list[Any] = []

    def refuse(hosts: list[Any]) -> None:
        asked.extend(hosts)
        raise EngineError("enough is known")

    monkeypatch.setattr(loading, "VocoderPool", refuse)
    with pytest.raises(EngineError, match="enough"):
        asyncio.run(AsyncChatterbox.start(demo, watermark=False, vocoder_dtype="bfloat16", **arguments))
    assert [type(host) for host in asked] == [kind] * len(devices)
    assert [host._blueprint for host in asked] == [Blueprint(demo.s3gen, each, torch.bfloat16) for each in devices]


@pytest.mark.parametrize(
    ("device", "capability", "best"),
    [("cpu", None, torch.float32), ("cuda", (8, 0), torch.bfloat16), ("cuda", (7, 5), torch.float16)],
)
def test_the_best_dtype(device: str, capability: Any, best: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert best_dtype(torch.device(device)) == best


def test_an_engine_outlives_its_vocoder_s_process(demo: Checkpoint, cache: Path) -> None:
    with ChatterboxTTS.from_local(demo, max_model_len=512, max_batch_size=4, vocoder_process=True) as model:
        built_in, own = model._engine, Vocoder.from_checkpoint(demo.s3gen)
        expected = own.synthesize(speech(30), built_in.voices.get(None), seed=3)
        assert torch.equal(model.synthesize(speech(30), seed=3)[0], expected)
        kill(built_in._worker._hosts[0])
        wait_for(lambda: built_in.health() == Health(live=True, ready=False, reason=RESTARTING, active=0))
        with pytest.raises(EngineDead, match=RESTARTING):
            model.synthesize(speech(30), seed=3)
        wait_for(lambda: built_in.health().ready, seconds=60)
        assert torch.equal(model.synthesize(speech(30), seed=3)[0], expected)
        assert (built_in.vocoder_stats.chunks, built_in.vocoder_stats.restarts) == (2, 1)
