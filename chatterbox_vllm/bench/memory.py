"""``chatterbox-vllm memory``: what a GPU's memory would be spent on, computed; or what a server has spent it on.

Without --url it reads the headers of a checkpoint's files and loads nothing, on any machine. With --vram-budget it says
what would be chosen to fit, or what is missing.

With --url it has a running server speak, several requests at once, and then compares: the weights of each component
with what is computed for --model (within 5 %), and what torch has reserved of the card with the budget that the
server was started with. Exit status 1 says that one of them does not hold; with --json, also that a budget cannot hold
what was asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import aiohttp

from chatterbox_vllm import budget
from chatterbox_vllm.bench import sentences
from chatterbox_vllm.bench.options import count, positive, whole
from chatterbox_vllm.checkpoint import Checkpoint, Variant, resolve
from chatterbox_vllm.costs import Demand
from chatterbox_vllm.errors import ConfigurationError, EngineError
from chatterbox_vllm.memory import parse_bytes
from chatterbox_vllm.quantization import estimate
from chatterbox_vllm.quantization.policy import COMPONENTS, STRATEGIES, Method, Policy, QuantizationStrategy, canonical
from chatterbox_vllm.sources import load
from chatterbox_vllm.types import MAX_MODEL_LEN

TOLERANCE: Final = 0.05
"""How far what is computed may be from what is measured."""
_OF_COMPUTED: Final = (
    *("quantization", "quantization_strategy", "vram_budget", "max_batch_size", "max_model_len"),
    *("vocoder_elsewhere", "multiprocessors", "no_step_graphs"),
)
_OF_MEASURED: Final = ("requests", "seconds", "timeout")
"""Options that count without --url, and with it."""
_STRATEGIES: Final = (*STRATEGIES, str(QuantizationStrategy.AUTO))
_MEASURED: Final[Mapping[str, str]] = {
    **{name: name for name in ("t3", "t3_embeddings", "flow_encoder", "estimator", "hift")},
    "other": "vocoder_other",
}
"""What a server weighs, and what ``estimate.COMPONENTS`` calls it."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="chatterbox-vllm memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", help="as for serve: a folder, a name, demo (default: english; with --url none)")
    made.add_argument("--variant", choices=list(Variant), help="of a folder that holds several")
    made.add_argument("--json", action="store_true", help="print JSON instead of tables")
    computed = made.add_argument_group("computed")
    computed.add_argument("--quantization", metavar="METHOD", help=f"of T3: {', '.join(Method)}")
    computed.add_argument("--quantization-strategy", type=str.lower, choices=_STRATEGIES, help="of everything")
    computed.add_argument("--vram-budget", metavar="BYTES", help="for everything together, as 2GiB")
    computed.add_argument("--max-batch-size", type=count, metavar="N", help="utterances at once (default: what fits)")
    computed.add_argument("--max-model-len", type=_length, default=1024, metavar="N", help="positions (default: 1024)")
    computed.add_argument("--vocoder-elsewhere", action="store_true", help="the vocoder has another device")
    computed.add_argument(
        "--multiprocessors", type=count, default=132, metavar="N", help="of the card (default: 132, an H200's)"
    )
    computed.add_argument("--no-step-graphs", action="store_true", help="it is no Hopper GPU")
    live = made.add_argument_group("measured")
    live.add_argument("--url", help="of a running server, as http://127.0.0.1:8000")
    live.add_argument("--requests", type=count, default=4, help="that it speaks first, at once (default: %(default)s)")
    live.add_argument("--seconds", type=positive, default=10.0, help="of each (default: %(default)s)")
    live.add_argument("--timeout", type=positive, default=300.0, help="seconds for them (default: %(default)s)")
    return made


