"""The vocoder's pool over threads: what is batched, what an error or a client that leaves does, and how it ends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch

from chatterbox_vllm.errors import CheckpointError, EngineDead, EngineError
from chatterbox_vllm.vocoder import service, worker
from chatterbox_vllm.vocoder.footprint import VocoderFootprint
from chatterbox_vllm.vocoder.host import ThreadHost
from chatterbox_vllm.vocoder.utterance import Chunk
from chatterbox_vllm.vocoder.wire import Begun, Ended, Limits, Order, Read, Ready, Speak, Tell
from chatterbox_vllm.vocoder.worker import GONE, HANGING, VocoderPool, VocoderStats
from tests.vocoder_support import At, Stub, chunk, speech, utterance, vocoder, voice


def heard(samples: torch.Tensor) -> float:
    """What all of a stub's samples are."""
    assert len(samples)
    assert (samples == samples[0]).all()
    return samples[0].item()


def run(scenario, *, max_waiting: int = 1024, **limits):
    """Runs ``scenario(pool, stub)`` with a worker that has not begun its first batch."""

    async def main():
        stub = Stub()
        pool = VocoderPool([ThreadHost(At(stub), Limits(**limits))], max_waiting=max_waiting)
        pool.start()
        await pool.ready()
        try:
            return await asyncio.wait_for(scenario(pool, stub), 20)
        finally:
            stub.gate.set()
            await pool.close()

    return asyncio.run(main())


async def queued(pool: VocoderPool, stub: Stub, *chunks: Chunk) -> list[asyncio.Task]:
    """Submits ``chunks`` behind one that occupies the thread; the gate is still shut."""
    first = asyncio.create_task(pool.submit(chunk(count=1)))
    await asyncio.to_thread(stub.running.wait, 10)
    tasks = [asyncio.create_task(pool.submit(each)) for each in chunks]
    await asyncio.sleep(0)
    assert pool.waiting == len(chunks)
    return [first, *tasks]


def test_what_waits_is_one_batch_and_everyone_gets_their_own():
    async def scenario(pool, stub):
        tasks = await queued(pool, stub, *(chunk(count=count) for count in (2, 3, 4)))
        stub.gate.set()
        assert [heard(samples) for samples in await asyncio.gather(*tasks)] == [1, 2, 3, 4]
        assert stub.sizes == [[1], [2, 3, 4]]

    run(scenario)


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [({"max_batch": 2}, [1, 2, 2, 1]), ({"max_frames": 45}, [1, 2, 2, 1]), ({"max_frames": 1}, [1] * 6), ({}, [1, 5])],
)
def test_batches_are_bounded(limits, sizes):
    async def scenario(pool, stub):
        tasks = await queued(pool, stub, *(chunk() for _ in range(5)))  # 20 frames each
        stub.gate.set()
        await asyncio.gather(*tasks)
        assert [len(batch) for batch in stub.batches] == sizes

    run(scenario, **limits)


def test_chunks_are_spoken_as_they_are_due():
    async def scenario(pool, stub):
        tasks = await queued(pool, stub, chunk(count=2, due=3.0), chunk(count=3, due=1.0), chunk(count=4, due=2.0))
        stub.gate.set()
        await asyncio.gather(*tasks)
        assert stub.sizes == [[1], [3], [4], [2]]

    run(scenario, max_batch=1)


def test_an_utterance_s_chunks_come_one_after_the_other():
    async def scenario(pool, stub):
        of = utterance()
        first, second = await queued(pool, stub, chunk(of, 20, final=False))
        with pytest.raises(ValueError, match="not answered yet"):
            await pool.submit(chunk(of))
        stub.gate.set()
        await asyncio.gather(first, second)
        assert (of.released, len(of.tokens), of.finished) == (14, 20, False)
        assert heard(await pool.submit(chunk(of, 10))) == 30
        assert (of.released, len(of.mel), of.finished) == (60, 60, True)
        with pytest.raises(ValueError, match="final"):
            await pool.submit(chunk(of))

    run(scenario)


def test_what_says_nothing_does_not_wait():
    async def scenario(pool, stub):
        of = utterance()
        assert len(await pool.submit(chunk(of, 13, final=False))) == 0
        assert (len(of.tokens), stub.batches) == (13, [])

    run(scenario)


def test_a_lost_device_ends_the_thread():
    async def scenario(pool, stub):
        bad = utterance()
        stub.fail, stub.error = {bad}, torch.AcceleratorError("device-side assert triggered")
        tasks = await queued(pool, stub, chunk(bad, due=0.0), chunk(count=3, due=1.0))
        assert pool.trouble is None
        stub.gate.set()
        first, failed, waiting = await asyncio.gather(*tasks, return_exceptions=True)
        assert heard(first) == 1.0
        assert [type(failed), type(waiting)] == [EngineError, EngineDead]
        assert (pool.is_alive, pool.trouble) == (False, GONE)
        with pytest.raises(EngineDead):
            await pool.submit(chunk())

    run(scenario, max_batch=1)


