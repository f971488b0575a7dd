"""Speak a text in as little GPU memory as possible: one request at a time, short utterances, T3 in 4 bits.

python examples/example-tts-min-vram.py "Hello there." -o hello.wav
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import soundfile
import torch

from chatterbox_vllm.t3.card import card_memory
from chatterbox_vllm.tts import ChatterboxTTS

TEXT = "A long text is split at its sentence ends. So a short limit for one utterance is enough, and saves memory."
SAVINGS = {
    "max_batch_size": 1,  # one utterance at a time
    "max_model_len": 500,  # its voice, text and speech tokens together: about 12 s of speech
    "max_chunk_length": 140,  # characters that fit into so much speech
    "gpu_memory_utilization": 0.4,  # share of the card that vLLM may take; the rest is the vocoder's
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speak a text in little GPU memory.")
    parser.add_argument("text", nargs="?", default=TEXT)
    parser.add_argument("--model", default=os.environ.get("CHATTERBOX_MODEL", "english"), help="a name or a folder")
    parser.add_argument("--max-tokens", type=int, default=300, help="longest utterance; 25 tokens are a second")
    parser.add_argument("-o", "--output", default="speech.wav")
    arguments = parser.parse_args(argv)

    # needs vllm-bnb-plugin: pip install ".[ultra-low-vram]" in the checkout
    quantization = "bitsandbytes" if torch.cuda.is_available() else None
    with ChatterboxTTS.from_local(arguments.model, quantization=quantization, **SAVINGS) as model:
        wav = model.generate(arguments.text, max_tokens=arguments.max_tokens)
        soundfile.write(arguments.output, wav.squeeze(0).numpy(), model.sr)
        if torch.cuda.is_available():
            total, free = card_memory()
            print(f"{(total - free) / 2**30:.2f} GiB of the card's {total / 2**30:.2f} are in use")
    print(f"{arguments.output}: {wav.shape[1] / model.sr:.1f} s")


if __name__ == "__main__":
    main()
