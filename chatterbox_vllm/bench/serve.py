"""``chatterbox-vllm bench serve``: load on a server with OpenAI's speech API, and what its listeners would hear.

It knows nothing of the server but its address, so that other servers are measured by the same rules, and it imports
neither torch nor vLLM, so that it runs anywhere. An answer that was refused, cut off, silent or no audio counts as
failed, never as a fast one. Our own server's ``/metrics`` and a local GPU's utilisation are read beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp

from chatterbox_vllm.bench import report, sentences, traffic
from chatterbox_vllm.bench.client import Answer, Transfer, answer, transfer
from chatterbox_vllm.bench.observers import Counters, Gpu, Lag
from chatterbox_vllm.bench.options import count, output, positive, told
from chatterbox_vllm.bench.report import Level
from chatterbox_vllm.errors import ConfigurationError, EngineError
from chatterbox_vllm.files import write_json

KEY: Final = "OPENAI_API_KEY"
"""Where OpenAI's clients look for the key."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="chatterbox-vllm bench serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=report.Level.__doc__,
    )
    server = made.add_argument_group("the server")
    server.add_argument("--url", default="http://127.0.0.1:8000", help="(default: %(default)s)")
    server.add_argument("--endpoint", default="/v1/audio/speech", help="(default: %(default)s)")
    server.add_argument("--api-key", default=os.environ.get(KEY), help=f"better: the variable {KEY}")
    server.add_argument("--timeout", type=positive, default=60.0, help="seconds without a byte that are a failure")
    server.add_argument("--gpu", type=int, default=0, help="NVML's number of a local server's card")
    asked = made.add_argument_group("each request")
    asked.add_argument("--model-name", default="chatterbox", help="the field model (default: %(default)s)")
    asked.add_argument("--voice", default="default", help="(default: %(default)s)")
    asked.add_argument("--response-format", choices=("pcm", "wav"), default="pcm", help="(default: %(default)s)")
    asked.add_argument("--seconds", type=positive, default=10.0, help="length of the built-in texts, about")
    asked.add_argument("--text-file", type=Path, help="texts, one a line, instead of the built-in ones")
    asked.add_argument("--max-tokens", type=int, help="the field max_tokens: 25 are a second of sound")
    asked.add_argument("--extra-body", type=_object, default={}, help="more fields, as JSON; null takes one away")
    load = made.add_argument_group("the load")
    load.add_argument("--arrival", choices=traffic.ARRIVALS, default="closed", help="(default: %(default)s)")
    load.add_argument("--concurrency", type=count, nargs="+", default=[1, 4, 16, 64], help="levels; closed and burst")
    load.add_argument("--rate", type=positive, nargs="+", help="levels of poisson: requests a second")
    load.add_argument(
        "--requests", type=count, help="of a level, at least one a client (default: 3 x its load, at least 16)"
    )
    load.add_argument("--ramp", type=float, default=1.0, help="closed: seconds over which the clients begin")
    load.add_argument(
        "--realtime-clients", action="store_true", help="closed: a client listens to the end before it asks again"
    )
    load.add_argument("--warmup", type=int, default=4, help="requests at once that are not counted")
    load.add_argument("--seed", type=int, default=0, help="of texts and random times")
    load.add_argument(
        "--find-max",
        action="store_true",
        help="the most clients without underrun or failure, from --concurrency's first",
    )
    load.add_argument("--find-max-limit", type=count, default=1024, help="the most that are tried")
    load.add_argument("--resolution", type=count, default=1, help="of --find-max, in clients")
    made.add_argument("--json", type=output, help="write everything here, each request included")
    made.add_argument("--plot", type=output, help=f"draw it ({', '.join(report.PLOTS)}); needs matplotlib")
    return made


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