def test_an_error_fails_its_batch_only():
    async def scenario(pool, stub):
        bad = utterance()
        stub.fail = {bad}
        tasks = await queued(pool, stub, chunk(bad), chunk())
        stub.gate.set()
        first, *others = await asyncio.gather(*tasks, return_exceptions=True)
        assert heard(first) == 1.0
        assert [type(error) for error in others] == [EngineError, EngineError]
        assert all("no memory" in str(error) for error in others)
        assert (bad.released, len(bad.tokens)) == (0, 0)
        stub.fail = set()
        assert heard(await pool.submit(chunk(bad, 7))) == 7.0

    run(scenario)


def test_what_is_no_number_is_an_error_and_not_silence():
    async def scenario(pool, stub):
        bad = utterance()
        stub.nonsense = {bad}
        tasks = await queued(pool, stub, chunk(bad), chunk(count=3))
        stub.gate.set()
        _, error, other = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(error, EngineError)
        assert "not numbers" in str(error)
        assert heard(other) == 3.0
        assert (bad.released, len(bad.tokens), bad.mel) == (0, 0, None)
        assert pool.is_alive

    run(scenario)


def test_who_leaves_is_not_spoken_to():
    async def scenario(pool, stub):
        tasks = await queued(pool, stub, chunk(count=2), chunk(count=3))
        tasks[0].cancel()  # in work: its answer is dropped
        tasks[1].cancel()
        await asyncio.sleep(0)
        stub.gate.set()
        assert heard(await tasks[2]) == 3.0
        assert stub.sizes == [[1], [3]]
        assert (pool.waiting, len(pool._speaking)) == (0, 0)

    run(scenario)


