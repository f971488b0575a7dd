"""The products of one of T3's layers in 4 bits, by our kernel and by each of vLLM's that this machine has, and in 16.

    python benchmarks/four_bit_products.py --rows 2 16 32 64 128 256 512 2048 8192

Each is what vLLM's linear layers call, in a CUDA graph over thirty layers, so that weights come from the card's memory,
as in T3. A request has two rows in a step. Prints, for each number of rows, microseconds a layer: of its four matrices
(q, k and v; o; gate and up; down), one after the other.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from chatterbox_vllm.bench.options import count, output
from chatterbox_vllm.files import write_json
from chatterbox_vllm.quantization.packing import Stored
from chatterbox_vllm.t3 import four_bit

GROUP = 128
HIDDEN, INNER, LAYERS = 1024, 4096, 30
"""T3's."""
MATRICES = ((3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER))
"""Outputs and inputs."""
Product = Callable[[Tensor], Tensor]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rows", type=count, nargs="+", default=[2, 32, 128, 2048])
    made.add_argument("--layers", type=count, default=LAYERS)
    made.add_argument("--rounds", type=count, default=6, help="the fastest counts (default: %(default)s)")
    made.add_argument("--json", type=output)
    return made


class Quantised(nn.Module):
    """A matrix as vLLM loads it from a checkpoint of ``chatterbox-vllm quantize``."""

    def __init__(self, kernel: type[MPLinearKernel], weight: Tensor) -> None:
        super().__init__()
        tensors = Stored("awq", GROUP).encode("", weight)
        packed: dict[str, Any] = {"input_dim": 1, "output_dim": 0, "packed_factor": 8, "weight_loader": None}
        scale = tensors[".weight_scale"].to(torch.bfloat16)
        self.register_parameter("codes", PackedvLLMParameter(data=tensors[".weight_packed"], packed_dim=1, **packed))
        self.register_parameter(
            "scale", GroupQuantScaleParameter(data=scale, input_dim=1, output_dim=0, weight_loader=None)
        )
        self.register_parameter("zero", PackedvLLMParameter(data=tensors[".weight_zero_point"], packed_dim=0, **packed))
        self.kernel = kernel(config(*weight.shape), "codes", "scale", "zero")
        self.kernel.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel.apply_weights(self, x)


def config(outputs: int, inputs: int) -> MPLinearLayerConfig:
    shape, bits = (inputs, outputs), scalar_types.uint4
    return MPLinearLayerConfig(shape, shape, bits, torch.bfloat16, group_size=GROUP, zero_points=True)


def kernels() -> list[type[MPLinearKernel]]:
    """Those that can compute all four matrices here, in vLLM's order."""
    four_bit.offer()
    capability = current_platform.get_device_capability()
    least = capability.to_int() if capability else -1
    tried = linear._POSSIBLE_KERNELS[current_platform._enum]
    return [
        each
        for each in tried
        if each.get_min_capability() <= least and all(each.can_implement(config(*size))[0] for size in MATRICES)
    ]


def microseconds(layers: list[list[Product]], inputs: list[Tensor], rounds: int) -> float:
    """Of a layer, the fastest of the rounds."""

    def run() -> None:
        for layer in layers:
            for product, x in zip(layer, inputs, strict=True):
                product(x)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what compiles, does so before it is captured
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(layers))
    return min(times)


@torch.inference_mode()
def main() -> None:
    arguments = parser().parse_args()
    with socket.socket() as free, set_current_vllm_config(VllmConfig()):
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        free.close()
        init_distributed_environment(1, 0, address, 0)  # vLLM's parameters ask which part of a matrix they are
        initialize_model_parallel()
        device = current_platform.device_type
        draw = torch.Generator(device).manual_seed(0)
        weights = [
            [torch.randn(*size, device=device, generator=draw) / size[1] ** 0.5 for size in MATRICES]
            for _ in range(arguments.layers)
        ]
        ways: dict[str, list[list[Product]]] = {
            each.__name__: [[Quantised(each, weight) for weight in layer] for layer in weights] for each in kernels()
        }
        halves = [[weight.to(torch.bfloat16) for weight in layer] for layer in weights]
        ways["16 bits"] = [[lambda x, w=weight: nn.functional.linear(x, w) for weight in layer] for layer in halves]
        rows: dict[int, dict[str, float]] = {}
        for number in arguments.rows:
            inputs = [torch.randn(number, size, device=device, dtype=torch.bfloat16) for _, size in MATRICES]
            wanted = [product(x) for product, x in zip(ways["16 bits"][0], inputs, strict=True)]
            rows[number] = {}
            for name, layers in ways.items():
                for product, x, like in zip(layers[0], inputs, wanted, strict=True):
                    error = (product(x) - like).float().norm() / like.float().norm()
                    assert error < 0.2, f"{name} is wrong by {error:.2f}"  # 4 bits are, by about 0.1
                rows[number][name] = microseconds(layers, inputs, arguments.rounds)
            print(number, {name: round(time, 1) for name, time in rows[number].items()}, flush=True)
    write_json(arguments.json, {"device": torch.cuda.get_device_name(), "rows": rows})


if __name__ == "__main__":
    main()