class Bench:
    """Runs levels of load against one server.

    Args:
        arguments: those of ``parser``.
        session: connects to it.
    """

    def __init__(self, arguments: argparse.Namespace, session: aiohttp.ClientSession) -> None:
        self._arguments = arguments
        self._session = session
        self._base: str = arguments.url.rstrip("/")
        self._texts = _texts(arguments)
        self._gpu = Gpu.beside(arguments.url, arguments.gpu)
        self.levels: list[Level] = []
        self.details: list[dict[str, Any]] = []

    async def ask(self) -> Transfer:
        """The next request."""
        return await transfer(self._session, self._base + self._arguments.endpoint, self._body())

    def _body(self) -> dict[str, Any]:
        arguments = self._arguments
        fields = {
            "model": arguments.model_name,
            "input": next(self._texts),
            "voice": arguments.voice,
            "response_format": arguments.response_format,
            "stream": True,
            "max_tokens": arguments.max_tokens,
            **arguments.extra_body,
        }
        return {name: value for name, value in fields.items() if value is not None}

    async def warm_up(self) -> None:
        """Requests that are not counted.

        Raises:
            EngineError: none of them succeeded.
        """
        count = self._arguments.warmup
        answers = [answer(each) for each in await asyncio.gather(*(self.ask() for _ in range(count)))]
        reasons = {each.failure for each in answers}
        if answers and None not in reasons:
            why = ", ".join(sorted(str(reason) for reason in reasons))
            raise EngineError(f"{self._base} answered none of {count} requests to warm up: {why}")

    async def level(self, load: float) -> Level:
        """Runs one level and prints its row."""
        before = await Counters.read(self._session, self._base)
        async with Lag() as lag:
            answers, busy = await self._watched(load)
        after = await Counters.read(self._session, self._base)
        made = report.summary(load, answers, gpu_busy=busy, server=after.since(before), client_lag=lag.worst)
        self.levels.append(made)
        self.details.append(report.as_json(made, answers))
        print(report.row(made), flush=True)
        return made

    async def _watched(self, load: float) -> tuple[list[Answer], float | None]:
        if self._gpu is None:
            return await self._send(load), None
        with self._gpu.sampled() as busy:
            return await self._send(load), busy()

    async def _send(self, load: float) -> list[Answer]:
        arguments = self._arguments
        requests = arguments.requests or max(16, math.ceil(3 * load))
        if arguments.arrival == "poisson":
            return await traffic.poisson(self.ask, rate=load, requests=requests, seed=arguments.seed)
        requests = max(requests, int(load))  # fewer would not be that many clients
        if arguments.arrival == "burst":
            return await traffic.burst(self.ask, size=int(load), requests=requests)
        return await traffic.closed(
            self.ask, clients=int(load), requests=requests, ramp=arguments.ramp, listen=arguments.realtime_clients
        )

    async def holds(self, clients: int) -> bool:
        """Whether that many clients are all answered, and none hears a gap."""
        return (await self.level(clients)).holds


def _texts(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.text_file is None:
        return (sentences.text(seed, arguments.seconds) for seed in itertools.count(1_000_000 * arguments.seed))
    return itertools.cycle(sentences.read(arguments.text_file, "--text-file"))


def check(arguments: argparse.Namespace) -> None:
    """Refuses options that contradict each other, and a plot that could not be drawn.

    Raises:
        ConfigurationError, MissingDependency: with the remedy.
    """
    if arguments.arrival == "poisson" and not arguments.rate:
        raise ConfigurationError("--arrival poisson needs --rate, in requests a second", param="rate")
    if arguments.arrival != "poisson" and arguments.rate:
        raise ConfigurationError("--rate belongs to --arrival poisson; give --concurrency", param="rate")
    if arguments.arrival != "closed" and arguments.realtime_clients:
        raise ConfigurationError("--realtime-clients belongs to --arrival closed", param="realtime_clients")
    if arguments.arrival == "poisson" and arguments.find_max:
        raise ConfigurationError("--find-max counts clients; choose --arrival closed or burst", param="find_max")
    if arguments.plot is not None:
        report.check_plot(arguments.plot)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Warms up, runs every level, prints the table; the whole result."""
    headers = {"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=arguments.timeout, sock_read=arguments.timeout),
        headers=headers,
    ) as session:
        bench = Bench(arguments, session)
        await bench.warm_up()
        print(report.heading(), flush=True)
        most = None
        if arguments.find_max:
            most = await traffic.largest(
                bench.holds,
                start=arguments.concurrency[0],
                limit=arguments.find_max_limit,
                resolution=arguments.resolution,
            )
            print(f"the most clients without underrun or failure: {most}")
        else:
            for load in arguments.rate or arguments.concurrency:
                await bench.level(load)
    if arguments.plot is not None:
        axis = "requests a second" if arguments.arrival == "poisson" else "clients"
        report.plot(arguments.plot, bench.levels, title=f"{arguments.url}, {arguments.arrival}", axis=axis)
    return {"arguments": told(arguments), "most_clients": most, "levels": bench.details}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    check(arguments)
    result = asyncio.run(run(arguments))
    write_json(arguments.json, result)
    return 0
