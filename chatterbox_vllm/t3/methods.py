"""What each quantisation method asks of vLLM, of the machine and of the checkpoint, checked before anything loads.

    method     weights come from                          runs on
    bnb-4bit   rounding while vLLM loads (its plugin)     NVIDIA GPUs; NF4, double quantisation, bfloat16 products
    bnb-8bit   a conversion in the cache                  NVIDIA GPUs (Marlin, Machete); weights only
    int8       a conversion in the cache                  NVIDIA GPUs (CUTLASS, Triton), CPUs (oneDNN)
    fp8        rounding while vLLM loads                  NVIDIA GPUs; weights only before compute capability 8.9
    awq        a checkpoint of ``chatterbox-vllm quantize``   NVIDIA GPUs (Marlin, ``four_bit``), CPUs in bfloat16

vLLM 0.32 has no online int8 for linear layers, hence the conversions. bnb-8bit is bitsandbytes' rounding with other
products: vLLM's plugin computes LLM.int8's by seven products a layer that wait for the host, without CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Final

from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins

from chatterbox_vllm.errors import ConfigurationError, MissingDependency
from chatterbox_vllm.quantization.policy import Method, QuantizationStrategy, without_gpu
from chatterbox_vllm.t3.config import T3Config
from chatterbox_vllm.upstream import PIP

CONVERTED: Final = frozenset({Method.INT8, Method.BNB_8BIT})
"""Methods for which an unquantised checkpoint is converted on first use."""
_HALF_ONLY: Final = frozenset({Method.BNB_4BIT, Method.BNB_8BIT, Method.INT8, Method.AWQ, Method.FP8})
"""Methods that have no float32 activations on a GPU."""


def method_arguments(method: str, config: T3Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's engine arguments for a method. A name that is not ours goes to vLLM as its ``quantization``.

    Args:
        given: the caller's engine arguments.

    Raises:
        ConfigurationError: this machine, the tensor parallelism or the dtype does not suit the method.
        MissingDependency: the method is bnb-4bit and vLLM's plugin for it is absent.
    """
    if method in _HALF_ONLY and given.get("dtype") in ("float32", "float") and not current_platform.is_cpu():
        raise ConfigurationError(f"quantization={method} needs dtype=bfloat16 or float16 on a GPU", param="dtype")
    match method:
        case Method.NONE:
            return {}
        case Method.BNB_4BIT:
            return _bnb_4bit()
        case Method.BNB_8BIT:
            _need_gpu(method, stored=getattr(config, "quantization_config", None) is not None)
            return {}
        case Method.INT8:
            return _int8(given.get("linear_backend"))
        case Method.FP8:
            return _fp8()
        case Method.AWQ:
            return _awq(config, _parallel(given), given.get("dtype", "auto"))
    return _of_vllm(method)


def _of_vllm(method: str) -> dict[str, Any]:
    load_general_plugins()  # some bring a method
    if method not in QUANTIZATION_METHODS:
        remedy = f"choose {', '.join(Method)}, or one of vLLM's own: {', '.join(QUANTIZATION_METHODS)}"
        if method.lower() in frozenset(QuantizationStrategy):
            remedy = "it is a strategy: give it as quantization_strategy"
        raise ConfigurationError(f"quantization={method} is no method; {remedy}", param="quantization")
    return {"quantization": method}


def _bnb_4bit() -> dict[str, Any]:
    _need_gpu(Method.BNB_4BIT)
    if find_spec("vllm_bnb_plugin") is None or find_spec("bitsandbytes") is None:
        command = f"{PIP} install 'vllm-bnb-plugin>=0.0.3,<0.1' 'bitsandbytes>=0.50.2,<0.51'"
        raise MissingDependency("vllm-bnb-plugin", purpose=f"for quantization={Method.BNB_4BIT}", command=command)
    return {"quantization": "bitsandbytes"}


def _int8(backend: object) -> dict[str, Any]:
    if backend is not None or current_platform.is_cpu() or not current_platform.has_device_capability(100):
        return {}
    return {"linear_backend": "triton"}  # vLLM's CUTLASS kernels have no int8 there


def _fp8() -> dict[str, Any]:
    _need_gpu(Method.FP8)
    # Older cards have no float8 products: Marlin widens the weights, of which it knows one scale a matrix.
    is_native = current_platform.has_device_capability(89)
    return {"quantization": "fp8_per_channel" if is_native else "fp8_per_tensor"}


def _awq(config: T3Config, ranks: int, dtype: object) -> dict[str, Any]:
    size = config.quantization_config["config_groups"]["group_0"]["weights"]["group_size"]
    for width in (config.hidden_size, config.intermediate_size):
        if width % (ranks * size):
            raise ConfigurationError(
                f"tensor_parallel_size={ranks} cuts through this checkpoint's groups of {size} inputs; "
                "use fewer GPUs, or quantise with a smaller --group-size",
                param="tensor_parallel_size",
            )
    if not current_platform.is_cpu():
        return {}
    if dtype not in ("auto", "bfloat16", "float16", "half"):
        raise ConfigurationError("a CPU computes awq in bfloat16; leave dtype out", param="dtype")
    return {"dtype": "bfloat16"} if dtype == "auto" else {}


def _parallel(given: Mapping[str, Any]) -> int:
    size = given.get("tensor_parallel_size", 1)
    return size if isinstance(size, int) and size > 0 else 1  # anything else is vLLM's to refuse


def _need_gpu(method: str, *, stored: bool = False) -> None:
    if current_platform.is_cpu():
        raise without_gpu(method, stored=stored)
