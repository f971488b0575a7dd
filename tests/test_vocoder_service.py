"""The vocoder's service: what goes first, what a batch takes in, what its work costs, and when it is launched."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from chatterbox_vllm.vocoder import service
from chatterbox_vllm.vocoder.footprint import VocoderFootprint
from chatterbox_vllm.vocoder.service import OVERDUE, Service, ordered, pick
from chatterbox_vllm.vocoder.utterance import Due, Listener, Step, plan
from chatterbox_vllm.vocoder.wire import Failed, Limits, Speak
from tests.vocoder_support import Stub, chunk, said, utterance


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
