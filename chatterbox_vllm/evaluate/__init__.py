"""``chatterbox-vllm eval``: what a quantisation changes in what is said, measured on any checkpoint.

A and B are methods (none, int8, bnb-4bit, ...: every network has it that can), strategies (conservative, mixed,
aggressive), files of profiles, or folders of other checkpoints, such as those that chatterbox-vllm quantize writes.
T3 is compared at each token that B says, the vocoder on these tokens with equal noise; speakers and words are those of
what each says by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from tqdm import tqdm

from chatterbox_vllm.arguments import device_of
from chatterbox_vllm.bench import sentences
from chatterbox_vllm.bench.options import output, told
from chatterbox_vllm.bench.report import check_plot
from chatterbox_vllm.checkpoint import Checkpoint, resolve
from chatterbox_vllm.evaluate import report
from chatterbox_vllm.evaluate.compare import Comparison, prepare, summary
from chatterbox_vllm.evaluate.methods import check_comparable, contender
from chatterbox_vllm.evaluate.sound import Recogniser
from chatterbox_vllm.files import write_json
from chatterbox_vllm.types import MAX_SPEECH_TOKENS, SpeechOptions, VoiceFeatures
from chatterbox_vllm.voices.library import VoiceLibrary

OWN_TEXTS: Final = 8
_SECONDS: Final = 5.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="chatterbox-vllm eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="demo", help="as for serve: a folder, a name, demo (default: %(default)s)")
    made.add_argument("--method", required=True, help="A, which is judged: int8, bnb-4bit, mixed, a file, a folder")
    made.add_argument("--against", default="none", help="B, against which it is judged (default: %(default)s)")
    made.add_argument("--texts", type=Path, help="a file with a text a line (default: eight English ones of ours)")
    made.add_argument("--voice", help="a recording, or a voice's name (default: the checkpoint's own voice)")
    made.add_argument("--language", help="code of the texts' language; multilingual models")
    made.add_argument("--seed", type=int, default=0, help="of the first text; the next one has the next")
    made.add_argument("--max-tokens", type=int, default=MAX_SPEECH_TOKENS, help="longest utterance (default: 1000)")
    made.add_argument("--steps", type=int, default=10, help="diffusion steps (default: %(default)s)")
    made.add_argument("--asr", help="a speech recogniser of transformers, for words: openai/whisper-small, a folder")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    made.add_argument("--json", type=output, help="write all figures here, too")
    made.add_argument("--plot", type=output, help="draw them into this .png, .svg or .pdf; needs matplotlib")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    if arguments.plot is not None:
        check_plot(arguments.plot)
    device_of("--device", arguments.device)
    options = SpeechOptions(seed=arguments.seed, max_tokens=arguments.max_tokens, diffusion_steps=arguments.steps)
    own = [sentences.text(seed, _SECONDS) for seed in range(OWN_TEXTS)]
    texts = dict(enumerate(own, start=1)) if arguments.texts is None else sentences.lines(arguments.texts, "--texts")
    checkpoint = resolve(arguments.model)
    a = contender(arguments.method, checkpoint, "--method")
    b = contender(arguments.against, checkpoint, "--against")
    check_comparable(a, b)
    where = "--texts: text" if arguments.texts is None else f"--texts {arguments.texts}: line"
    places = [f"{where} {number}" for number in texts]
    prepared = prepare(list(texts.values()), places, b.checkpoint, arguments.language)
    recogniser = None if arguments.asr is None else Recogniser(arguments.asr, arguments.device)
    voice = _voice(checkpoint, arguments.voice, arguments.device)
    comparison = Comparison(a, b, device=arguments.device, recogniser=recogniser)
    compared = comparison.texts(prepared, voice, options, arguments.language)
    rows = list(tqdm(compared, total=len(texts), unit="text", disable=None))
    found, is_demo = summary(rows), a.checkpoint.is_demo or b.checkpoint.is_demo
    print(report.table(a, b, found))
    if is_demo:
        print(f"\n{report.RANDOM}")
    write_json(arguments.json, report.as_json(told(arguments), a, b, found, rows, is_demo=is_demo))
    if arguments.plot is not None:
        report.plot(arguments.plot, a, b, rows, is_demo=is_demo)
    return 0


def _voice(checkpoint: Checkpoint, wanted: str | None, device: str) -> VoiceFeatures:
    voices = VoiceLibrary(checkpoint, device=device)
    if wanted is not None and Path(wanted).is_file():
        return voices.from_audio(Path(wanted), param="--voice")
    return voices.get(wanted)
