"""``chatterbox-vllm bench vocoder``: whole utterances and first chunks of streams, by how many make a batch.

The host's share is the part of the time in which the device has nothing to do. It is measured in two passes over equal
batches, because a profiler slows the host down, though not the kernels: the time of a batch without a profiler, from
one synchronised end of several batches to the next; and the time in which at least one kernel, copy or fill ran, which
is the union of the intervals that CUPTI, under torch.profiler, reports for as many batches. The share is one less
busy / wall; gaps between the kernels of a CUDA graph count as idle, too. On a CPU there is no such share.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from chatterbox_vllm.bench.options import count, output, positive, told
from chatterbox_vllm.bench.workload import random_speech, random_voice
from chatterbox_vllm.checkpoint import resolve
from chatterbox_vllm.files import write_json
from chatterbox_vllm.types import SAMPLE_RATE, TOKEN_RATE, VoiceFeatures
from chatterbox_vllm.vocoder.stage import Vocoder
from chatterbox_vllm.vocoder.utterance import Chunk

CHUNK_TOKENS: Final = 20
VOICES: Final = 8
"""How many voices share a batch, at most."""
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Job:
    """One row of a batch: (n,) int64 ``tokens`` in a voice; ``final`` for a whole utterance, not for a first chunk."""

    tokens: Tensor
    voice: VoiceFeatures
    seed: int
    steps: int
    final: bool


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Args:
        work: ``whole`` utterances or first ``chunk``s.
        batch: how many at once.
        ms: a batch takes, median of the rounds.
        audio_seconds: of sound a batch gives.
        realtime_factor: seconds of sound a second.
        host_share: 0 to 1, the device's idle time; None on a CPU.
        peak_gib: most device memory allocated at once, weights included; None on a CPU.
    """

    work: str
    batch: int
    ms: float
    audio_seconds: float
    realtime_factor: float
    host_share: float | None
    peak_gib: float | None


# The next two functions are all that the benches know of the vocoder's calls.


def speak(vocoder: Vocoder, jobs: Sequence[Job]) -> list[Tensor]:
    """One batch through the vocoder: (n,) float32 samples of each job."""
    chunks = [
        Chunk(vocoder.open(job.voice, seed=job.seed, diffusion_steps=job.steps), job.tokens, final=job.final)
        for job in jobs
    ]
    return vocoder.advance(chunks)


def speak_in_chunks(vocoder: Vocoder, job: Job, sizes: Iterable[int] = ()) -> tuple[Tensor, Tensor]:
    """One utterance as a stream of chunks of ``sizes`` tokens, what they leave over as the last; none: as a whole.

    Returns:
        (n,) float32 samples and (frames, 80) float32 mel.
    """
    utterance = vocoder.open(job.voice, seed=job.seed, diffusion_steps=job.steps)
    left, sounds = job.tokens, []
    for size in sizes:
        if len(left) <= size:
            break
        sounds += vocoder.advance([Chunk(utterance, left[:size], final=False)])
        left = left[size:]
    sounds += vocoder.advance([Chunk(utterance, left, final=True)])
    assert utterance.mel is not None
    return torch.cat(sounds), utterance.mel


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="chatterbox-vllm bench vocoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="demo", help="as for serve: a folder, a name, demo (default: %(default)s)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    made.add_argument("--dtype", choices=DTYPES, help="as vocoder_dtype of the settings (default: auto)")
    made.add_argument("--batch-sizes", type=count, nargs="*", default=[1, 8, 32], help="whole utterances at once")
    made.add_argument("--chunks", type=count, nargs="*", default=[1, 8, 64], help="streams' first chunks at once")
    made.add_argument("--seconds", type=positive, default=10.0, help="length of an utterance")
    made.add_argument(
        "--reference-seconds", type=positive, default=10.0, help="length of a voice's recording, at most 10"
    )
    made.add_argument("--steps", type=count, default=10, help="diffusion steps")
    made.add_argument("--rounds", type=count, default=5, help="measured batches a row")
    made.add_argument("--warmup", type=int, default=2, help="batches before, which compile and capture")
    made.add_argument("--max-frames", type=count, help="mel frames at once, as for Vocoder.from_checkpoint")
    made.add_argument("--json", type=output, help="write the results here, too")
    return made


