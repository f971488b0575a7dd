"""``chatterbox-vllm bench t3``: speech tokens a second of T3 alone, by how many requests run at once."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from chatterbox_vllm.bench.options import count, output, told
from chatterbox_vllm.bench.workload import TEXT_TOKENS, random_text, random_voice
from chatterbox_vllm.checkpoint import cache_dir, resolve
from chatterbox_vllm.files import write_json
from chatterbox_vllm.quantization.policy import canonical
from chatterbox_vllm.t3.generator import T3Generator
from chatterbox_vllm.t3.launch import launch
from chatterbox_vllm.t3.prompt import STREAM_INTERVAL
from chatterbox_vllm.types import TOKEN_RATE, SpeechOptions


@dataclass(frozen=True)
class Result:
    """One row: ``requests`` at once, the median of the rounds.

    ``first_token_ms`` is the median over the requests of the time from asking to the first token.
    """

    requests: int
    tokens: int
    tokens_per_second: float
    realtime_factor: float
    step_ms: float
    first_token_ms: float


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="chatterbox-vllm bench t3", description=__doc__)
    made.add_argument("--model", default="demo", help="as for serve: a folder, a name, demo (default: %(default)s)")
    made.add_argument("--requests", type=count, nargs="+", default=[1, 16, 64, 256], help="how many run at once")
    made.add_argument("--tokens", type=count, default=250, help="tokens a request (default: %(default)s = 10 s)")
    made.add_argument("--rounds", type=count, default=3, help="measured rounds a row, after one warm-up")
    made.add_argument("--top-p", type=float, default=0.95, help="(default: %(default)s; a server's default is 1)")
    made.add_argument("--quantization", help="handed to vLLM, for instance bitsandbytes")
    made.add_argument("--max-model-len", type=int, default=1024)
    made.add_argument("--gpu-memory-utilization", type=float, default=0.8)
    made.add_argument("--engine-args", type=json.loads, default={}, help="more vLLM engine arguments, as JSON")
    made.add_argument("--json", type=output, help="write the results here, too")
    return made


async def measure(t3: T3Generator, requests: int, options: SpeechOptions, rounds: int) -> Result:
    """Runs ``rounds`` rounds of ``requests`` concurrent utterances, which speak all tokens that they may."""
    await speak(t3, requests, options.but(max_tokens=min(options.max_tokens, 50)))
    seconds, spoken, firsts = [], 0, []
    for _ in range(rounds):
        started = time.perf_counter()
        counts, waits = await speak(t3, requests, options)
        seconds.append(time.perf_counter() - started)
        spoken = sum(counts)
        firsts += waits
    rate = spoken / median(seconds)
    return Result(requests, spoken, rate, rate / TOKEN_RATE, 1000 * requests / rate, 1000 * median(firsts))


async def speak(t3: T3Generator, requests: int, options: SpeechOptions) -> tuple[list[int], list[float]]:
    """So many utterances at once, of all the tokens that ``options`` allow: how many they got, seconds to the first."""
    voice = random_voice(0)

    async def one(index: int) -> tuple[int, float]:
        count, first, started = 0, 0.0, time.perf_counter()
        text = random_text(index, t3.text_vocabulary)
        async for new in t3.tokens(text, voice, options, interval=STREAM_INTERVAL, min_tokens=options.max_tokens):
            first = first or time.perf_counter() - started
            count += len(new)
        return count, first

    results = await asyncio.gather(*(one(i) for i in range(requests)))
    return [count for count, _ in results], [first for _, first in results]


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts an engine, measures every row, prints the table."""
    started = time.perf_counter()
    t3 = await asyncio.to_thread(
        launch,
        resolve(arguments.model).t3,
        cache=cache_dir(),
        method=canonical(arguments.quantization),
        max_model_len=arguments.max_model_len,
        max_num_seqs=max(arguments.requests),
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        **arguments.engine_args,
    )
    load_seconds = time.perf_counter() - started
    try:
        results, options = [], SpeechOptions(top_p=arguments.top_p, max_tokens=arguments.tokens)
        print(f"{'requests':>8} {'tokens/s':>10} {'x real time':>12} {'step ms':>8} {'first token ms':>15}")
        for requests in arguments.requests:
            row = await measure(t3, requests, options, arguments.rounds)
            results.append(row)
            print(
                f"{row.requests:>8} {row.tokens_per_second:>10,.0f} {row.realtime_factor:>12,.1f} "
                f"{row.step_ms:>8.2f} {row.first_token_ms:>15.1f}",
                flush=True,
            )
    finally:
        t3.shutdown()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "text_tokens": TEXT_TOKENS,
        "load_seconds": load_seconds,
        "arguments": told(arguments),
        "results": [asdict(row) for row in results],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    report = asyncio.run(run(arguments))
    write_json(arguments.json, report)
    return 0