def test_the_queue_is_bounded():
    async def scenario(pool, stub):
        tasks = await queued(pool, stub, chunk(count=2))
        late = asyncio.create_task(pool.submit(chunk(count=3)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert pool.waiting == 1
        stub.gate.set()
        assert heard(await late) == 3.0
        await asyncio.gather(*tasks)

    run(scenario, max_waiting=2)


def test_company_is_waited_for():
    async def scenario(pool, stub):
        stub.gate.set()
        tasks = [asyncio.create_task(pool.submit(chunk(count=1)))]
        await asyncio.sleep(0.02)
        tasks += [asyncio.create_task(pool.submit(chunk(count=count))) for count in (2, 3)]
        await asyncio.gather(*tasks)
        assert [len(batch) for batch in stub.batches] == [3]

    run(scenario, max_wait=10.0, max_batch=3)


def test_what_was_done_is_counted():
    async def scenario(pool, stub):
        tasks = await queued(pool, stub, chunk(count=2), chunk(count=3))
        assert pool.stats == VocoderStats(waiting=2)
        stub.gate.set()
        await asyncio.gather(*tasks)
        stub.fail = {bad := utterance()}
        with pytest.raises(EngineError):
            await pool.submit(chunk(bad))
        stats = pool.stats
        assert (stats.batches, stats.chunks, stats.failures, stats.restarts, stats.waiting) == (2, 3, 1, 0, 0)
        assert stats.frames == 2 * (3 * 5 + 1 + 2 + 3)
        assert 0 < stats.busy_seconds < 10
        assert 0 < stats.queue_wait_seconds < 10

    run(scenario)


@pytest.mark.parametrize("drain", [True, False])
def test_closing_drains_or_refuses(drain):
    async def scenario(pool, stub):
        tasks = await queued(pool, stub, chunk(count=2))
        closing = asyncio.create_task(pool.close(drain=drain))
        await asyncio.sleep(0.01)
        stub.gate.set()
        await closing
        running, waiting = await asyncio.gather(*tasks, return_exceptions=True)
        assert heard(running) == 1.0
        assert heard(waiting) == 2.0 if drain else isinstance(waiting, EngineDead)
        assert not pool.is_alive
        with pytest.raises(EngineDead):
            await pool.submit(chunk())
        await pool.close()

    run(scenario)


def test_a_pool_that_was_not_started_says_so():
    async def main():
        pool = VocoderPool([ThreadHost(At(Stub()))])
        with pytest.raises(EngineDead):
            await pool.submit(chunk())
        await pool.close()

    asyncio.run(main())


def test_what_cannot_be_loaded_says_so():
    async def main():
        pool = VocoderPool([ThreadHost(At(CheckpointError("no tensor")))])
        pool.start()
        await pool.read()
        with pytest.raises(CheckpointError, match="no tensor"):
            await pool.ready()
        assert not pool.is_alive
        await pool.close()

    asyncio.run(main())


def test_a_thread_that_dies_leaves_nobody_waiting(monkeypatch):
    async def scenario(pool, stub):
        tasks = await queued(pool, stub, chunk(count=2))
        monkeypatch.setattr(service, "pick", SimpleNamespace())  # not callable
        stub.gate.set()
        running, waiting = await asyncio.gather(*tasks, return_exceptions=True)
        assert heard(running) == 1.0
        assert isinstance(waiting, EngineDead)
        assert not pool.is_alive

    run(scenario)


def test_two_workers_share_the_work():
    async def main():
        stubs = [Stub(), Stub()]
        pool = VocoderPool([ThreadHost(At(stub)) for stub in stubs])
        pool.start()
        await pool.ready()
        tasks = [asyncio.create_task(pool.submit(chunk(count=count))) for count in (50, 10, 20, 19, 1)]
        for stub in stubs:
            await asyncio.to_thread(stub.running.wait, 10)
            stub.gate.set()
        assert [heard(samples) for samples in await asyncio.gather(*tasks)] == [50, 10, 20, 19, 1]
        await pool.close()
        return [sorted(count for batch in stub.sizes for count in batch) for stub in stubs]

    assert asyncio.run(main()) == [[1, 50], [10, 19, 20]]


def test_one_of_two_workers_is_enough():
    async def main():
        good, bad = Stub(), Stub()
        good.gate.set()
        bad.gate.set()
        bad.error, bad.fail = torch.AcceleratorError("gone"), {lost := utterance()}
        pool = VocoderPool([ThreadHost(At(bad)), ThreadHost(At(good))])
        pool.start()
        await pool.ready()
        with pytest.raises(EngineError):
            await pool.submit(chunk(lost))
        assert (pool.trouble, pool.is_alive) == (None, True)
        assert heard(await pool.submit(chunk(lost, 3))) == 3.0
        await pool.close()

    asyncio.run(main())


class Idle:
    """A host that tells what the test has it tell, and does nothing."""

    patience = 0.05

    def start(self, tell: Tell):
        self.tell, self.orders, self.kills = tell, list[Order](), 0
        tell(Read())

    def build(self):
        self.tell(Ready(VocoderFootprint({}, {})))

    def send(self, order: Order):
        self.orders.append(order)

    def kill(self):
        self.kills += 1
        self.tell(Ended(EngineError("killed"), final=False))

    async def end(self):
        pass


def idly(scenario, *hosts):
    """Runs ``scenario(pool)``; whom that leaves waiting gets nothing."""

    async def main():
        pool = VocoderPool(hosts)
        pool.start()
        await pool.ready()
        tasks = await asyncio.wait_for(scenario(pool), 20)
        await pool.close(drain=False)
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


def numbers(host: Idle) -> list[int]:
    """The jobs that it was given last."""
    return [order.job for order in host.orders if isinstance(order, Speak)]


def test_a_worker_that_is_back_gets_its_part_of_what_waits():
    left, right = Idle(), Idle()

    async def scenario(pool):
        left.tell(Ended(EngineError("x"), final=False))
        tasks = [asyncio.create_task(pool.submit(chunk(due=-float(number)))) for number in range(5)]
        await asyncio.sleep(0)
        assert numbers(right) == [0, 1, 2, 3, 4]
        right.tell(Begun((0,)))
        right.orders.clear()
        left.build()
        assert (numbers(left), numbers(right)) == ([4, 3, 1], [2])
        assert pool.waiting == 4
        return tasks

    idly(scenario, left, right)


def test_a_worker_that_hangs_is_trouble_and_then_ended(monkeypatch):
    monkeypatch.setattr(worker, "TICK", 0.01)
    left, right = Idle(), Idle()

    async def until(true):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    async def scenario(pool):
        right.tell(Ended(EngineError("x"), final=False))
        waiting = asyncio.create_task(pool.submit(chunk()))
        await until(lambda: pool.trouble == HANGING)
        waiting.cancel()
        await until(lambda: pool.trouble is None)
        running = asyncio.create_task(pool.submit(chunk()))
        await asyncio.sleep(0)
        left.tell(Begun((numbers(left)[-1],)))
        running.cancel()
        await until(lambda: pool.trouble == HANGING)
        right.build()
        assert pool.trouble is None, "one of two is enough"
        tasks = [asyncio.create_task(pool.submit(chunk())) for _ in range(2)]
        await asyncio.sleep(0)
        assert len(numbers(right)) == 2
        await until(lambda: left.kills == 1)
        return [waiting, running, *tasks]

    idly(scenario, left, right)


def test_news_after_the_loop_s_end_is_no_error():
    async def main():
        host = ThreadHost(At(Stub()))
        host.start(lambda news: None)
        return host

    host = asyncio.run(main())
    host._tell(Ready(VocoderFootprint({}, {})))


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

    async def stream(pool, seed):
        of = opened(seed)
        return torch.cat([await pool.submit(Chunk(of, part, final=last)) for part, last in _parts(tokens[seed])])

    async def main():
        pool = VocoderPool([ThreadHost(At(own))])
        pool.start()
        await pool.ready()
        try:
            return await asyncio.gather(*(stream(pool, seed) for seed in names))
        finally:
            await pool.close()

    for seed, samples in zip(names, asyncio.run(main()), strict=True):
        assert len(samples) == 960 * len(tokens[seed])
        assert torch.equal(samples, expected[seed])


def _parts(tokens):
    return [(tokens[:15], False), (tokens[15:], True)]