def jobs(arguments: argparse.Namespace, batch: int, round_: int, *, final: bool) -> list[Job]:
    """A batch of the bench's workload; each round has other tokens, in the same voices."""
    voices = [random_voice(i, prompt_tokens=round(TOKEN_RATE * arguments.reference_seconds)) for i in range(VOICES)]
    count = round(TOKEN_RATE * arguments.seconds) if final else CHUNK_TOKENS
    seeds = range(batch * round_, batch * (round_ + 1))
    return [Job(random_speech(seed, count), voices[seed % VOICES], seed, arguments.steps, final) for seed in seeds]


def measure(vocoder: Vocoder, arguments: argparse.Namespace, batch: int, *, final: bool) -> Result:
    """Runs one row's batches."""
    rounds = [jobs(arguments, batch, number, final=final) for number in range(arguments.rounds)]
    on_gpu = vocoder.device.type == "cuda"
    for number in range(arguments.warmup):
        speak(vocoder, rounds[number % len(rounds)])
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(vocoder.device)
    seconds, samples = [], 0
    for each in rounds:
        elapsed, sounds = _timed(partial(speak, vocoder, each), vocoder.device)
        seconds.append(elapsed)
        samples = sum(len(sound) for sound in sounds)
    audio = samples / SAMPLE_RATE
    return Result(
        work="whole" if final else "chunk",
        batch=batch,
        ms=1000 * median(seconds),
        audio_seconds=audio,
        realtime_factor=audio / median(seconds),
        host_share=_host_share(vocoder, rounds) if on_gpu else None,
        peak_gib=torch.cuda.max_memory_allocated(vocoder.device) / 2**30 if on_gpu else None,
    )


def _timed(work: Callable[[], list[Tensor]], device: torch.device) -> tuple[float, list[Tensor]]:
    _synchronise(device)
    started = time.perf_counter()
    result = work()
    _synchronise(device)
    return time.perf_counter() - started, result


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _host_share(vocoder: Vocoder, rounds: Sequence[Sequence[Job]]) -> float:
    """See the module's text."""

    def all_rounds() -> list[Tensor]:
        return [sound for each in rounds for sound in speak(vocoder, each)]

    wall, _ = _timed(all_rounds, vocoder.device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        _timed(all_rounds, vocoder.device)
    on_device = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return max(0.0, 1.0 - covered(on_device) / 1e6 / wall)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Loads the vocoder, measures every row, prints the table."""
    device = torch.device(arguments.device)
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    started = time.perf_counter()
    path = resolve(arguments.model).s3gen
    vocoder = Vocoder.from_checkpoint(
        path, device=device, dtype=dtype, max_frames=arguments.max_frames, exact=arguments.dtype is not None
    )
    load_seconds = time.perf_counter() - started
    print(f"{'work':>6} {'batch':>6} {'ms':>9} {'x real time':>12} {'host share':>11} {'peak GiB':>9}", flush=True)
    results = []
    for final, batches in ((True, arguments.batch_sizes), (False, arguments.chunks)):
        for batch in batches:
            row = measure(vocoder, arguments, batch, final=final)
            results.append(row)
            host = "-" if row.host_share is None else f"{row.host_share:.1%}"
            peak = "-" if row.peak_gib is None else f"{row.peak_gib:.2f}"
            print(
                f"{row.work:>6} {row.batch:>6} {row.ms:>9.1f} {row.realtime_factor:>12.1f} {host:>11} {peak:>9}",
                flush=True,
            )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "load_seconds": load_seconds,
        "arguments": told(arguments) | {"dtype": str(dtype).removeprefix("torch.")},
        "results": [asdict(row) for row in results],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    report = run(arguments)
    write_json(arguments.json, report)
    return 0
