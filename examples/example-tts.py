"""Speak a text with the built-in voice, or with the voice of a recording.

python examples/example-tts.py "Hello there." -o hello.wav
python examples/example-tts.py "Guten Tag." --model multilingual --language de --voice someone.mp3
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import soundfile

from chatterbox_vllm.tts import ChatterboxTTS

TEXT = "You are listening to Chatterbox, a text to speech model, running on vLLM."


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speak a text.")
    parser.add_argument("text", nargs="?", default=TEXT)
    parser.add_argument("--model", default=os.environ.get("CHATTERBOX_MODEL", "english"), help="a name or a folder")
    parser.add_argument("--language", help='"de", "fr", ...: multilingual models')
    parser.add_argument("--voice", help="a recording of the voice to speak with, about 10 s")
    parser.add_argument("--seed", type=int, help="the same seed sounds the same")
    parser.add_argument("--max-tokens", type=int, default=1000, help="longest utterance; 25 tokens are a second")
    parser.add_argument("-o", "--output", default="speech.wav")
    arguments = parser.parse_args(argv)

    with ChatterboxTTS.from_local(arguments.model) as model:
        wav = model.generate(
            arguments.text,
            audio_prompt_path=arguments.voice,
            language_id=arguments.language,
            exaggeration=0.5,  # more is more expressive
            cfg_weight=0.5,  # less is a slower, calmer pace
            temperature=0.8,
            seed=arguments.seed,
            max_tokens=arguments.max_tokens,
        )
        soundfile.write(arguments.output, wav.squeeze(0).numpy(), model.sr)
    print(f"{arguments.output}: {wav.shape[1] / model.sr:.1f} s")


if __name__ == "__main__":
    main()
