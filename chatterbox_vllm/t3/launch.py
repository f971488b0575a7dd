"""Starts vLLM's engine for a T3 checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, Thread
from types import MappingProxyType
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor
from vllm import AsyncEngineArgs, envs
from vllm.platforms import current_platform
from vllm.utils.system_utils import kill_process_tree
from vllm.v1.engine.async_llm import AsyncLLM

from chatterbox_vllm.errors import ConfigurationError, EngineError
from chatterbox_vllm.memory import memory
from chatterbox_vllm.quantization.packing import Stored
from chatterbox_vllm.quantization.policy import Method, effective_method
from chatterbox_vllm.quiet import NEEDLESS
from chatterbox_vllm.t3.conditioning import VoiceConditioner
from chatterbox_vllm.t3.config import T3Config
from chatterbox_vllm.t3.conversion import converted
from chatterbox_vllm.t3.folder import infer_config, model_folder
from chatterbox_vllm.t3.generator import T3Generator
from chatterbox_vllm.t3.graph_sizes import LARGEST, step_graph_sizes
from chatterbox_vllm.t3.methods import CONVERTED, method_arguments
from chatterbox_vllm.t3.orphans import CORE
from chatterbox_vllm.t3.prompt import LEAST_MODEL_LEN
from chatterbox_vllm.t3.worker import EXTENSION
from chatterbox_vllm.types import MAX_MODEL_LEN

# What the design rests on: RoPE depends on the prompt's length, prompts arrive processed, and there is no tokenizer.
FIXED: Mapping[str, Any] = {
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "mm_processor_cache_gb": 0,
    "limit_mm_per_prompt": {"voice": 1},
}
_SPLITS = 1
"""Utterances are short: to split one's keys among thread blocks costs each layer a kernel more, and gains nothing."""
_GRAPHS = {"compilation_config", "cudagraph_capture_sizes", "max_cudagraph_capture_size", "enforce_eager"}
"""Arguments that say which CUDA graphs there are: with one of the caller's, none of ours."""
_REQUESTS = 256
# T3 shares the card with the vocoder; on a CPU this share of the free memory is the most the KV cache takes.
CPU_CACHE_SHARE = 0.4
_NO_SHARE = 0.001
_LONGEST_DRAIN = 3600
"""Seconds: a SIGTERM for all processes, as systemd sends it, is for our own; vLLM's go on until it ends them."""
_CPU_BLOCK = 128
"""Positions in a block of the KV cache, vLLM's default there."""

_LAUNCHING = Lock()
"""What ``launch`` changes while vLLM starts its processes belongs to this whole process."""
_LOOK = 0.1
"""Seconds between looks for a process that is not wanted any more."""


def launch(
    weights: Path,
    *,
    cache: Path,
    mask_invalid_tokens: bool = True,
    method: str = Method.NONE,
    extension: str = EXTENSION,
    environment: Mapping[str, str] = MappingProxyType({}),
    unwanted: Event | None = None,
    **engine_args: Any,
) -> T3Generator:
    """Loads T3 into a new vLLM engine; takes from seconds to minutes.

    Args:
        weights: the checkpoint's T3 file. One that is quantised is served as it is.
        cache: where the folder that vLLM loads is made, and conversions are kept.
        mask_invalid_tokens: False samples exactly upstream's distribution, ids that are no sound included.
        method: how the linear layers are quantised (``methods``), or a name of vLLM's own for its ``quantization``.
        extension: vLLM's ``worker_extension_cls``, a subclass of ``worker.WorkerExtension``.
        environment: variables of the engine's processes, unless they are set already.
        unwanted: once it is set, an engine that is still starting is ended, which fails as if it had not come up.
        engine_args: any other ``vllm.AsyncEngineArgs``.

    Raises:
        CheckpointError: the file is not a T3 checkpoint.
        ConfigurationError: an engine argument is unknown, fixed by the design, or out of range; or the method does
            not suit the machine, the checkpoint or another argument.
        MissingDependency: the method is bitsandbytes' and vLLM's plugin for it is absent.
        EngineError: vLLM's processes did not come up; they log why.
    """
    config = infer_config(weights, mask_invalid_tokens=mask_invalid_tokens)
    stored = Stored.of(weights)
    method = effective_method(stored, method)
    arguments = engine_arguments(config, engine_args, method) | {"worker_extension_cls": extension}
    loaded = weights
    if method in CONVERTED and stored.method == Method.NONE:
        loaded = converted(weights, method, config, cache)
        config = infer_config(loaded, mask_invalid_tokens=mask_invalid_tokens)
    folder = model_folder(loaded, config, cache)
    logging.getLogger("vllm").setLevel(_log_level())
    with (
        _LAUNCHING,
        _environment(_worker_environment(environment)),
        _main_module_hidden(),
        _interrupts_blocked(),
        _ended_if(unwanted or Event()),
    ):
        llm = _started(folder, arguments)
    conditioner = VoiceConditioner(_conditioning_tensors(weights), dtype=llm.vllm_config.model_config.dtype)
    return T3Generator(llm, config, conditioner, method=method)


