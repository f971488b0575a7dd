"""The vocoder's front over threads: what is batched, what an error or a client that leaves does, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from chatterbox_vllm.errors import CheckpointError, EngineDead, EngineError
from chatterbox_vllm.vocoder import service, worker
from chatterbox_vllm.vocoder.footprint import VocoderFootprint
from chatterbox_vllm.vocoder.host import ThreadHost
from chatterbox_vllm.vocoder.service import OVERDUE, Service, ordered, pick
from chatterbox_vllm.vocoder.utterance import Chunk, Due, Listener, Step, Utterance, plan
from chatterbox_vllm.vocoder.wire import Begun, Ended, Failed, Limits, Order, Read, Ready, Speak, Tell
from chatterbox_vllm.vocoder.worker import GONE, HANGING, VocoderPool, VocoderStats
from tests.vocoder_support import At, Here, said, speech, vocoder, voice


class Stub:
    """A vocoder that says how many tokens it got, when it is let."""

    max_frames = 10_000

    def __init__(self) -> None:
        self.batches: list[list[Step]] = []
        self.gate = threading.Event()
        self.fail: set[Utterance] = set()
        self.nonsense: set[Utterance] = set()
        self.error: Exception = torch.OutOfMemoryError("no memory")
        self.running = threading.Event()

    @property
    def sizes(self) -> list[list[int]]:
        return [[len(step.tokens) for step in batch] for batch in self.batches]

    def footprint(self):
        return VocoderFootprint({}, {}, peak=len(self.batches))

    def launch(self, steps):
        self.batches.append(list(steps))
        self.running.set()
        assert self.gate.wait(10)
        if self.fail & {step.utterance for step in steps}:
            raise self.error
        nonsense = float("nan")
        return Here([said(step, nonsense if step.utterance in self.nonsense else len(step.tokens)) for step in steps])


def utterance(steps: int = 10) -> Utterance:
    return Utterance(voice(5), seed=0, diffusion_steps=steps)


def chunk(of: Utterance | None = None, count: int = 5, *, final: bool = True, due: float = 0.0) -> Chunk:
    return Chunk(of or utterance(), speech(count), final=final, due=Due(due))


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


def speak(
    job: int, due: float, *, count: int = 5, steps: int = 10, listener: Listener = Listener.ABSENT, final: bool = True
) -> Speak:
    step = plan(chunk(utterance(steps), count, final=final))
    return Speak(job, step, Due(due, listener), came=0.0)


def picked(jobs: list[Speak], max_batch: int, max_frames: int, now: float = 0.0) -> list[int]:
    return [job.job for job in pick(jobs, max_batch, max_frames, now)]


def test_what_is_due_first_goes_first():
    jobs = [speak(1, 30.0), speak(2, 10.0), speak(3, 20.0, listener=Listener.HEARING), speak(4, 15.0)]
    assert [job.job for job in ordered(jobs, 0.0, 1e-9)] == [2, 4, 3, 1]
    assert ordered([], 0.0, 1e-9) == []


def test_who_would_fall_silent_goes_first():
    """If everything that is due before had its turn first, and not a moment sooner."""
    listeners = [Listener.WAITING, Listener.ABSENT, Listener.HEARING, Listener.HEARING, Listener.ABSENT]
    due = [10.0, 11.0, 20.0, 20.5, 99.0]
    jobs = [speak(number, at, listener=who) for number, (at, who) in enumerate(zip(due, listeners, strict=True), 1)]

    def order(now: float, seconds: float) -> list[int]:
        """If each took so many seconds."""
        return [job.job for job in ordered(jobs, now, seconds / jobs[0].step.work)]

    assert order(16.4, 1.0) == [1, 2, 3, 4, 5]
    assert order(16.5, 1.0) == [3, 4, 1, 2, 5], "four would be late; three is due before it"
    assert order(17.0, 1.0) == [3, 4, 1, 2, 5]
    assert order(20.0, 0.0) == [3, 1, 2, 4, 5], "if no pace is known: what is due now"
    assert order(199.0, 9.0) == [3, 4, 1, 2, 5], "who hears nothing waits, however late"


def test_who_hears_something_goes_before_who_is_held():
    """And that goes before who waits for a first chunk."""
    late = [Listener.WAITING, Listener.HELD, Listener.HEARING, Listener.ABSENT]
    jobs = [speak(number, float(number), listener=who) for number, who in enumerate(late)]
    assert [job.job for job in ordered(jobs, 10.0, 1.0)] == [2, 1, 0, 3]


def test_more_steps_are_more_work():
    """A chunk is late after 100 steps that are due before it, and not after ten."""
    for steps, order in ((10, [1, 2]), (100, [2, 1])):
        jobs = [speak(1, 1.0, count=50, steps=steps), speak(2, 2.0, listener=Listener.HEARING)]
        ten = speak(0, 0.0, count=50).step.work
        assert [job.job for job in ordered(jobs, 0.0, 0.5 / ten)] == order


def test_a_batch_is_what_fits_of_the_first():
    jobs = [speak(2, 10.0), speak(4, 15.0, count=50), speak(3, 20.0, steps=4), speak(1, 30.0), speak(5, 40.0)]
    assert picked(jobs, 3, 10_000) == [2, 4, 1]
    assert picked(jobs, 9, 10_000) == [2, 4, 1, 5], "three has other diffusion steps"
    assert picked(jobs, 9, 25) == [2], "what is too long holds back what is due after it"
    assert picked(jobs[1:2], 9, 25) == [4], "one goes, however long it is"
    assert picked([], 9, 25) == []


def test_nobody_is_passed_over_for_ever():
    """For other diffusion steps: what comes later fills a batch only as long as that is not long due."""
    jobs = [speak(1, 30.0), speak(2, 10.0, steps=4), speak(3, 10.0)]
    assert picked(jobs, 9, 10_000, now=10.0 + OVERDUE) == [1, 3]
    assert picked(jobs, 9, 10_000, now=10.1 + OVERDUE) == [1]


def test_many_steps_make_small_batches():
    """Which take as long: room alone does not decide."""
    for steps, size in ((10, 16), (22, 8), (46, 4), (4, 16)):
        jobs = [speak(number, 0.0, steps=steps) for number in range(20)]
        assert len(pick(jobs, 99, 16 * jobs[0].step.flow_frames, 0.0)) == size, steps


@pytest.mark.parametrize("final", [False, True], ids=["chunks", "short texts"])
def test_streams_run_in_small_batches_until_many_wait(final):
    def size(count: int) -> int:
        jobs = [speak(number, float(number), listener=Listener.WAITING, final=final) for number in range(count)]
        return len(pick(jobs, 99, 16 * jobs[0].step.flow_frames, 0.0))

    assert size(4) == 4, "a quarter of 16"
    assert size(16) == 4
    assert size(24) == 6, "a quarter of what waits"
    assert size(99) == 8, "no more than half"


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


def test_a_failed_batch_leaves_nothing_in_memory(monkeypatch):
    monkeypatch.setattr(service.logger, "disabled", True)  # pytest keeps what is logged, and its traceback
    kept = []

    class Failing(Stub):
        def launch(self, steps):
            noise = torch.empty(1)
            kept.append(weakref.ref(noise))
            raise torch.OutOfMemoryError("no memory")

    own = Service(lambda news: own.close() if isinstance(news, Failed) else None, Limits())
    own.put(speak(1, 0.0))
    gc.disable()
    try:
        own.run(Failing())
        assert [each() for each in kept] == [None]
    finally:
        gc.enable()


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


def test_how_fast_it_is_of_late(monkeypatch):
    """Of two batches, the later one counts more, and so does work."""
    now, stub = 0.0, Stub()
    monkeypatch.setattr(service, "time", SimpleNamespace(monotonic=lambda: now))
    own = Service(lambda news: None, Limits())
    assert own.seconds_per_work == 0.0
    stub.gate.set()
    jobs = [speak(1, 0.0), speak(2, 0.0, count=50, steps=20)]
    for job, seconds in zip(jobs, (1.0, 2.0), strict=True):
        own.put(job)
        running = own._turn(stub, None)
        now += seconds
        assert own._turn(stub, running) is None
    few, much = (job.step.work for job in jobs)
    assert own.seconds_per_work == pytest.approx((0.9 * 1.0 + 2.0) / (0.9 * few + much))


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


def test_an_idle_service_sleeps():
    told, stub = [], Stub()
    stub.gate.set()
    spoken = threading.Semaphore(0)
    idle = Service(lambda news: (told.append(news), spoken.release()), Limits())
    wakes, wait = [], idle._changed.wait
    idle._changed.wait = lambda timeout=None: (wakes.append(timeout), wait(timeout))[1]
    thread = threading.Thread(target=idle.run, args=(stub,))
    thread.start()
    for number in range(2):
        idle.put(speak(number, 0.0))
        assert spoken.acquire(timeout=10)  # begun
        assert spoken.acquire(timeout=10)
    assert not spoken.acquire(timeout=0.1)
    idle.close()
    thread.join(10)
    assert wakes == [None] * len(wakes)  # it sleeps until somebody wakes it
    assert len(wakes) <= 3


class Device:
    """A vocoder on a device that goes on by itself; its batches' flows are done, and they arrive, when they are let."""

    max_frames = 10_000

    def __init__(self) -> None:
        self.launched: list[Device.Sounding] = []
        self.room = 99

    class Sounding:
        def __init__(self, steps: list[Step]) -> None:
            self.steps = steps
            self.flowed, self.here = threading.Event(), threading.Event()
            self.error: Exception | None = None

        @property
        def is_here(self) -> bool:
            return self.here.is_set()

        def wait_for_flow(self):
            assert self.flowed.wait(10)
            if self.error:
                raise self.error

        def arrive(self):
            assert self.here.wait(10)
            if self.error:
                raise self.error
            return [said(step, float(len(step.tokens))) for step in self.steps]

    def footprint(self):
        return VocoderFootprint({}, {})

    def launch(self, steps):
        if len(self.launched) == self.room:
            raise torch.OutOfMemoryError("no memory")
        self.launched.append(self.Sounding(steps))
        return self.launched[-1]


