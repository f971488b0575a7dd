"""The vocoder's thread: what it batches, what an error or a client that leaves does, and how it ends."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest
import torch

from chatterbox_vllm.errors import EngineDead, EngineError
from chatterbox_vllm.vocoder import worker as module
from chatterbox_vllm.vocoder.utterance import Chunk, Utterance
from chatterbox_vllm.vocoder.worker import VocoderWorker, _Job, pick
from tests.vocoder_support import speech, vocoder, voice


class Stub:
    """A vocoder that says how many tokens it got, when it is let."""

    max_frames = 10_000

    def __init__(self) -> None:
        self.batches: list[list[Chunk]] = []
        self.gate = threading.Event()
        self.fail: set[Utterance] = set()
        self.error: Exception = torch.OutOfMemoryError("no memory")
        self.running = threading.Event()

    def advance(self, chunks):
        self.batches.append(list(chunks))
        self.running.set()
        assert self.gate.wait(10)
        if self.fail & {chunk.utterance for chunk in chunks}:
            raise self.error
        for chunk in chunks:
            chunk.utterance.released += 1
        return [torch.full((2,), float(len(chunk.tokens))) for chunk in chunks]


def utterance(*, heard: bool = False) -> Utterance:
    return Utterance(voice(5), seed=0, diffusion_steps=10, released=int(heard))


def chunk(of: Utterance | None = None, count: int = 5, *, final: bool = True) -> Chunk:
    return Chunk(of or utterance(), speech(count), final=final)


def run(scenario, **options):
    """Runs ``scenario(worker, stub)`` with a worker that has not begun its first batch."""

    async def main():
        stub = Stub()
        worker = VocoderWorker(stub, **options)
        worker.start()
        try:
            return await asyncio.wait_for(scenario(worker, stub), 20)
        finally:
            stub.gate.set()
            await worker.close()

    return asyncio.run(main())


async def queued(worker: VocoderWorker, stub: Stub, *chunks: Chunk) -> list[asyncio.Task]:
    """Submits ``chunks`` behind one that occupies the thread; the gate is still shut."""
    first = asyncio.create_task(worker.submit(chunk(count=1)))
    await asyncio.to_thread(stub.running.wait, 10)
    tasks = [asyncio.create_task(worker.submit(each)) for each in chunks]
    await asyncio.sleep(0)
    assert worker.waiting == len(chunks)
    return [first, *tasks]


def test_what_waits_is_one_batch_and_everyone_gets_their_own():
    async def scenario(worker, stub):
        tasks = await queued(worker, stub, *(chunk(count=count) for count in (2, 3, 4)))
        stub.gate.set()
        assert [sound.tolist() for sound in await asyncio.gather(*tasks)] == [[n, n] for n in (1.0, 2.0, 3.0, 4.0)]
        assert [len(batch) for batch in stub.batches] == [1, 3]

    run(scenario)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [({"max_batch": 2}, [1, 2, 2, 1]), ({"max_frames": 45}, [1, 2, 2, 1]), ({"max_frames": 1}, [1] * 6), ({}, [1, 5])],
)
def test_batches_are_bounded(options, sizes):
    async def scenario(worker, stub):
        tasks = await queued(worker, stub, *(chunk() for _ in range(5)))  # 20 frames each
        stub.gate.set()
        await asyncio.gather(*tasks)
        assert [len(batch) for batch in stub.batches] == sizes

    run(scenario, **options)


def test_first_chunks_go_first_and_an_utterance_keeps_its_order():
    async def scenario(worker, stub):
        old, new = utterance(heard=True), utterance()
        chunks = [chunk(old, 2), chunk(new, 3, final=False), chunk(new, 4), chunk(old, 5)]
        tasks = await queued(worker, stub, *chunks)
        stub.gate.set()
        await asyncio.gather(*tasks)
        assert [[len(each.tokens) for each in batch] for batch in stub.batches] == [[1], [3, 2], [4, 5]]

    run(scenario)


def test_a_stream_that_sounds_is_not_starved():
    """Whole files and the first chunks of new streams keep coming; what waits long enough goes before them."""
    old, new = utterance(heard=True), utterance()
    jobs = [
        _Job(chunk(old, 1, final=False), SimpleNamespace(), came=10.0),
        _Job(chunk(count=2), SimpleNamespace(), came=9.9),  # a whole file
        _Job(chunk(new, 3, final=False), SimpleNamespace(), came=10.4),
        _Job(chunk(count=4), SimpleNamespace(), came=10.1),
        _Job(chunk(utterance(), 5, final=False), SimpleNamespace(), came=10.6),
        _Job(chunk(new, 6), SimpleNamespace(), came=10.45),
    ]
    picked = pick(jobs, max_batch=5, max_frames=10_000)
    assert [len(job.chunk.tokens) for job in picked] == [2, 3, 1, 4, 5]


def test_a_lost_device_ends_the_thread():
    async def scenario(worker, stub):
        bad = utterance()
        stub.fail, stub.error = {bad}, torch.AcceleratorError("device-side assert triggered")
        tasks = await queued(worker, stub, chunk(bad), chunk(bad, 3))
        assert worker.is_alive
        stub.gate.set()
        first, failed, waiting = await asyncio.gather(*tasks, return_exceptions=True)
        assert first.tolist() == [1.0, 1.0]
        assert [type(failed), type(waiting)] == [EngineError, EngineDead]
        assert not worker.is_alive
        with pytest.raises(EngineDead):
            await worker.submit(chunk())

    run(scenario)


def test_an_error_fails_its_batch_only():
    async def scenario(worker, stub):
        bad = utterance()
        stub.fail = {bad}
        tasks = await queued(worker, stub, chunk(bad), chunk())
        stub.gate.set()
        first, *others = await asyncio.gather(*tasks, return_exceptions=True)
        assert first.tolist() == [1.0, 1.0]
        assert [type(error) for error in others] == [EngineError, EngineError]
        assert all("no memory" in str(error) and error.__cause__ is stub.error for error in others)
        assert (await worker.submit(chunk(count=7))).tolist() == [7.0, 7.0]

    run(scenario)


def test_who_leaves_is_not_spoken_to():
    async def scenario(worker, stub):
        tasks = await queued(worker, stub, chunk(count=2), chunk(count=3))
        tasks[0].cancel()  # in work: its answer is dropped
        tasks[1].cancel()
        await asyncio.sleep(0)
        stub.gate.set()
        assert (await tasks[2]).tolist() == [3.0, 3.0]
        assert [[len(each.tokens) for each in batch] for batch in stub.batches] == [[1], [3]]
        assert worker.waiting == 0

    run(scenario)


def test_the_queue_is_bounded():
    async def scenario(worker, stub):
        tasks = await queued(worker, stub, chunk(count=2))
        late = asyncio.create_task(worker.submit(chunk(count=3)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert worker.waiting == 1
        stub.gate.set()
        assert (await late).tolist() == [3.0, 3.0]
        await asyncio.gather(*tasks)

    run(scenario, max_waiting=2)


def test_company_is_waited_for():
    async def scenario(worker, stub):
        stub.gate.set()
        tasks = [asyncio.create_task(worker.submit(chunk(count=1)))]
        await asyncio.sleep(0.02)
        tasks += [asyncio.create_task(worker.submit(chunk(count=count))) for count in (2, 3)]
        await asyncio.gather(*tasks)
        assert [len(batch) for batch in stub.batches] == [3]

    run(scenario, max_wait=10.0, max_batch=3)


@pytest.mark.parametrize("drain", [True, False])
def test_closing_drains_or_refuses(drain):
    async def scenario(worker, stub):
        tasks = await queued(worker, stub, chunk(count=2))
        closing = asyncio.create_task(worker.close(drain=drain))
        await asyncio.sleep(0.01)
        stub.gate.set()
        await closing
        running, waiting = await asyncio.gather(*tasks, return_exceptions=True)
        assert running.tolist() == [1.0, 1.0]
        assert waiting.tolist() == [2.0, 2.0] if drain else isinstance(waiting, EngineDead)
        assert not worker.is_alive
        with pytest.raises(EngineDead):
            await worker.submit(chunk())
        await worker.close()

    run(scenario)


def test_a_worker_that_was_not_started_says_so():
    async def main():
        worker = VocoderWorker(Stub())
        with pytest.raises(EngineDead):
            await worker.submit(chunk())
        await worker.close()

    asyncio.run(main())


def test_a_thread_that_dies_leaves_nobody_waiting(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    async def scenario(worker, stub):
        tasks = await queued(worker, stub, chunk(count=2))
        monkeypatch.setattr(module, "pick", SimpleNamespace())  # not callable
        stub.gate.set()
        running, waiting = await asyncio.gather(*tasks, return_exceptions=True)
        assert running.tolist() == [1.0, 1.0]
        assert isinstance(waiting, EngineDead)
        assert not worker.is_alive

    run(scenario)


def test_an_idle_thread_sleeps():
    async def scenario(worker, stub):
        stub.gate.set()
        await worker.submit(chunk())
        wakes = []
        wait = worker._changed.wait
        worker._changed.wait = lambda timeout=None: (wakes.append(timeout), wait(timeout))[1]
        await worker.submit(chunk())
        await asyncio.sleep(0.1)
        assert wakes in ([None], [])  # one sleep without an end

    run(scenario)


def test_many_streams_through_a_real_vocoder():
    own = vocoder()
    tokens, names = [speech(20 + seed, seed=seed) for seed in range(4)], range(4)

    def opened(seed):
        return own.open(voice(10), seed=seed, diffusion_steps=2)

    expected = []
    for seed in names:
        of = opened(seed)
        parts = [own.advance([Chunk(of, part, final=last)])[0] for part, last in _parts(tokens[seed])]
        expected.append(torch.cat(parts))

    async def stream(worker, seed):
        of = opened(seed)
        return torch.cat([await worker.submit(Chunk(of, part, final=last)) for part, last in _parts(tokens[seed])])

    async def main():
        worker = VocoderWorker(own)
        worker.start()
        try:
            return await asyncio.gather(*(stream(worker, seed) for seed in names))
        finally:
            await worker.close()

    for seed, samples in zip(names, asyncio.run(main()), strict=True):
        assert len(samples) == 960 * len(tokens[seed])
        assert torch.equal(samples, expected[seed])


def _parts(tokens):
    return [(tokens[:15], False), (tokens[15:], True)]
