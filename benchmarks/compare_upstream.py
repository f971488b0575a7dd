"""The whole pipeline offline, three ways in one run, as multiples of real time:

    a. upstream's: its T3.inference, then its S3Gen, one utterance after the other, float32
    b. our T3 in one batch, then upstream's S3Gen one by one
    c. ours, all texts at once: AsyncChatterbox.speech_tokens, then AsyncChatterbox.synthesize

    python benchmarks/compare_upstream.py --model full-demo --json compare.json

Upstream runs first and is freed. b is put together of two measurements: our T3's time for all texts, and for each of
them the mean time of upstream's S3Gen over --one-by-one utterances. No way has the watermark. Our utterances have
--max-tokens tokens each; upstream's end when its T3 says so, and every rate is of the sound that was really made.
Upstream samples ids that are no sound, with random weights a fifth of all, and drops them; here they become sounds, so
that its S3Gen speaks as many tokens as its T3 took time for.

Needs upstream's wheel (``pip install --no-deps chatterbox-tts==0.1.7 s3tokenizer==0.3.0``).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from statistics import fmean, median
from typing import Any, TypeVar

import torch

from chatterbox_vllm import upstream
from chatterbox_vllm.bench.options import output, told
from chatterbox_vllm.bench.pipeline import Pipeline, spoken_texts, timed_rounds
from chatterbox_vllm.bench.workload import random_speech, random_voice
from chatterbox_vllm.checkpoint import DERIVED_KEYS, Checkpoint, load_strict, load_tensors, resolve
from chatterbox_vllm.demo_checkpoint import networks
from chatterbox_vllm.engine import AsyncChatterbox
from chatterbox_vllm.files import write_json
from chatterbox_vllm.t3.folder import infer_config
from chatterbox_vllm.text.frontend import TextFrontend
from chatterbox_vllm.text.tokenise import load_tokenizer
from chatterbox_vllm.types import (
    SAMPLE_RATE,
    SPOKEN_TOKENS,
    START_TEXT,
    STOP_TEXT,
    TOKEN_RATE,
    SpeechOptions,
    VoiceFeatures,
)

T = TypeVar("T")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="demo")
    made.add_argument("--texts", type=int, default=256, help="at once, for our part (default: %(default)s)")
    made.add_argument("--upstream-utterances", type=int, default=2, help="of upstream's pipeline")
    made.add_argument("--one-by-one", type=int, default=8, help="utterances of upstream's S3Gen")
    made.add_argument("--rounds", type=int, default=3, help="measured rounds of ours, after one that is not counted")
    made.add_argument("--max-tokens", type=int, default=250, help="of an utterance (default: %(default)s = 10 s)")
    made.add_argument("--reference-seconds", type=float, default=10.0)
    made.add_argument("--steps", type=int, default=10, help="diffusion steps of ours; upstream's are always 10")
    made.add_argument("--max-batch-size", type=int, help="of our T3; fewer than --texts run in waves (default: all)")
    made.add_argument("--gpu-memory-utilization", type=float, default=0.5)
    made.add_argument("--max-model-len", type=int, default=1024)
    made.add_argument("--engine-args", type=json.loads, default={}, help="more for AsyncChatterbox.start, as JSON")
    made.add_argument("--json", type=output)
    return made


class Upstream:
    """Upstream's two networks, of the checkpoint's size, on the GPU if there is one."""

    def __init__(self, checkpoint: Checkpoint, voice: VoiceFeatures) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        multilingual = checkpoint.variant.is_multilingual
        width = infer_config(checkpoint.t3).hidden_size
        size = next(name for name, sizes in networks.SIZES.items() if sizes.t3_width == width)
        self.t3: Any = networks.t3(size, multilingual=multilingual)
        load_strict(self.t3, load_tensors(checkpoint.t3), file=checkpoint.t3)
        # The wheel's analyzer of multilingual speech is gone upstream, and needs what transformers 5 hides.
        type(self.t3.hp).is_multilingual = property(lambda self: False)
        self.s3gen: Any = networks.s3gen(size)
        load_strict(self.s3gen, load_tensors(checkpoint.s3gen), file=checkpoint.s3gen, optional=DERIVED_KEYS)
        self.t3.to(self.device)
        self.s3gen.to(self.device)
        self._cond = upstream.load("t3.modules.cond_enc").T3Cond(
            speaker_emb=voice.speaker_embedding[None],
            cond_prompt_speech_tokens=voice.t3_prompt_tokens[None],
            emotion_adv=0.5 * torch.ones(1, 1, 1),
        )
        self._reference = {
            "prompt_token": voice.prompt_tokens[None],
            "prompt_token_len": torch.tensor([len(voice.prompt_tokens)]),
            "prompt_feat": voice.prompt_mel[None],
            "prompt_feat_len": None,
            "embedding": voice.x_vector[None],
        }

    def tokens(self, text: list[int], count: int) -> torch.Tensor:
        """(n <= count,) speech tokens, all of them sounds."""
        ids = torch.tensor([[START_TEXT, *text, STOP_TEXT]] * 2)
        with redirect_stderr(StringIO()):  # its progress bar
            spoken = self.t3.inference(
                t3_cond=self._cond.to(device=self.device),
                text_tokens=ids.to(self.device),
                max_new_tokens=count,
                temperature=0.8,
                top_p=1.0,
                min_p=0.05,
                repetition_penalty=1.2,
                cfg_weight=0.5,
            )
        return spoken[0] % SPOKEN_TOKENS

    def sound(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n,) samples on the CPU."""
        reference = {
            key: value.to(self.device) if value is not None else None for key, value in self._reference.items()
        }
        samples, _ = self.s3gen.inference(tokens.to(self.device), ref_dict=reference)
        return samples[0].cpu()


