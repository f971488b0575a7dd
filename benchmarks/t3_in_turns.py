"""T3's tokens a second in several methods whose rounds take turns, so that they share what the host does meanwhile.

    chatterbox-vllm demo-checkpoint full-demo --size full && chatterbox-vllm quantize full-demo full-awq
    python benchmarks/t3_in_turns.py --models full-demo full-awq --json turns.json

A host may be twice as fast in one round as in another, and starts differ, too (docs/benchmarks.md). Here all engines
are loaded at once, each in a process of its own, and one of them works at a time. Prints the medians of each, and of
the ratios to the first one's round before.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from statistics import median

from chatterbox_vllm.bench.options import count, output, told
from chatterbox_vllm.bench.t3 import speak
from chatterbox_vllm.checkpoint import cache_dir, resolve
from chatterbox_vllm.files import write_json
from chatterbox_vllm.quantization.policy import canonical
from chatterbox_vllm.t3.generator import T3Generator
from chatterbox_vllm.t3.launch import launch
from chatterbox_vllm.types import SpeechOptions

WARM_UP = 2
"""Rounds of each that are not counted."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", default=["demo"], metavar="MODEL", help="MODEL, or MODEL=METHOD")
    made.add_argument("--requests", type=count, default=64, help="at once (default: %(default)s)")
    made.add_argument("--tokens", type=count, default=250, help="a request (default: %(default)s = 10 s)")
    made.add_argument("--rounds", type=count, default=20, help=f"of each, after {WARM_UP} that are not counted")
    made.add_argument("--max-model-len", type=count, default=1024)
    made.add_argument("--json", type=output)
    return made


def launched(arguments: argparse.Namespace, named: str) -> T3Generator:
    """An engine with its share of the card."""
    model, _, method = named.partition("=")
    return launch(
        resolve(model).t3,
        cache=cache_dir(),
        method=canonical(method or None),
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.requests,
        gpu_memory_utilization=0.8 / len(arguments.models),
    )


async def seconds(t3: T3Generator, arguments: argparse.Namespace) -> float:
    """Of one round."""
    options = SpeechOptions(top_p=1.0, max_tokens=arguments.tokens)
    started = time.perf_counter()
    await speak(t3, arguments.requests, options)
    return time.perf_counter() - started


async def run(arguments: argparse.Namespace) -> list[list[float]]:
    """Seconds of each one's rounds, the same round at the same place."""
    engines: list[T3Generator] = []
    try:
        for named in arguments.models:
            t3 = await asyncio.to_thread(launched, arguments, named)
            engines.append(t3)
        rounds = [[await seconds(t3, arguments) for t3 in engines] for _ in range(WARM_UP + arguments.rounds)]
    finally:
        for t3 in engines:
            t3.shutdown()
    return [list(own) for own in zip(*rounds[WARM_UP:], strict=True)]


def lines(models: Sequence[str], times: Sequence[Sequence[float]], tokens: int) -> Sequence[str]:
    """A line for each, with how much of the first one's speed it keeps."""
    first = times[0]
    return [
        f"{name:>24} {tokens / median(own):>10,.0f} tokens/s, fastest {tokens / min(own):>10,.0f}, "
        f"of the first one's {median(one / other for one, other in zip(first, own, strict=True)):.3f}"
        for name, own in zip(models, times, strict=True)
    ]


def main() -> None:
    arguments = parser().parse_args()
    times = asyncio.run(run(arguments))
    print("\n".join(lines(arguments.models, times, arguments.requests * arguments.tokens)))
    write_json(arguments.json, {"arguments": told(arguments), "seconds": times})


if __name__ == "__main__":
    main()