def overlapping(scenario) -> list[str]:
    """What a service tells, of a batch in a word, while ``scenario(service, device, wait_until)`` goes on."""
    told: list[str] = []
    end = time.monotonic() + 10

    def tell(news):
        told.append(f"{type(news).__name__.lower()} {','.join(map(str, news.jobs))}")

    def wait_until(true):
        while not true():
            assert time.monotonic() < end
            time.sleep(0.001)

    own, device = Service(tell, Limits(max_batch=1)), Device()

    def serve():
        try:
            own.run(device)
        except torch.AcceleratorError:
            told.append("lost")

    thread = threading.Thread(target=serve)
    thread.start()
    own.put(speak(1, 0.0))
    wait_until(lambda: device.launched)
    scenario(own, device, wait_until)
    own.close()
    thread.join(10)
    assert not thread.is_alive()
    return told


def test_the_next_batch_is_launched_while_hift_still_works_on_the_one_before():
    def scenario(own, device, wait_until):
        own.put(speak(2, 2.0))
        own.put(speak(3, 1.0))
        device.launched[0].flowed.set()
        wait_until(lambda: len(device.launched) == 2)
        device.launched[0].here.set()
        device.launched[1].flowed.set()
        wait_until(lambda: len(device.launched) == 3)
        for sounding in device.launched:
            sounding.flowed.set()
            sounding.here.set()

    assert overlapping(scenario) == ["begun 1", "spoken 1", "begun 3", "spoken 3", "begun 2", "spoken 2"]