def run_upstream(arguments: argparse.Namespace, checkpoint: Checkpoint, voice: VoiceFeatures) -> dict[str, float]:
    """Way a, and upstream's S3Gen alone."""
    frontend = TextFrontend(load_tokenizer(checkpoint), multilingual=checkpoint.variant.is_multilingual)
    theirs, count = Upstream(checkpoint, voice), arguments.max_tokens
    texts = [frontend.one(text, "en") for text in spoken_texts(arguments.upstream_utterances, count)]
    theirs.sound(theirs.tokens(texts[0], 10))
    pipeline = [timed(lambda text: theirs.sound(theirs.tokens(text, count)), text) for text in texts]
    theirs.sound(random_speech(0, count))
    vocoder = [timed(theirs.sound, random_speech(seed, count)) for seed in range(arguments.one_by_one)]
    seconds, audio = (sum(each) for each in zip(*pipeline, strict=True))
    return {
        "utterances": len(pipeline),
        "seconds": seconds,
        "audio_seconds": audio,
        "realtime_factor": audio / seconds,
        "s3gen_seconds": fmean(elapsed for elapsed, _ in vocoder),
        "s3gen_realtime_factor": fmean(sound / elapsed for elapsed, sound in vocoder),
    }


def timed(work: Callable[[T], torch.Tensor], argument: T) -> tuple[float, float]:
    """(seconds, seconds of sound) of something that gives samples on the CPU."""
    started = time.perf_counter()
    samples = work(argument)
    return time.perf_counter() - started, len(samples) / SAMPLE_RATE


async def run_ours(arguments: argparse.Namespace, checkpoint: Checkpoint, voice: VoiceFeatures) -> dict[str, Any]:
    """T3 alone, and way c."""
    engine = await AsyncChatterbox.start(
        checkpoint,
        max_batch_size=arguments.max_batch_size or arguments.texts,
        max_model_len=arguments.max_model_len,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        watermark=False,
        **arguments.engine_args,
    )
    try:
        ours = Pipeline(engine, SpeechOptions(max_tokens=arguments.max_tokens, diffusion_steps=arguments.steps))
        requests = ours.requests(arguments.texts, voice)
        ways = {"t3": ours.tokens, "pipeline": ours.sound}
        return {name: summary(*await timed_rounds(way, requests, arguments.rounds)) for name, way in ways.items()}
    finally:
        await engine.shutdown()


def summary(audio: float, seconds: list[float]) -> dict[str, Any]:
    """Of rounds that gave so many seconds of sound each."""
    middle = median(seconds[1:])
    return {"seconds": middle, "all_seconds": seconds, "audio_seconds": audio, "realtime_factor": audio / middle}


def main() -> None:
    arguments = parser().parse_args()
    checkpoint = resolve(arguments.model)
    voice = random_voice(0, prompt_tokens=round(TOKEN_RATE * arguments.reference_seconds))
    theirs = run_upstream(arguments, checkpoint, voice)
    gc.collect()
    torch.cuda.empty_cache()  # ours has the card to itself
    print(f"upstream's S3Gen alone: {theirs['s3gen_realtime_factor']:.1f} x real time", flush=True)
    ours = asyncio.run(run_ours(arguments, checkpoint, voice))
    t3, pipeline = ours["t3"], ours["pipeline"]
    print(f"our T3 alone: {t3['realtime_factor']:.1f} x real time")
    mixed_seconds = t3["seconds"] + arguments.texts * theirs["s3gen_seconds"]
    ways = {
        "a": theirs["realtime_factor"],
        "b": t3["audio_seconds"] / mixed_seconds,
        "c": pipeline["realtime_factor"],
    }
    print(f"{'way':>4} {'utterances':>11} {'s of sound':>11} {'x real time':>12} {'c is faster by':>15}")
    counts = {"a": theirs["utterances"], "b": arguments.texts, "c": arguments.texts}
    sounds = {"a": theirs["audio_seconds"], "b": t3["audio_seconds"], "c": pipeline["audio_seconds"]}
    for way, rate in ways.items():
        print(f"{way:>4} {counts[way]:>11} {sounds[way]:>11.1f} {rate:>12.1f} {ways['c'] / rate:>15.1f}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {"upstream": theirs, "ours": ours, "realtime_factors": ways}
    write_json(arguments.json, {"device": device, "arguments": told(arguments), **result})


if __name__ == "__main__":
    main()
