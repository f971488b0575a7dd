"""How a policy and a budget become what is loaded, and what happens where a strategy does not work."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform
from vllm.third_party import pynvml

from chatterbox_vllm import loading
from chatterbox_vllm.budget import Plan
from chatterbox_vllm.checkpoint import Checkpoint, resolve
from chatterbox_vllm.convert import quantize
from chatterbox_vllm.costs import Demand
from chatterbox_vllm.errors import ConfigurationError, EngineError, MissingDependency
from chatterbox_vllm.loading import Setup, Stages, load, settled
from chatterbox_vllm.memory import Memory
from chatterbox_vllm.quantization.policy import NONE, STRATEGIES, Policy
from chatterbox_vllm.t3.card import card_memory
from chatterbox_vllm.vocoder.guest import GuestHost
from chatterbox_vllm.vocoder.host import ProcessHost, ThreadHost


@pytest.fixture
def setup(demo: Checkpoint) -> Setup:
    return Setup(
        demo,
        STRATEGIES["aggressive"],
        on_gpu=True,
        device="cuda",
        vocoder_devices=["cuda"],
        vocoder_process=None,
        vocoder_dtype=None,
        t3={"max_model_len": 640},
    )


def broken(monkeypatch: pytest.MonkeyPatch, error: Exception, *methods: str) -> list[str | None]:
    """Has loading fail for these methods of T3; the strategies that were tried."""
    tried = []

    async def loaded(setup: Setup) -> Any:
        tried.append(setup.policy.strategy)
        if setup.policy.t3 in methods:
            raise error
        return setup

    monkeypatch.setattr(loading, "_loaded", loaded)
    return tried


MISSING = MissingDependency("bitsandbytes", purpose="for bnb-4bit", command="pip install bitsandbytes")


def test_a_strategy_that_does_not_work_gives_way_to_a_weaker_one(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = broken(monkeypatch, MISSING, "bnb-4bit")
    done, _ = asyncio.run(load(settled(setup), strict=False))
    assert tried == ["aggressive", "mixed", "conservative"]
    assert done.policy == STRATEGIES["conservative"]
    assert "the strategy aggressive does not work here: bitsandbytes is needed" in caplog.text
    assert "loading with mixed" in caplog.text


def test_a_weaker_strategy_has_a_plan_of_its_own(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = broken(monkeypatch, MISSING, "bnb-4bit")
    planned = settled(replace(setup, budget=8 * 2**30))
    done, _ = asyncio.run(load(planned, strict=False))
    assert tried[-1] == "conservative"
    assert planned.plan is not None
    assert done.plan is not None
    assert done.plan.policy.t3 == "int8"
    assert done.budget == planned.budget


@pytest.mark.parametrize("devices", [["cuda:0", "cuda:1"], ["cuda:1", "cuda:0"]])
def test_under_a_budget_several_workers_have_processes_of_their_own(setup: Setup, devices: list[str]) -> None:
    """Nor is another remedy told than one that would do."""
    several = replace(setup, vocoder_devices=devices, policy=NONE)
    assert settled(replace(several, budget=4 * 2**30)).host is ProcessHost
    with pytest.raises(ConfigurationError) as caught:
        settled(replace(several, budget=1900 * 2**20))
    assert "\n  one vocoder_device\n" in str(caught.value)
    assert "vocoder_process" not in str(caught.value)


def test_a_remedy_is_one_that_would_do(setup: Setup) -> None:
    """One process for both has room for one worker."""
    several = replace(setup, vocoder_devices=["cuda:0", "cuda:1"], vocoder_process=True, policy=NONE)
    with pytest.raises(ConfigurationError) as caught:
        settled(replace(several, budget=1900 * 2**20))
    assert "\n  vocoder_process=false, one vocoder_device\n" in str(caught.value)


@pytest.mark.parametrize("budget", [None, 8 * 2**30])
def test_a_vocoder_on_the_cpu_has_what_a_cpu_can(
    setup: Setup, budget: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside a T3 that has all of its strategy."""
    beside = replace(setup, vocoder_devices=["cpu"], policy=STRATEGIES["mixed"], budget=budget)
    made = settled(beside)
    assert made.policy.methods == {**STRATEGIES["mixed"].methods, "flow_encoder": "int8", "estimator": "int8"}
    assert made.host is ThreadHost
    assert "on a CPU flow_encoder, estimator will be int8" in caplog.text
    with pytest.raises(ConfigurationError, match=r"bnb-8bit \(flow_encoder\) needs an NVIDIA GPU"):
        settled(beside, strict=True)
    tried = broken(monkeypatch, EngineError("no card"), "bnb-4bit")
    done, _ = asyncio.run(load(made, strict=False))
    assert tried == ["mixed", "conservative"]
    assert done.policy == STRATEGIES["conservative"]


