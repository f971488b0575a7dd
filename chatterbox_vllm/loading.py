"""T3 and the vocoder, loaded side by side as a policy says; and with a weaker one, where a strategy does not work."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import Event
from typing import Any, Final

import torch

from chatterbox_vllm.budget import Plan, choose_strategy, plan
from chatterbox_vllm.checkpoint import Checkpoint, cache_dir
from chatterbox_vllm.costs import Demand
from chatterbox_vllm.errors import ConfigurationError, EngineError, MissingDependency
from chatterbox_vllm.mps import Mps
from chatterbox_vllm.quantization.estimate import QuantizationMemoryEstimator
from chatterbox_vllm.quantization.packing import Stored
from chatterbox_vllm.quantization.policy import STRATEGIES, VOCODER, Method, Policy, QuantizationStrategy
from chatterbox_vllm.t3.card import card_memory
from chatterbox_vllm.t3.footprint import T3Footprint
from chatterbox_vllm.t3.generator import T3Generator
from chatterbox_vllm.t3.launch import has_step_graphs, launch
from chatterbox_vllm.tenancy import EXTENSION
from chatterbox_vllm.vocoder.blueprint import Blueprint
from chatterbox_vllm.vocoder.footprint import VocoderFootprint
from chatterbox_vllm.vocoder.guest import GuestHost
from chatterbox_vllm.vocoder.host import ProcessHost, ThreadHost
from chatterbox_vllm.vocoder.worker import VocoderPool

logger: Final = logging.getLogger(__name__)
_NAMES: Final = {
    "t3": "T3",
    "flow_encoder": "S3Gen's flow encoder",
    "estimator": "S3Gen's estimator",
    "voice_encoder": "Voice Encoder",
}
_GIVEN: Final = ("max_num_seqs", "max_model_len", "gpu_memory_utilization")
"""Arguments of T3's engine that a budget has to go by, or replaces."""
_FRUGAL: Final = {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"}
"""cuBLAS' workspace of each stream: 8 MiB, as on other cards, in place of a Hopper's 32."""
_OF_QUANTIZATION: Final = ("quantization", "vllm-bnb-plugin", "bitsandbytes")


@dataclass(frozen=True)
class Setup:
    """What is to be loaded, checked.

    Args:
        checkpoint: the weights.
        policy: how they are quantised.
        on_gpu: T3 runs on a GPU.
        device: of the enrolment networks.
        vocoder_devices: one for each of the vocoder's workers.
        vocoder_process: whether each of them is a process of its own; None decides by the device.
        vocoder_dtype: None for the device's best.
        t3: ``t3.launch.launch``'s arguments, but for the weights and the method.
        mps: NVIDIA's Multi-Process Service is to run.
        max_frames: the most mel frames that the vocoder has in work at once; None for as many as suit the device.
        budget: bytes of the card for everything together; None for no such limit.
        plan: what the budget is spent on.
        asked: what it was before the budget decided.
    """

    checkpoint: Checkpoint
    policy: Policy
    on_gpu: bool
    device: str
    vocoder_devices: list[str]
    vocoder_process: bool | None
    vocoder_dtype: torch.dtype | None
    t3: Mapping[str, Any]
    mps: bool = False
    max_frames: int | None = None
    budget: int | None = None
    plan: Plan | None = None
    asked: Setup | None = None

    @property
    def host(self) -> type[ProcessHost] | type[ThreadHost]:
        """Where the vocoder's workers run: on T3's GPU, without a process of their own, in T3's."""
        own_process = self.vocoder_process
        if own_process is None:
            own_process = self.vocoder_devices != ["cpu"]
        if own_process:
            return ProcessHost
        return GuestHost if self.on_gpu and self.vocoder_devices[0] in {"cuda", "cuda:0"} else ThreadHost


@dataclass(frozen=True)
class Stages:
    """T3, the vocoder, and what lets both use one card at the same time, if it runs."""

    t3: T3Generator
    vocoder: VocoderPool
    sharing: Mps | None

    async def end(self) -> None:
        """Fails what is under way and ends all processes."""
        try:
            await asyncio.gather(self.vocoder.close(drain=False), asyncio.to_thread(self.t3.shutdown))
        finally:
            if self.sharing is not None:
                await asyncio.to_thread(self.sharing.stop)


def settled(setup: Setup, *, strict: bool = False) -> Setup:
    """``setup`` with what its devices, its budget and the strategy ``auto`` decide.

    Args:
        strict: raise where a CPU would have int8 in place of a strategy's methods.

    Raises:
        CheckpointError: T3's file cannot be read.
        ConfigurationError: a device cannot have the policy, or the budget cannot hold it; says by how much.
    """
    made = _settled(setup, strict=strict)
    if "cpu" not in made.vocoder_devices:
        return made
    return replace(made, policy=made.policy.on_cpu(VOCODER, strict=strict))


def check_for_cpu(policy: Policy, budget: int | None, *, strict: bool) -> None:
    """What a CPU refuses, whichever the checkpoint is.

    Raises:
        ConfigurationError: it needs an NVIDIA GPU.
    """
    if budget is not None:
        raise ConfigurationError("vram_budget is a GPU's; leave it out on a CPU", param="vram_budget")
    if strict or policy.strategy is None:
        policy.on_cpu(strict=strict)


def _settled(setup: Setup, *, strict: bool) -> Setup:
    stored = Stored.of(setup.checkpoint.t3)
    if not setup.on_gpu:
        check_for_cpu(setup.policy, setup.budget, strict=strict)
        auto = setup.policy.strategy == QuantizationStrategy.AUTO
        if auto:
            logger.info("quantization_strategy=auto is none: it goes by a card's memory, and this is a CPU")
        policy = STRATEGIES["none"] if auto else setup.policy.on_cpu(strict=strict)
        return replace(setup, policy=policy.of_file(stored), t3={"max_num_seqs": 32, **setup.t3})
    setup = replace(setup, policy=setup.policy.of_file(stored))
    if setup.budget is not None:
        return _planned(setup, setup.budget, stored)
    setup = replace(setup, t3={"max_num_seqs": 256, **setup.t3})
    if setup.policy.strategy == QuantizationStrategy.AUTO:
        free = card_memory().available
        policy = choose_strategy(free, _demand(setup))
        logger.info("quantization_strategy=auto is %s: %.1f GiB are free", policy.strategy, free / 2**30)
        return replace(setup, policy=policy.of_file(stored))
    return setup


def _planned(setup: Setup, budget: int, stored: Stored) -> Setup:
    card = card_memory() if torch.cuda.is_available() else None
    if card is not None and budget > card.total:
        raise ConfigurationError(
            f"vram_budget={budget / 2**30:.2f}GiB is more than the card has, {card.total / 2**30:.2f}GiB; lower it, or "
            "leave it out",
            param="vram_budget",
        )
    made = plan(budget, _demand(setup), setup.policy)
    if chosen := [name for name in made.t3_arguments if name in setup.t3 and name not in _GIVEN]:
        raise ConfigurationError(f"{chosen[0]} is what vram_budget decides; leave one of them out", param=chosen[0])
    logger.info("vram_budget:\n%s", made.table())
    if card is not None and made.total > card.available:  # a warning: it may be of an engine that is just ending
        free, wanted = (amount / 2**30 for amount in (card.available, made.total))
        logger.warning("of the card only %.2f GiB are free, and vram_budget takes %.2f of it", free, wanted)
    return replace(
        setup,
        policy=made.policy.of_file(stored),
        device=setup.device if made.enrolment_device == "cuda" else "cpu",
        vocoder_process=made.vocoder_process,
        max_frames=made.vocoder_max_frames,
        t3={**setup.t3, **made.t3_arguments},
        plan=made,
        asked=setup,
    )


def _demand(setup: Setup) -> Demand:
    """What the budget has to hold. T3's card is the first one."""
    demand = Demand(
        setup.checkpoint,
        max_batch_size=setup.t3.get("max_num_seqs"),
        max_model_len=setup.t3["max_model_len"],
        vocoder_process=setup.vocoder_process,
        vocoder_on_card=any(device in {"cuda", "cuda:0"} for device in setup.vocoder_devices),
        vocoder_workers=len(setup.vocoder_devices),
        itemsize=4 if setup.t3.get("dtype") in ("float32", "float") else 2,
        vocoder_itemsize=4 if setup.vocoder_dtype == torch.float32 else 2,
    )
    if not torch.cuda.is_available():
        return demand
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    return replace(demand, multiprocessors=multiprocessors, step_graphs=has_step_graphs())


async def load(setup: Setup, *, strict: bool) -> tuple[Setup, Stages]:
    """Both stages, ready to speak, and how they were loaded in the end.

    Args:
        setup: settled.
        strict: raise where a strategy does not work, rather than fall back to the next that quantises less.
    """
    while True:
        try:
            return setup, await _loaded(setup)
        except (ConfigurationError, EngineError, MissingDependency) as error:
            if strict or not _is_of_quantization(error):
                raise
            weaker = _weaker(setup, error)
            logger.warning(
                "the strategy %s does not work here: %s; loading with %s",
                setup.policy.strategy,
                error,
                weaker.policy.strategy,
            )
            setup = weaker


def _weaker(setup: Setup, error: Exception) -> Setup:
    """Settled for the next strategy that loads something else: on a CPU, several are the same.

    Raises:
        Exception: ``error``, where there is none, or it is none for this machine.
    """
    policy = setup.policy
    while (weaker := policy.weaker()) is not None:
        try:
            following = settled(replace(setup.asked or setup, policy=weaker))
        except ConfigurationError as unfit:
            logger.warning("nor does the strategy %s: %s", weaker.strategy, unfit)
            raise error from unfit  # it is this that can be mended
        if any(getattr(following.policy, name) != getattr(setup.policy, name) for name in ("t3", *VOCODER)):
            return following
        policy = weaker
    raise error


def _is_of_quantization(error: Exception) -> bool:
    """Whether another method might do better."""
    if isinstance(error, MissingDependency):
        return error.package in _OF_QUANTIZATION
    return not isinstance(error, ConfigurationError) or error.param in _OF_QUANTIZATION


async def _loaded(setup: Setup) -> Stages:
    sharing = Mps() if setup.mps else None
    try:
        return Stages(*await _both(setup), sharing)
    except BaseException:
        if sharing is not None:
            await asyncio.to_thread(sharing.stop)
        raise


async def _both(setup: Setup) -> tuple[T3Generator, VocoderPool]:
    blueprint = partial(
        Blueprint,
        setup.checkpoint.s3gen,
        dtype=setup.vocoder_dtype,
        flow_encoder=setup.policy.flow_encoder,
        estimator=setup.policy.estimator,
        max_frames=setup.max_frames,
    )
    hosts = [setup.host(blueprint(device=device)) for device in setup.vocoder_devices]
    pool = VocoderPool(hosts)
    started = time.perf_counter()
    pool.start()
    logger.info("loading T3 (%s) from %s into vLLM", setup.checkpoint.variant, setup.checkpoint.folder)
    unwanted = Event()
    loading_t3 = asyncio.ensure_future(
        asyncio.to_thread(launch, setup.checkpoint.t3, unwanted=unwanted, **_t3_arguments(setup))
    )
    try:
        t3, _ = await asyncio.gather(asyncio.shield(loading_t3), pool.read())
        await t3.connect()
        for host in hosts:
            if isinstance(host, GuestHost):
                host.admit(partial(_admit, t3))
        logger.info("T3 is up after %.0f s; the vocoder follows", time.perf_counter() - started)
        await pool.ready()  # not earlier: T3 takes its share of a card's memory, the vocoder sees what is left
    except BaseException:
        unwanted.set()
        await asyncio.shield(asyncio.gather(_no_engine(loading_t3), pool.close(drain=False)))
        raise
    logger.info("ready after %.0f s", time.perf_counter() - started)
    return t3, pool


async def _admit(t3: T3Generator, path: str) -> None:
    """Lets the vocoder into T3's process."""
    await t3.call("admit_vocoder", path)


def _t3_arguments(setup: Setup) -> dict[str, Any]:
    frugal = {} if setup.plan is None else _FRUGAL
    return {
        "cache": cache_dir(),
        "method": setup.policy.t3,
        "extension": EXTENSION,
        "environment": frugal,
        **setup.t3,
    }


def components_of(setup: Setup, t3: T3Footprint, vocoders: Sequence[VocoderFootprint]) -> dict[str, dict[str, Any]]:
    """Component to its ``method``, how many ``layers`` are quantised, ``bytes`` and ``bytes_before``.

    T3 and vocoder are measured. The voice encoder, which comes with the first recording, is told from its file.
    """
    estimate = QuantizationMemoryEstimator(setup.checkpoint).estimate(setup.policy)
    sizes = {
        "t3": (t3.linear, t3.linear_before),
        **{
            name: tuple(sum(getattr(each, of).get(name, 0) for each in vocoders) for of in ("weights", "before"))
            for name in VOCODER
        },
        "voice_encoder": (estimate["voice_encoder"].after, estimate["voice_encoder"].before),
    }
    return {
        name: {
            "method": method,
            "layers": estimate[name].layers,
            "bytes": sizes[name][0],
            "bytes_before": sizes[name][1],
        }
        for name, method in setup.policy.methods.items()
    }


def log_applied(components: Mapping[str, Mapping[str, Any]]) -> None:
    """``[QUANTIZATION] Applied bnb-4bit to T3 ...``, a line for each component that is quantised."""
    for name, told in components.items():
        if told["method"] != Method.NONE:
            before, after = (told[key] / 2**20 for key in ("bytes_before", "bytes"))
            logger.info(
                "[QUANTIZATION] Applied %s to %s: %.1f MiB -> %.1f MiB", told["method"], _NAMES[name], before, after
            )


async def _no_engine(loading: asyncio.Future[T3Generator]) -> None:
    """Waits until the engine that is loading has failed, or ends it if it is up after all."""
    await asyncio.wait([loading])
    if not loading.cancelled() and loading.exception() is None:
        await asyncio.to_thread(loading.result().shutdown)
