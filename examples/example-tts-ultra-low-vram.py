"""Speak a text within a budget of GPU memory, 2 GiB unless told otherwise, with all networks in 4 bits.

What does not fit is refused before anything is loaded, with the arithmetic.

python examples/example-tts-ultra-low-vram.py "Hello there." -o hello.wav
python examples/example-tts-ultra-low-vram.py "Hello there." -o hello.wav --budget 3GiB
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import soundfile
import torch

from chatterbox_vllm.t3.card import card_memory
from chatterbox_vllm.tts import ChatterboxTTS

TEXT = "A card of two gigabytes is enough. It speaks one sentence after the other, and faster than you can listen."
SAVINGS = {
    "use_quantization": True,
    "quantization_method": "bnb-4bit",  # NF4, for T3 and all that follows
    "quantize_s3gen": True,  # the vocoder
    "quantize_voice_encoder": True,  # a fifth of a MiB, for completeness
    "max_batch_size": 1,  # one utterance at a time
    "max_model_len": 640,  # its voice, text and speech tokens together: about 20 s of speech
    "max_chunk_length": 140,  # characters that fit into so much speech
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speak a text within a budget of GPU memory.")
    parser.add_argument("text", nargs="?", default=TEXT)
    parser.add_argument("--model", default=os.environ.get("CHATTERBOX_MODEL", "english"), help="a name or a folder")
    parser.add_argument("--budget", default="2GiB", help="of the card's memory, for everything together")
    parser.add_argument("--max-tokens", type=int, default=500, help="longest utterance; 25 tokens are a second")
    parser.add_argument("-o", "--output", default="speech.wav")
    arguments = parser.parse_args(argv)

    # needs bitsandbytes: pip install ".[ultra-low-vram]" in the checkout
    on_gpu = SAVINGS | {"vram_budget": arguments.budget}
    on_cpu = {"use_int8_quantization": True, "max_batch_size": 1, "max_model_len": 640, "max_chunk_length": 140}
    with ChatterboxTTS.from_local(arguments.model, **(on_gpu if torch.cuda.is_available() else on_cpu)) as model:
        wav = model.generate(arguments.text, max_tokens=arguments.max_tokens)
        soundfile.write(arguments.output, wav.squeeze(0).numpy(), model.sr)
        print(model.get_quantization_info())
        if torch.cuda.is_available():
            total, free = card_memory()
            print(f"{(total - free) / 2**30:.2f} GiB of the card's {total / 2**30:.2f} are in use")
    print(f"{arguments.output}: {wav.shape[1] / model.sr:.1f} s")


if __name__ == "__main__":
    main()