def engine_arguments(config: T3Config, given: Mapping[str, Any], method: str = Method.NONE) -> dict[str, Any]:
    """vLLM's arguments: what T3 needs, defaults for this machine, and the caller's choices.

    Raises:
        ConfigurationError, MissingDependency: as ``launch``.
    """
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in given:
        if name in FIXED or name in {"model", "worker_extension_cls"}:
            raise ConfigurationError(f"{name} is fixed by the way T3 runs in vLLM; leave it out", param=name)
        if name == "quantization" and given[name] is not None:
            raise ConfigurationError("T3's quantization is launch's method, not an engine argument", param=name)
        if name not in known:
            raise ConfigurationError(f"{name} is neither ours nor an argument of vllm.AsyncEngineArgs", param=name)
    length = given.get("max_model_len", 2048)
    if not isinstance(length, int) or not LEAST_MODEL_LEN <= length <= MAX_MODEL_LEN:
        raise ConfigurationError(
            f"max_model_len must be an integer from {LEAST_MODEL_LEN} to {MAX_MODEL_LEN}, not {length!r}",
            param="max_model_len",
        )
    of_method = method_arguments(method, config, given)
    defaults = {"dtype": default_dtype(), "max_model_len": length, "disable_log_stats": True}
    defaults |= {"use_tqdm_on_load": False, "shutdown_timeout": _LONGEST_DRAIN, **FIXED}
    defaults["attention_config"] = {"flash_attn_max_num_splits_for_cuda_graph": _SPLITS}
    if current_platform.is_cpu():
        # Compiling takes a CPU a minute and gains 15%.
        defaults["enforce_eager"] = True
        # vLLM's CPU runner fails on a seeded request whose prefill is cut in two, and takes the engine with it.
        defaults |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(length, 2048)}
        if "kv_cache_memory_bytes" not in given and "num_gpu_blocks_override" not in given:
            block, requests = _count(given, "block_size", _CPU_BLOCK), _count(given, "max_num_seqs", 32)
            defaults["kv_cache_memory_bytes"] = _cpu_cache_bytes(config, length, requests, block)
    elif has_step_graphs() and not _GRAPHS & given.keys():
        defaults["compilation_config"] = {"cudagraph_mode": "FULL"}
        requests, positions = _count(given, "max_num_seqs", _REQUESTS), _count(given, "max_num_batched_tokens", LARGEST)
        defaults["cudagraph_capture_sizes"] = step_graph_sizes(requests, positions)
    if not current_platform.is_cpu() and given.get("kv_cache_memory_bytes") is not None:
        # The cache's size is settled; a share of the card would only be compared with what is free at the start.
        of_method["gpu_memory_utilization"] = _NO_SHARE
    return {**defaults, **given, **of_method}


def _count(given: Mapping[str, Any], name: str, otherwise: int) -> int:
    """What is given by that name; where it is no number, vLLM says so."""
    value = given.get(name)
    return value if isinstance(value, int) and value > 0 else otherwise


def has_step_graphs() -> bool:
    """Whether a step that reads prompts can be one graph, which takes FlashAttention 3, and ``graphs.StepGraphs``."""
    return current_platform.is_device_capability_family(90) and envs.VLLM_USE_V2_MODEL_RUNNER is not False