def test_what_is_here_is_told_before_anything_is_launched():
    def scenario(own, device, wait_until):
        own.put(speak(2, 2.0))
        device.launched[0].here.set()
        device.launched[0].flowed.set()
        wait_until(lambda: len(device.launched) == 2)
        device.launched[1].here.set()
        device.launched[1].flowed.set()

    assert overlapping(scenario) == ["begun 1", "spoken 1", "begun 2", "spoken 2"]


def test_a_batch_that_was_launched_early_had_not_begun_if_the_device_is_lost():
    def scenario(own, device, wait_until):
        own.put(speak(2, 2.0))
        device.launched[0].flowed.set()
        wait_until(lambda: len(device.launched) == 2)
        device.launched[0].error = torch.AcceleratorError("an illegal memory access")
        device.launched[0].here.set()

    assert overlapping(scenario) == ["begun 1", "failed 1", "lost"]


def test_a_device_that_is_lost_in_the_flow_fails_its_batch():
    def scenario(own, device, wait_until):
        own.put(speak(2, 2.0))
        device.launched[0].error = torch.AcceleratorError("an illegal memory access")
        device.launched[0].here.set()
        device.launched[0].flowed.set()

    assert overlapping(scenario) == ["begun 1", "failed 1", "lost"]


def test_what_cannot_be_launched_early_fails_in_its_turn():
    def scenario(own, device, wait_until):
        device.room = 1
        own.put(speak(2, 2.0))
        device.launched[0].flowed.set()
        wait_until(lambda: not own._jobs)
        device.launched[0].here.set()

    assert overlapping(scenario) == ["begun 1", "spoken 1", "begun 2", "failed 2"]


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
