"""How many first tokens (greedy) agree between our T3 and upstream's, in float32, on random prompts of one checkpoint.

    python benchmarks/t3_parity.py --model DIR [--prompts 16] [--tokens 1] [--at-once 1]

All prompts at once are more positions than vLLM has CUDA graphs for; one at a time, each is read in a graph.
With more ``--tokens``, runs end early in half precision: between two choices that are as good, rounding decides, and
what follows is another utterance.

Needs upstream's wheel (``pip install --no-deps chatterbox-tts==0.1.7 s3tokenizer==0.3.0``). Exit status 1 when fewer
than ``--least`` agree.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from itertools import takewhile
from statistics import fmean

import torch

from chatterbox_vllm import upstream
from chatterbox_vllm.bench.workload import random_text, random_voice
from chatterbox_vllm.checkpoint import Checkpoint, cache_dir, load_tensors, resolve
from chatterbox_vllm.quantization.policy import canonical
from chatterbox_vllm.t3.launch import launch
from chatterbox_vllm.types import SpeechOptions, VoiceFeatures

Prompt = tuple[list[int], float, float]


def prompts(count: int, vocabulary: int) -> list[Prompt]:
    """(text ids, cfg_weight, exaggeration) of ``count`` requests of 3 to 200 text tokens."""
    draw = random.Random(0)
    return [
        (random_text(i, vocabulary, draw.randint(3, 200)), draw.choice([0.3, 0.5, 1.0]), draw.choice([0.25, 0.5, 1.0]))
        for i in range(count)
    ]


def upstream_tokens(checkpoint: Checkpoint, asked: list[Prompt], voice: VoiceFeatures, tokens: int) -> list[list[int]]:
    """Upstream's ``T3.inference``, float32, one at a time; greedy by a temperature that leaves one candidate."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = upstream.load("t3.modules.t3_config").T3Config
    hp = config.multilingual() if checkpoint.variant.is_multilingual else config.english_only()
    t3 = upstream.load("t3.t3").T3(hp)
    t3.load_state_dict(load_tensors(checkpoint.t3))
    t3.to(device).eval()
    # The analyzer of the wheel's multilingual path is gone upstream, and needs attentions that transformers 5 hides.
    type(hp).is_multilingual = property(lambda self: False)
    t3_cond = upstream.load("t3.modules.cond_enc").T3Cond
    spoken = []
    for text, cfg_weight, exaggeration in asked:
        cond = t3_cond(
            speaker_emb=voice.speaker_embedding[None],
            cond_prompt_speech_tokens=voice.t3_prompt_tokens[None],
            emotion_adv=exaggeration * torch.ones(1, 1, 1),
        ).to(device=device)
        ids = torch.tensor([[hp.start_text_token, *text, hp.stop_text_token]] * 2)
        out = t3.inference(
            t3_cond=cond,
            text_tokens=ids,
            max_new_tokens=tokens,
            temperature=1e-6,
            top_p=1.0,
            min_p=0.0,
            cfg_weight=cfg_weight,
        )
        spoken.append(out[0].tolist())
    return spoken


async def our_tokens(arguments: argparse.Namespace, asked: list[Prompt], voice: VoiceFeatures) -> list[list[int]]:
    """Of our engine, ``arguments.at_once`` prompts in a batch."""
    t3 = await asyncio.to_thread(
        launch,
        resolve(arguments.model).t3,
        cache=cache_dir(),
        mask_invalid_tokens=False,
        max_model_len=1024,
        gpu_memory_utilization=0.5,
        method=canonical(arguments.quantization),
        dtype=arguments.dtype,
        **arguments.engine_args,
    )

    limit = asyncio.Semaphore(arguments.at_once or len(asked))

    async def one(text: list[int], cfg_weight: float, exaggeration: float) -> list[int]:
        options = SpeechOptions(
            temperature=0.0, cfg_weight=cfg_weight, exaggeration=exaggeration, max_tokens=arguments.tokens
        )
        async with limit:
            return [i async for new in t3.tokens(text, voice, options, interval=None) for i in new]

    try:
        return list(await asyncio.gather(*(one(*prompt) for prompt in asked)))
    finally:
        t3.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--at-once", type=int, help="prompts that our engine reads (default: all)")
    parser.add_argument("--least", type=int, default=14)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="more vLLM engine arguments, as JSON")
    arguments = parser.parse_args()
    if arguments.dtype == "auto":
        arguments.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    checkpoint = resolve(arguments.model)
    asked = prompts(arguments.prompts, 2454 if checkpoint.variant.is_multilingual else 704)
    voice = random_voice(0)
    ours = asyncio.run(our_tokens(arguments, asked, voice))
    theirs = upstream_tokens(checkpoint, asked, voice, arguments.tokens)
    agreed = [common(*both) for both in zip(ours, theirs, strict=True)]
    first = sum(count > 0 for count in agreed)
    print(
        f"{first} of {len(asked)} first tokens agree; of {arguments.tokens} the first {fmean(agreed):.1f}, on average"
    )
    return 0 if first >= arguments.least else 1


def common(ours: list[int], theirs: list[int]) -> int:
    """How many tokens two runs begin with together."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))


if __name__ == "__main__":
    raise SystemExit(main())