def computed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Weights under each strategy, and with a budget each strategy's plan. Prints tables, or nothing for JSON.

    Raises:
        CheckpointError, ConfigurationError: the latter, too, where the budget cannot hold what was asked for; with
            --json that is one of the ``failures``.
    """
    demand = Demand(
        _checkpoint(arguments),
        max_batch_size=arguments.max_batch_size,
        max_model_len=arguments.max_model_len,
        vocoder_on_card=not arguments.vocoder_elsewhere,
        multiprocessors=arguments.multiprocessors,
        step_graphs=not arguments.no_step_graphs,
    )
    asked = _policy(arguments)
    estimates = demand.estimator.compare_strategies()
    if asked is not None and asked.strategy is None:
        estimates[asked.t3] = demand.estimator.estimate(asked)
    result: dict[str, Any] = {"weights": {name: _weights(each) for name, each in estimates.items()}}
    _print(arguments, estimate.table(estimates.values()))
    if arguments.vram_budget is None:
        return result
    available = parse_bytes(arguments.vram_budget)
    plans = budget.compare(available, demand)
    result["fits"] = {name: _summary(each) for name, each in plans.items()}
    _print(arguments, "\n" + "\n".join(f"{name:<14}{_told(each)}" for name, each in plans.items()))
    try:
        chosen = budget.plan(available, demand, asked or Policy(strategy=QuantizationStrategy.AUTO))
    except ConfigurationError as error:
        if not arguments.json:
            raise
        return result | {"plan": _summary(error), "failures": [str(error)]}
    _print(arguments, f"\n{chosen.policy.strategy or chosen.policy.method}\n{chosen.table()}")
    result["plan"] = _summary(chosen) | {
        "policy": chosen.policy.methods,
        "items": {item.name: item.bytes for item in chosen.items},
        "t3_arguments": dict(chosen.t3_arguments),
    }
    return result


async def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Has the server speak and compares what it then says of its memory. ``failures`` is empty if all is well.

    Raises:
        EngineError: the server does not answer, or not as ours does.
    """
    checkpoint = None if arguments.model is None else _checkpoint(arguments)
    key = load().api_key
    headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=arguments.timeout)
    try:
        async with aiohttp.ClientSession(arguments.url.rstrip("/") + "/", headers=headers, timeout=timeout) as session:
            texts = [sentences.text(number, arguments.seconds) for number in range(arguments.requests)]
            await asyncio.gather(*(_answer(session, "/v1/audio/speech", {"input": text}) for text in texts))
            config = json.loads(await _answer(session, "/config"))
            memory = json.loads(await _answer(session, "/memory"))
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise EngineError(f"{arguments.url} cannot be asked: {type(error).__name__}: {error}") from error
    try:
        expected = {} if checkpoint is None else _expected(checkpoint, config, memory)
        failures = [*_over_budget(memory), *_unlike(memory["components"], expected)]
    except (KeyError, TypeError) as error:
        raise EngineError(f"{arguments.url} does not answer as this server does: {error} is missing") from error
    for name, amount in memory["memory_info"].items():
        _print(arguments, f"{name:<32}{amount:>12,.1f}")
    for process in memory["processes"]:
        sizes = (f"{name} {process[name] / 2**20:,.1f}" for name in ("weights", "allocated", "peak", "reserved"))
        _print(arguments, f"{process['name']}, MiB: {', '.join(sizes)}")
    for name, size in memory["components"].items():
        computed = f"{expected[name] / 2**20:>12,.1f}" if name in expected else ""
        _print(arguments, f"{name:<20}{size / 2**20:>12,.1f}{computed}")
    _print(arguments, "\n".join(failures) or "all is well")
    return {"config": config, "memory": memory, "expected": expected, "failures": failures}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    _check_options(arguments)
    result = computed(arguments) if arguments.url is None else asyncio.run(measured(arguments))
    if arguments.json:
        print(json.dumps(result, indent=1))
    return 1 if result.get("failures") else 0


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuses what would have no effect.

    Raises:
        ConfigurationError: an option of the other kind is given, or the address is none.
    """
    idle, why = (_OF_MEASURED, "needs --url") if arguments.url is None else (_OF_COMPUTED, "does not go with --url")
    unset = parser()
    for name in idle:
        if getattr(arguments, name) != unset.get_default(name):
            raise ConfigurationError(f"--{name.replace('_', '-')} {why}; leave it out", param=name)
    if arguments.url is not None and not arguments.url.startswith(("http://", "https://")):
        raise ConfigurationError(f"--url={arguments.url} is no address; write http://127.0.0.1:8000", param="url")


def _length(text: str) -> int:
    """What ``serve`` takes for ``max_model_len``."""
    length = whole(text)
    if not budget.SHORTEST <= length <= MAX_MODEL_LEN:
        raise argparse.ArgumentTypeError(f"must be from {budget.SHORTEST} to {MAX_MODEL_LEN}")
    return length


def _checkpoint(arguments: argparse.Namespace) -> Checkpoint:
    return resolve(arguments.model or "english", Variant(arguments.variant) if arguments.variant else None)


def _policy(arguments: argparse.Namespace) -> Policy | None:
    """None where nothing was asked for."""
    if arguments.quantization and arguments.quantization_strategy:
        raise ConfigurationError(
            "--quantization and --quantization-strategy both say how T3 is quantised; give one", param="quantization"
        )
    if arguments.quantization:
        method = canonical(arguments.quantization, "--quantization")
        if method not in frozenset(Method):
            raise ConfigurationError(
                f"--quantization={method}: nobody has counted what it saves; there are {', '.join(Method)}",
                param="quantization",
            )
        return Policy(t3=method)
    name = arguments.quantization_strategy
    return STRATEGIES.get(name, Policy(strategy=name)) if name else None


def _weights(estimated: estimate.Estimate) -> dict[str, Any]:
    return {part.component: asdict(part) for part in estimated.parts}


def _summary(made: budget.Plan | ConfigurationError) -> dict[str, Any]:
    if isinstance(made, ConfigurationError):
        return {"fits": False, "reason": str(made)}
    return {
        "fits": True,
        "bytes": made.total,
        "max_batch_size": made.max_batch_size,
        "max_model_len": made.max_model_len,
        "vocoder_max_frames": made.vocoder_max_frames,
        "vocoder_process": made.vocoder_process,
        "enrolment_device": made.enrolment_device,
    }


def _told(made: budget.Plan | ConfigurationError) -> str:
    if isinstance(made, ConfigurationError):
        return str(made).partition(" for ")[0]
    where = "a process of its own" if made.vocoder_process else "T3's process"
    vocoder = "elsewhere" if made.vocoder_max_frames is None else f"{made.vocoder_max_frames} frames in {where}"
    return (
        f"fits: {made.total / 2**20:,.0f} MiB, {made.max_batch_size} at once, vocoder {vocoder}, "
        f"enrolment on {made.enrolment_device}"
    )


async def _answer(session: aiohttp.ClientSession, path: str, body: Mapping[str, Any] | None = None) -> bytes:
    """Of a GET, or of a POST with a body."""
    async with session.request("GET" if body is None else "POST", path, json=body) as response:
        content = await response.read()
        if response.status != 200:
            raise EngineError(f"{path} answered {response.status}: {content[:200].decode(errors='replace')}")
        return content


def _expected(checkpoint: Checkpoint, config: Mapping[str, Any], memory: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of each component by computation."""
    on_cpu = not any(process["allocated"] for process in memory["processes"])
    methods = {name: part["method"] for name, part in config["components"].items() if name in COMPONENTS}
    given = config["settings"]
    estimator = estimate.QuantizationMemoryEstimator(
        checkpoint,
        itemsize=_itemsize(given["dtype"], in_full=on_cpu and methods["t3"] != Method.AWQ),
        vocoder_itemsize=_itemsize(given["vocoder_dtype"], in_full=on_cpu),
    )
    estimated = estimator.estimate(Policy(**methods))
    workers = sum("vocoder" in process["name"] for process in memory["processes"])
    found = {name: estimated[component].after for name, component in _MEASURED.items()}
    if on_cpu:  # where nothing is computed beforehand
        found["estimator"] += estimated["estimator_time"].after
    return {name: size * (1 if name.startswith("t3") else workers) for name, size in found.items()}


def _itemsize(dtype: str | None, *, in_full: bool) -> int:
    """Bytes of a number; ``in_full`` is what a server does that is not told a dtype."""
    return 4 if dtype in ("float32", "float") or (in_full and dtype in (None, "auto")) else 2


def _over_budget(memory: Mapping[str, Any]) -> list[str]:
    """By what torch holds, used or not; it may have given some back since its peak."""
    held = sum(max(process["reserved"], process["peak"]) for process in memory["processes"])
    if memory["budget"] is None or held <= memory["budget"]["bytes"]:
        return []
    return [f"torch has reserved {held:,} bytes, and the budget is {memory['budget']['bytes']:,}"]


def _unlike(measured: Mapping[str, int], expected: Mapping[str, int]) -> list[str]:
    return [
        f"{name}: {measured.get(name, 0):,} bytes measured, {size:,} computed"
        for name, size in expected.items()
        if abs(measured.get(name, 0) - size) > TOLERANCE * max(measured.get(name, 0), size)
    ]


def _print(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.json:
        print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