@contextmanager
def _ended_if(unwanted: Event) -> Iterator[None]:
    """Inside, an engine that is being started ends once ``unwanted`` is set: vLLM waits for it, and cannot be told."""
    others = {child.pid for child in multiprocessing.active_children()}
    over = Event()

    def look() -> None:
        while not over.wait(_LOOK):
            if unwanted.is_set():
                for child in multiprocessing.active_children():
                    if child.name.startswith(CORE) and child.pid is not None and child.pid not in others:
                        kill_process_tree(child.pid)

    looking = Thread(target=look, name="unwanted", daemon=True)
    looking.start()
    try:
        yield
    finally:
        over.set()
        looking.join()


def _started(folder: Path, arguments: Mapping[str, Any]) -> AsyncLLM:
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), **arguments))
    except ValueError as error:  # before vLLM has started a process
        raise _refused(error, arguments) from error
    except RuntimeError as error:
        raise EngineError(f"vLLM's engine for T3 did not start: {error}") from error


def _refused(error: ValueError, arguments: Mapping[str, Any]) -> ConfigurationError:
    """vLLM's complaint about an argument, as a sentence that begins with the argument's name."""
    complaint = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        complaint = first["msg"].removeprefix("Value error, ")
        if placed := [name for name in first["loc"] if name in arguments]:
            name = str(placed[0])
            return ConfigurationError(f"{name}: {complaint}, not {arguments[name]!r:.80}", param=name)
    if "Cannot find the config file for" in complaint:
        method = arguments["quantization"]
        told = f"quantization={method} needs a checkpoint made for it; give one, or choose {', '.join(Method)}"
        return ConfigurationError(f"{told} ({complaint})", param="quantization")
    named = [name for name in arguments if name in complaint]
    first_named = min(named, key=complaint.index, default=None)
    return ConfigurationError(f"{first_named or 'vLLM refuses its arguments'}: {complaint}", param=first_named)


def default_dtype() -> str:
    """bfloat16 where the card has it, float16 on older ones, float32 on a CPU."""
    if current_platform.is_cpu():
        return "float32"
    return "bfloat16" if current_platform.has_device_capability(80) else "float16"


def cache_bytes_per_position(config: T3Config, itemsize: int) -> int:
    """KV bytes of one position: keys and values of both halves of the guidance."""
    return config.num_hidden_layers * 2 * 2 * config.hidden_size * itemsize


def _cpu_cache_bytes(config: T3Config, length: int, requests: int, block: int) -> int:
    blocks = -(-length // block) + 1  # vLLM keeps one that is never used
    one = cache_bytes_per_position(config, itemsize=4) * blocks * block
    free = int(memory().available * CPU_CACHE_SHARE)
    if one > free:
        raise ConfigurationError(
            f"max_model_len={length} needs {one / 2**30:.1f} GiB of KV cache for one request and "
            f"{free / 2**30:.1f} GiB may be used; lower max_model_len or free memory",
            param="max_model_len",
        )
    return min(one * requests, free)


def _log_level() -> str:
    # vLLM warns of each of this design's choices, and of much that a speech server's user cannot change.
    return os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")


def _worker_environment(more: Mapping[str, str]) -> dict[str, str]:
    wanted = {
        **more,
        # A forked engine hangs when this process has already run threaded torch work.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MOE_SKIP_PADDING": "0",  # two kernels a step for experts, of which there are none
        "VLLM_LOGGING_LEVEL": _log_level(),
        # vLLM's own, in each of its processes; and that one which is ended while it ends left shared memory behind,
        # which whoever says so removes.
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore:resource_tracker:UserWarning",
    }
    if current_platform.is_cpu():
        wanted |= {
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "TORCH_LOGS": ",".join(f"-{name}" for name in NEEDLESS),
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # that the memory is bound to the CPU's own node is no warning
        }
    return {name: value for name, value in wanted.items() if name not in os.environ}


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    os.environ.update(more)
    try:
        yield
    finally:
        for name in more:
            os.environ.pop(name, None)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """vLLM's processes inherit the mask: Ctrl-C reaches a whole process group, and we end them in order."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Spawned processes would run the caller's script again if it lacks an ``if __name__ == "__main__"``."""
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    main.__spec__ = None
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _conditioning_tensors(weights: Path) -> dict[str, Tensor]:
    with safe_open(weights, "pt") as file:
        return {
            key: file.get_tensor(key).to(torch.float32)
            for key in file.keys()  # noqa: SIM118
            if VoiceConditioner.wanted(key)
        }
