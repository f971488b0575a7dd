"""Speak several texts with several voices in one batch, which is much faster than one after the other.

python examples/example-voices-batch.py anna.wav ben.mp3 -o takes
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import soundfile

from chatterbox_vllm.tts import ChatterboxTTS

TEXTS = [
    "The train on platform three is late.",
    "Every voice says every sentence!",
    "Did you know that they are all spoken at once?",
]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speak several texts with several voices in one batch.")
    parser.add_argument("voices", nargs="*", help="recordings, about 10 s each; none = the built-in voice")
    parser.add_argument("--text", action="append", help="a text; repeat for more")
    parser.add_argument("--model", default=os.environ.get("CHATTERBOX_MODEL", "english"), help="a name or a folder")
    parser.add_argument("--max-tokens", type=int, default=1000, help="longest utterance; 25 tokens are a second")
    parser.add_argument("-o", "--output", type=Path, default=Path("takes"), help="a folder")
    arguments = parser.parse_args(argv)

    takes = list(product(arguments.voices or [None], arguments.text or TEXTS))
    with ChatterboxTTS.from_local(arguments.model) as model:
        wavs = model.generate(
            [text for _, text in takes],
            audio_prompt_path=[voice for voice, _ in takes],
            seed=list(range(len(takes))),  # each take sounds the same in any batch
            max_tokens=arguments.max_tokens,
            progress=True,
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    for number, ((voice, text), wav) in enumerate(zip(takes, wavs, strict=True), start=1):
        file = arguments.output / f"{number:02}-{Path(voice).stem if voice else 'built-in'}.wav"
        soundfile.write(file, wav.squeeze(0).numpy(), model.sr)
        print(f"{file}: {wav.shape[1] / model.sr:.1f} s, {text}")


if __name__ == "__main__":
    main()
