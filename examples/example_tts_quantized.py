"""Speak with both models, English and multilingual, with T3 in 8 bits: half the memory that bfloat16 takes.

python examples/example_tts_quantized.py -o quantized
python examples/example_tts_quantized.py -o quantized --quantization int8    # also without an NVIDIA GPU
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import soundfile

from chatterbox_vllm.errors import ConfigurationError, MissingDependency
from chatterbox_vllm.tts import ChatterboxMultilingualTTS, ChatterboxTTS

ENGLISH = "Eight bits are enough for every weight of this model."
FRENCH = "Huit bits suffisent pour chaque poids de ce modèle."


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speak with both models, quantised.")
    parser.add_argument("--model", default=os.environ.get("CHATTERBOX_MODEL", "english"), help="a name or a folder")
    parser.add_argument("--multilingual-model", default="multilingual", help="a name or a folder")
    parser.add_argument("--quantization", help="none, int8, bnb-4bit, ... instead of bnb-8bit")
    parser.add_argument("--max-tokens", type=int, default=1000, help="longest utterance; 25 tokens are a second")
    parser.add_argument("-o", "--output", type=Path, default=Path("quantized"), help="a folder")
    arguments = parser.parse_args(argv)

    # T3's weights are rounded as bitsandbytes' LLM.int8 does and multiplied by vLLM's own kernels: no package is needed
    options = {"quantization": arguments.quantization} if arguments.quantization else {"use_bnb_quantization": True}
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        with ChatterboxTTS.from_local(arguments.model, **options) as model:
            wav = model.generate(ENGLISH, max_tokens=arguments.max_tokens)
            _save(arguments.output / "english.wav", wav, model)
        with ChatterboxMultilingualTTS.from_local(arguments.multilingual_model, **options) as model:
            wav = model.generate(FRENCH, language_id="fr", max_tokens=arguments.max_tokens)
            _save(arguments.output / "french.wav", wav, model)
    except (ConfigurationError, MissingDependency) as error:  # no NVIDIA GPU, or bnb-4bit without its packages
        sys.exit(f"{error}\nTo run this example on a CPU: --quantization int8")


def _save(file: Path, wav: object, model: ChatterboxTTS) -> None:
    soundfile.write(file, wav.squeeze(0).numpy(), model.sr)
    print(f"{file}: {wav.shape[1] / model.sr:.1f} s, quantised: {model.get_quantization_info()}")


if __name__ == "__main__":
    main()
