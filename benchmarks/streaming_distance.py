"""How far a stream's sound is from the whole file's, by chunk schedule; and half precision's from float32's.

    python benchmarks/streaming_distance.py --model full-demo --json distance.json

Both sounds of a pair have the same tokens, voice, seed and steps. The distances are those of
``chatterbox_vllm/vocoder/distance.py``, mean absolute differences in decibels, and means over the utterances: ``sound``
between the log-mel spectrograms of the samples, ``mel`` between what the flow gives. ``seed`` is the scale to read them
by: the distance between two seeds' whole files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import torch

from chatterbox_vllm.bench.options import output, told
from chatterbox_vllm.bench.vocoder import DTYPES, Job, speak_in_chunks
from chatterbox_vllm.bench.workload import random_speech, random_voice
from chatterbox_vllm.checkpoint import resolve
from chatterbox_vllm.files import write_json
from chatterbox_vllm.types import TOKEN_RATE
from chatterbox_vllm.vocoder.distance import mel_distance, streaming_distance
from chatterbox_vllm.vocoder.schedule import ChunkSchedule
from chatterbox_vllm.vocoder.stage import Vocoder

SCHEDULES = {
    "15 x 1": ChunkSchedule(15, growth=1.0),
    "15 x 2": ChunkSchedule(15, growth=2.0),
    "25 x 2": ChunkSchedule(25, growth=2.0),
    "40 x 2": ChunkSchedule(40, growth=2.0),
    "80 x 2": ChunkSchedule(80, growth=2.0),
}
"""First chunk's tokens x growth. The third is the default."""
Speech = tuple[torch.Tensor, torch.Tensor]
"""(n,) samples and (frames, 80) mel."""


def parser() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="demo")
    made.add_argument("--device", default="cuda" if on_gpu else "cpu")
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16" if on_gpu else "float32")
    made.add_argument("--utterances", type=int, default=8)
    made.add_argument("--seconds", type=float, default=10.0)
    made.add_argument("--reference-seconds", type=float, default=10.0)
    made.add_argument("--steps", type=int, default=10)
    made.add_argument("--json", type=output)
    return made


def jobs(arguments: argparse.Namespace) -> list[Job]:
    """The utterances, each in a voice of its own."""
    length, reference = round(TOKEN_RATE * arguments.seconds), round(TOKEN_RATE * arguments.reference_seconds)
    return [
        Job(random_speech(seed, length), random_voice(seed, prompt_tokens=reference), seed, arguments.steps, final=True)
        for seed in range(arguments.utterances)
    ]


def distances(spoken: list[Speech], others: list[Speech]) -> dict[str, float]:
    """Means over the pairs, in decibels."""
    pairs = list(zip(spoken, others, strict=True))
    return {
        "sound": fmean(streaming_distance(one[0], other[0]) for one, other in pairs),
        "mel": fmean(mel_distance(one[1], other[1]) for one, other in pairs),
    }


def main() -> None:
    arguments = parser().parse_args()
    path, asked = resolve(arguments.model).s3gen, jobs(arguments)

    def vocoder(dtype: str) -> Vocoder:
        return Vocoder.from_checkpoint(path, device=arguments.device, dtype=DTYPES[dtype])

    def wholes(own: Vocoder, number: Callable[[int], int] = lambda seed: seed) -> list[Speech]:
        return [speak_in_chunks(own, replace(job, seed=number(job.seed))) for job in asked]

    own = vocoder(arguments.dtype)
    whole = wholes(own)
    found = {"seed": distances(whole, wholes(own, lambda seed: seed + len(asked)))}
    for name, schedule in SCHEDULES.items():
        found[name] = distances(whole, [speak_in_chunks(own, job, schedule.sizes(alone=False)) for job in asked])
    del own
    for dtype in ("float32", "bfloat16"):
        if dtype != arguments.dtype:
            found[f"{arguments.dtype} against {dtype}"] = distances(whole, wholes(vocoder(dtype)))
    print(f"{'':>28} {'sound, dB':>10} {'mel, dB':>10}")
    for name, row in found.items():
        print(f"{name:>28} {row['sound']:>10.3f} {row['mel']:>10.3f}")
    write_json(arguments.json, {"arguments": told(arguments), "decibels": found})


if __name__ == "__main__":
    main()