@pytest.mark.parametrize("trouble", ["Blueprint", "VocoderPool", "launch"])
def test_what_fails_leaves_no_daemon(setup: Setup, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's MPS ends, whichever part cannot be loaded."""
    calls: list[str] = []

    def fail(*_: Any, **__: Any) -> Any:
        raise EngineError("it cannot be had")

    class Daemon:
        def __init__(self) -> None:
            calls.append("start")

        def stop(self) -> None:
            calls.append("stop")

    monkeypatch.setattr(loading, "Mps", Daemon)
    monkeypatch.setattr(loading, trouble, fail)
    cpu = replace(setup, on_gpu=False, device="cpu", vocoder_devices=["cpu"], policy=NONE, mps=True)
    with pytest.raises(EngineError, match="it cannot be had"):
        asyncio.run(load(settled(cpu), strict=True))
    assert calls == ["start", "stop"]


def test_an_end_that_fails_ends_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    async def close(*, drain: bool) -> None:
        raise EngineError("it does not end")

    calls: list[str] = []
    parts: Any = (SimpleNamespace(shutdown=lambda: None), SimpleNamespace(close=close))
    sharing: Any = SimpleNamespace(stop=lambda: calls.append("stop"))
    with pytest.raises(EngineError, match="it does not end"):
        asyncio.run(Stages(*parts, sharing).end())
    assert calls == ["stop"]


def test_where_a_weaker_strategy_does_not_fit_the_first_error_is_told(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The budget holds ``aggressive`` only, and a package is missing: that is what to mend."""
    fits = loading.plan

    def tight(budget: int, demand: Demand, policy: Policy) -> Plan:
        return fits(budget if policy.strategy == "aggressive" else 2**20, demand, policy)

    monkeypatch.setattr(loading, "plan", tight)
    tried = broken(monkeypatch, MISSING, "bnb-4bit")
    with pytest.raises(MissingDependency) as caught:
        asyncio.run(load(settled(replace(setup, budget=8 * 2**30)), strict=False))
    assert tried == ["aggressive"]
    assert "too small" in str(caught.value.__cause__)
    assert "nor does the strategy mixed" in caplog.text


def test_when_nothing_is_quantised_any_more_the_error_is_told(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = broken(monkeypatch, EngineError("no card"), "bnb-4bit", "int8", "none")
    with pytest.raises(EngineError, match="no card"):
        asyncio.run(load(settled(setup), strict=False))
    assert tried == ["aggressive", "mixed", "conservative", "none"]


@pytest.mark.parametrize(
    ("policy", "strict", "error"),
    [
        (STRATEGIES["aggressive"], True, MISSING),
        (Policy(t3="bnb-4bit"), False, MISSING),
        (STRATEGIES["aggressive"], False, ConfigurationError("max_model_len is odd", param="max_model_len")),
    ],
    ids=["strict", "a method by name", "another mistake"],
)
def test_else_it_is_tried_once(
    setup: Setup, policy: Policy, strict: bool, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = broken(monkeypatch, error, "bnb-4bit")
    with pytest.raises(type(error)):
        asyncio.run(load(settled(replace(setup, policy=policy)), strict=strict))
    assert len(tried) == 1


def test_a_cpu_has_no_budget_and_no_need_of_a_strategy(setup: Setup) -> None:
    cpu = replace(setup, on_gpu=False, device="cpu", vocoder_devices=["cpu"])
    with pytest.raises(ConfigurationError, match="vram_budget is a GPU's"):
        settled(replace(cpu, budget=2**31))
    assert settled(replace(cpu, policy=Policy(strategy="auto"))).policy == STRATEGIES["none"]
    assert settled(cpu).policy.t3 == "int8"


def test_a_strategy_leaves_a_quantised_t3_as_it_is(
    setup: Setup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And has the other parts, with a budget, without one, and on a CPU."""
    quantize(setup.checkpoint, tmp_path / "stored", method="int8")
    setup = replace(setup, checkpoint=resolve(tmp_path / "stored"), t3={"max_model_len": 640, "max_num_seqs": 1})
    for given in (setup, replace(setup, budget=2**31)):
        for name, strategy in STRATEGIES.items():
            policy = settled(replace(given, policy=strategy)).policy
            assert policy == replace(strategy, t3="int8")
            assert policy.strategy == name
    auto = settled(replace(setup, budget=2**34, policy=Policy(strategy="auto"))).policy
    assert auto == replace(STRATEGIES["none"], t3="int8")
    cpu = replace(setup, on_gpu=False, device="cpu", vocoder_devices=["cpu"])
    assert settled(replace(cpu, policy=STRATEGIES["mixed"])).policy.methods["estimator"] == "int8"
    named = Policy(t3="bnb-4bit")
    assert settled(replace(setup, policy=named)).policy == named, "that is refused when it is loaded"


def test_a_budget_is_compared_with_the_card(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(loading, "card_memory", lambda: Memory(4 * 2**30, 3 * 2**30))
    setup = replace(setup, t3={"max_model_len": 640, "max_num_seqs": 1})
    with pytest.raises(
        ConfigurationError, match=r"vram_budget=4.50GiB is more than the card has, 4.00GiB; lower it"
    ) as told:
        settled(replace(setup, budget=9 * 2**29))
    assert told.value.param == "vram_budget"
    assert settled(replace(setup, budget=2**31)).plan is not None
    assert "are free" not in caplog.text
    monkeypatch.setattr(loading, "card_memory", lambda: Memory(4 * 2**30, 2**30))
    assert settled(replace(setup, budget=2**31)).plan is not None
    assert "of the card only 1.00 GiB are free, and vram_budget takes" in caplog.text


def test_auto_asks_for_free_memory_without_a_cuda_context(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_context() -> None:
        raise AssertionError("CUDA was asked")

    monkeypatch.setattr(torch.cuda, "mem_get_info", no_context)
    monkeypatch.setattr(current_platform, "visible_device_id_to_physical_device_id", {0: 3}.__getitem__)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    cards = {3: SimpleNamespace(total=8 * 2**30, free=6 * 2**30)}
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", cards.__getitem__)
    monkeypatch.setattr(loading, "choose_strategy", lambda free, demand: {6 * 2**30: STRATEGIES["mixed"]}[free])
    assert card_memory() == (8 * 2**30, 6 * 2**30)
    assert settled(replace(setup, policy=Policy(strategy="auto"))).policy == STRATEGIES["mixed"]


def test_without_nvml_cuda_tells_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 2))
    assert card_memory() == (2, 1)


def test_a_budget_becomes_arguments(setup: Setup) -> None:
    small = settled(replace(setup, t3={"max_model_len": 640, "max_num_seqs": 1}, budget=2 * 2**30))
    assert small.plan is not None
    assert small.plan.total <= 2 * 2**30
    assert small.t3["kv_cache_memory_bytes"] > 0
    assert small.t3["max_num_seqs"] == 1
    assert small.max_frames is not None


def test_a_budget_that_is_too_small_is_refused_with_the_missing_bytes(setup: Setup) -> None:
    with pytest.raises(ConfigurationError, match=r"too small .*nothing was loaded") as refusal:
        settled(replace(setup, budget=100 * 2**20))
    assert refusal.value.param == "vram_budget"
    assert "what would fit:\n  vram_budget=" in str(refusal.value)


def test_a_budget_and_what_it_decides_are_not_given_both(setup: Setup) -> None:
    with pytest.raises(ConfigurationError, match="kv_cache_memory_bytes is what vram_budget decides"):
        settled(replace(setup, t3={"max_model_len": 640, "kv_cache_memory_bytes": 2**28}, budget=2**32))


@pytest.mark.parametrize(
    ("on_gpu", "devices", "own", "host"),
    [
        (True, ["cuda"], None, ProcessHost),
        (True, ["cuda"], False, GuestHost),
        (True, ["cuda:1"], False, ThreadHost),
        (True, ["cpu"], None, ThreadHost),
        (False, ["cpu"], None, ThreadHost),
        (False, ["cpu"], True, ProcessHost),
        (True, ["cuda:0", "cuda:1"], None, ProcessHost),
    ],
)
def test_where_the_vocoder_runs(setup: Setup, on_gpu: bool, devices: list[str], own: bool | None, host: type) -> None:
    placed = replace(setup, on_gpu=on_gpu, vocoder_devices=devices, vocoder_process=own)
    assert placed.host is host
