"""Our vocoder against upstream's S3Gen on this CPU, in one run, with random weights of full size.

    python benchmarks/cpu_vocoder.py --seconds 1 2 5 --json cpu.json

Both speak the same tokens in the same voice, flow and HiFT; upstream's is float32. They take turns, ours first in every
other round, so that what else the machine does falls on both; the ratio is of the medians, and ``fastest`` the ratio of
the shortest times. ``flow`` and ``hift`` are their shares: of ours, what is left is noise and bookkeeping, which
upstream's two shares contain. The first round is not counted.

Needs upstream's wheel (``pip install --no-deps chatterbox-tts==0.1.7 s3tokenizer==0.3.0``).
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from chatterbox_vllm.bench.options import output, told
from chatterbox_vllm.bench.workload import random_speech, random_voice
from chatterbox_vllm.demo_checkpoint import networks
from chatterbox_vllm.demo_checkpoint.weights import draw
from chatterbox_vllm.files import write_json
from chatterbox_vllm.types import TOKEN_RATE, VoiceFeatures
from chatterbox_vllm.vocoder import weights
from chatterbox_vllm.vocoder.stage import Vocoder

Shares = defaultdict[str, float]
"""Seconds by name."""
FILE = "s3gen.safetensors"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seconds", type=float, nargs="+", default=[2.0], help="of sound (default: 2)")
    made.add_argument("--reference-seconds", type=float, default=4.0)
    made.add_argument("--steps", type=int, default=10)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's (default: %(default)s)")
    made.add_argument("--size", choices=networks.SIZES, default="full")
    made.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="our vocoder_dtype")
    made.add_argument("--json", type=output)
    return made


def both(size: networks.Size, *, dtype: str) -> tuple[Any, Vocoder]:
    """Upstream's network and ours, with the weights that ``demo-checkpoint`` would draw."""
    theirs: Any = networks.s3gen(size)
    own = {name: like for name, like in theirs.state_dict().items() if name.startswith(("flow.", "mel2wav."))}
    for name, tensor in own.items():
        tensor.copy_(draw(FILE, name, tensor, 0))
    number = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    return theirs, Vocoder(weights.build(own, Path(FILE)), dtype=number, exact=dtype == "float32")


def upstream_reference(voice: VoiceFeatures) -> dict[str, Any]:
    return {
        "prompt_token": voice.prompt_tokens[None],
        "prompt_token_len": torch.tensor([len(voice.prompt_tokens)]),
        "prompt_feat": voice.prompt_mel[None],
        "prompt_feat_len": None,
        "embedding": voice.x_vector[None],
    }


@contextmanager
def shares(parts: dict[str, list[tuple[Any, str]]]) -> Iterator[Shares]:
    """Adds up the time within the methods (object, name) of each part."""
    spent: Shares = defaultdict(float)

    def timed(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = method(*args, **options)
            spent[part] += time.perf_counter() - started
            return result

        return call

    with ExitStack() as patches:
        for part, methods in parts.items():
            for owner, name in methods:
                patches.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        yield spent


def measured(speak: Callable[[], torch.Tensor], parts: dict[str, list[tuple[Any, str]]]) -> Shares:
    """One utterance's time and its shares."""
    with shares(parts) as spent:
        started = time.perf_counter()
        speak()
        spent["total"] = time.perf_counter() - started
    return spent


def compare(theirs: Any, ours: Vocoder, seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """The rounds of one length."""
    tokens = random_speech(0, round(TOKEN_RATE * seconds))
    voice = random_voice(0, prompt_tokens=round(TOKEN_RATE * arguments.reference_seconds))
    reference = upstream_reference(voice)

    def speak_ours() -> torch.Tensor:
        return ours.synthesize(tokens, voice, seed=0, diffusion_steps=arguments.steps)

    def speak_theirs() -> torch.Tensor:
        samples: torch.Tensor = theirs.inference(tokens, ref_dict=reference, n_cfm_timesteps=arguments.steps)[0]
        return samples

    sides = {
        "ours": (
            speak_ours,
            {
                "flow": [(ours.networks.flow, "mu"), (ours.networks.flow, "solve")],
                "hift": [(ours.networks.mel2wav, "forward")],
            },
        ),
        "upstream": (speak_theirs, {"flow": [(theirs, "flow_inference")], "hift": [(theirs, "hift_inference")]}),
    }
    times: dict[str, list[Shares]] = {side: [] for side in sides}
    for count in range(1 + arguments.rounds):
        for side in sorted(sides, reverse=count % 2 == 1):
            times[side].append(measured(*sides[side]))
    return summary(seconds, {side: rounds[1:] for side, rounds in times.items()})


def summary(seconds: float, times: dict[str, list[Shares]]) -> dict[str, Any]:
    """Medians, and by how much ours is faster."""
    middle = {
        side: {part: median(each[part] for each in rounds) for part in rounds[0]} for side, rounds in times.items()
    }
    least = {side: min(each["total"] for each in rounds) for side, rounds in times.items()}
    return {
        "seconds": seconds,
        "median": middle,
        "ratio": {part: middle["upstream"][part] / middle["ours"][part] for part in ("total", "flow", "hift")},
        "fastest": least["upstream"] / least["ours"],
        "all": times,
    }


def main() -> None:
    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    theirs, ours = both(arguments.size, dtype=arguments.dtype)
    results = []
    print(f"{'s of sound':>10} {'side':>9} {'total s':>9} {'flow':>9} {'hift':>9} {'x real time':>12}")
    for seconds in arguments.seconds:
        result = compare(theirs, ours, seconds, arguments)
        results.append(result)
        for side, spent in result["median"].items():
            cells = " ".join(f"{spent[part]:>9.3f}" for part in ("total", "flow", "hift"))
            print(f"{seconds:>10.1f} {side:>9} {cells} {seconds / spent['total']:>12.2f}")
        cells = " ".join(f"{ratio:>9.2f}" for ratio in result["ratio"].values())
        print(f"{seconds:>10.1f} {'ratio':>9} {cells} {result['fastest']:>12.2f} (fastest)", flush=True)
    write_json(arguments.json, {"arguments": told(arguments), "results": results})


if __name__ == "__main__":
    main()
