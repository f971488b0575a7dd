"""Text to sound, whole and streamed, through the Python API: how many times faster than real time, and the first sound.

python benchmarks/pipeline.py --model DIR [--texts 1 16 64]
"""

from __future__ import annotations

import argparse
import time

from chatterbox_vllm.tts import ChatterboxTTS

MAX_TOKENS = 250


def text(index: int) -> str:
    """The text of one request."""
    return f"This is sentence number {index}, spoken by the server for a measurement."


def whole(model: ChatterboxTTS, count: int) -> None:
    """Speaks ``count`` texts as one batch and prints the rate."""
    started = time.perf_counter()
    spoken = model.generate(
        [text(i) for i in range(count)], seed=list(range(count)), max_tokens=MAX_TOKENS, progress=False
    )
    seconds = time.perf_counter() - started
    audio = sum(samples.shape[1] for samples in spoken) / model.sr
    print(f"{count:>4} texts: {audio:.1f} s of sound in {seconds:.2f} s, {audio / seconds:.1f} x real time", flush=True)


def streamed(model: ChatterboxTTS, seed: int) -> None:
    """Speaks one text chunk by chunk and prints when the first sound was there."""
    started, first, samples = time.perf_counter(), 0.0, 0
    for chunk in model.generate_stream(text(1), seed=seed, max_tokens=MAX_TOKENS):
        first = first or time.perf_counter() - started
        samples += chunk.shape[1]
    seconds = time.perf_counter() - started
    print(f"stream: first sound after {1000 * first:.0f} ms, {samples / model.sr:.1f} s of sound in {seconds:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--max-model-len", type=int, default=1024)
    arguments = parser.parse_args()
    with ChatterboxTTS.from_local(arguments.model, max_model_len=arguments.max_model_len, watermark=False) as model:
        whole(model, 1)  # not counted: kernels are loaded
        print("measured:")
        for count in arguments.texts:
            whole(model, count)
        for seed in range(3):
            streamed(model, seed)


if __name__ == "__main__":
    main()
