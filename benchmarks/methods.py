"""What each way to quantise takes and gives, on one GPU: memory, T3's speed, the whole pipeline's, and the start.

    python benchmarks/methods.py --model full-demo --methods none int8 fp8 bnb-8bit bnb-4bit mixed --json methods.json
    chatterbox-vllm quantize full-demo full-awq
    python benchmarks/methods.py --model full-demo --methods none awq=full-awq --starts 3

A method is T3's (its vocoder is not quantised), or a strategy, which is for all networks; after a ``=`` it has a
checkpoint of its own. Each runs in a process of its own, under the same budget, so with the same KV cache, CUDA graphs
and batches. What a start takes is timed: run it twice, and the second time nothing is compiled or converted anew.
Between two starts of one method lies up to a fifth of its speed: with several ``--starts`` the methods take turns, and
their medians follow, and how much of the first one's that is.

Prints, in MiB: the weights of T3's linear layers, of all of T3, and of the vocoder; what torch had allocated at most in
all processes, and reserved in the end; and what NVML says of the whole card, so let nobody else be on it. Then T3's
tokens a second for each number of requests, and the pipeline with the largest of these at once, without watermark.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch

from chatterbox_vllm.bench.options import output, told
from chatterbox_vllm.bench.pipeline import Pipeline, timed_rounds
from chatterbox_vllm.bench.workload import random_voice
from chatterbox_vllm.checkpoint import resolve
from chatterbox_vllm.engine import AsyncChatterbox
from chatterbox_vllm.files import write_json
from chatterbox_vllm.quantization.policy import STRATEGIES
from chatterbox_vllm.t3.card import card_memory
from chatterbox_vllm.types import TOKEN_RATE, SpeechOptions

MIB = 2**20


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="demo")
    made.add_argument("--methods", nargs="+", default=["none", "int8", "fp8", "bnb-4bit"], help="or strategies")
    made.add_argument("--requests", type=int, nargs="+", default=[1, 16, 64], help="at once")
    made.add_argument("--tokens", type=int, default=250, help="of a request (default: %(default)s = 10 s)")
    made.add_argument("--rounds", type=int, default=2, help="measured, after one that is not counted")
    made.add_argument("--starts", type=int, default=1, help="of each method, in turns (default: %(default)s)")
    made.add_argument("--vram-budget", default="20GiB", help="(default: %(default)s)")
    made.add_argument("--max-model-len", type=int, default=512)
    made.add_argument("--max-batch-size", type=int, help="(default: the most requests)")
    made.add_argument("--json", type=output)
    return made


def measured(arguments: argparse.Namespace, method: str, model: str) -> dict[str, Any]:
    """One row."""
    return asyncio.run(run(arguments, method, model, card_bytes()))


async def run(arguments: argparse.Namespace, method: str, model: str, before: int) -> dict[str, Any]:
    checkpoint, most = resolve(model), max(arguments.requests)
    policy = STRATEGIES.get(method, method)
    started = time.perf_counter()
    engine = await AsyncChatterbox.start(
        checkpoint,
        quantization=policy,
        strict_quantization=True,
        vram_budget=arguments.vram_budget,
        max_batch_size=arguments.max_batch_size or most,
        max_model_len=arguments.max_model_len,
        watermark=False,
    )
    start_seconds = time.perf_counter() - started
    try:
        pipeline = Pipeline(engine, SpeechOptions(max_tokens=arguments.tokens))
        requests = pipeline.requests(most, random_voice(0))
        speeds = {}
        for count in arguments.requests:
            audio, seconds = await timed_rounds(pipeline.tokens, requests[:count], arguments.rounds)
            speeds[count] = TOKEN_RATE * audio / median(seconds[1:])
        audio, seconds = await timed_rounds(pipeline.sound, requests, arguments.rounds)
        memory, info = await engine.memory(), engine.quantization_info()
    finally:
        card = card_bytes() - before
        await engine.shutdown()
    parts = memory["components"]
    return {
        "components": info["components"],
        "t3_linear_bytes": parts["t3"],
        "t3_bytes": parts["t3"] + parts["t3_embeddings"],
        "vocoder_bytes": sum(size for name, size in parts.items() if not name.startswith("t3")),
        "peak_bytes": sum(each["peak"] for each in memory["processes"]),
        "reserved_bytes": sum(each["reserved"] for each in memory["processes"]),
        "card_bytes": card,
        "plan_bytes": sum(memory["items"].values()),
        "memory": memory,
        "tokens_per_second": speeds,
        "realtime_factor": audio / median(seconds[1:]),
        "start_seconds": start_seconds,
    }


def card_bytes() -> int:
    """In use on the whole of the first card."""
    total, free = card_memory()
    return total - free


def header(requests: Sequence[int]) -> str:
    speeds = " ".join(f"{f'T3 at {count}':>9}" for count in requests)
    return (
        f"{'method':>13} {'linear':>8} {'T3':>8} {'vocoder':>8} {'peak':>9} {'reserved':>9} {'card':>9} {'plan':>9} "
        f"{speeds} {'x real time':>12} {'start s':>8}"
    )


def line(row: dict[str, Any]) -> str:
    weights = " ".join(f"{row[f'{name}_bytes'] / MIB:>8,.1f}" for name in ("t3_linear", "t3", "vocoder"))
    memory = " ".join(f"{row[f'{name}_bytes'] / MIB:>9,.1f}" for name in ("peak", "reserved", "card", "plan"))
    speeds = " ".join(f"{speed:>9,.0f}" for speed in row["tokens_per_second"].values())
    rest = f"{row['realtime_factor']:>12.1f} {row['start_seconds']:>8.0f}"
    return f"{row['method']:>13} {weights} {memory} {speeds} {rest}"


def medians(rows: Sequence[dict[str, Any]], requests: Sequence[int]) -> list[str]:
    """Of T3's speeds, a line for each method, with their shares of the first one's."""
    speeds: dict[str, list[dict[int, float]]] = {}
    for row in rows:
        speeds.setdefault(row["method"], []).append(row["tokens_per_second"])
    middle = {
        name: {count: median(each[count] for each in found) for count in requests} for name, found in speeds.items()
    }
    first = next(iter(middle.values()))
    return [
        f"{name:>13} "
        + " ".join(f"T3 at {count}: {speed:,.0f} ({speed / first[count]:.2f})" for count, speed in found.items())
        for name, found in middle.items()
    ]


def main() -> None:
    arguments = parser().parse_args()
    print(header(arguments.requests), flush=True)
    rows = []
    for each in arguments.starts * arguments.methods:
        method, _, model = each.partition("=")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            row = alone.submit(measured, arguments, method, model or arguments.model).result()
        rows.append(row | {"method": each})
        print(line(rows[-1]), flush=True)
    if arguments.starts > 1:
        print("\n".join(medians(rows, arguments.requests)))
    write_json(arguments.json, {"device": torch.cuda.get_device_name(), "arguments": told(arguments), "results": rows})


if __name__ == "__main__":
    main()
