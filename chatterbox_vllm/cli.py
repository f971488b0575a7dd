"""``chatterbox-vllm serve | say | quantize | eval | memory | demo-checkpoint | doctor | bench``.

The flags of ``serve`` and ``say`` are made from ``Settings``. Heavy modules are imported when a command runs, so that
``--help`` is instant. Exit status: 0 done, 2 the caller's mistake, 1 anything else; an error is one sentence unless
``--debug`` asks for its traceback.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from chatterbox_vllm import __version__
from chatterbox_vllm.errors import ChatterboxError, ConfigurationError, InvalidRequest
from chatterbox_vllm.files import write_whole
from chatterbox_vllm.settings import PRESETS, Settings, VariantName, allowed, default_text, flag, variables
from chatterbox_vllm.sources import load

if TYPE_CHECKING:
    from chatterbox_vllm.engine import AsyncChatterbox
    from chatterbox_vllm.types import SpeechOptions, VoiceFeatures

LoadSettings = Callable[[Mapping[str, Any]], Settings]
"""Command-line values -> settings. ``server.py`` brings its own, which knows config.py."""

COMMANDS: Final = {
    "quantize": ("convert", "write a checkpoint with a 4-bit T3"),
    "eval": ("evaluate", "measure what quantisation changes"),
    "memory": ("bench.memory", "compute what fits into a GPU's memory, or ask a server"),
    "doctor": ("doctor", "say what is installed, what is wrong and what mends it"),
}
"""Commands with a module of their own, which parses what follows."""
BENCHES: Final = {
    "t3": "speech tokens a second of T3 alone",
    "vocoder": "sound a second of the vocoder alone",
    "serve": "first audio, underruns and throughput of a server",
}
_SAMPLING: Final = ("exaggeration", "cfg_weight", "temperature", "top_p", "min_p", "repetition_penalty", "max_tokens")
_SAY: Final = ("model", *_SAMPLING, "diffusion_steps", "device", "max_model_len", "gpu_memory_utilization")
_SAY_TOO: Final = (
    "dtype",
    "quantization",
    "quantization_strategy",
    "vram_budget",
    "max_chunk_length",
    "voices_dir",
    "watermark",
    "engine_args",
    "debug",
)
_NO_FLAG: Final = frozenset({"api_key", "preset", "variant"})
"""A key on the command line could be read by every user of the machine; the others have flags of their own."""


def main(argv: Sequence[str] | None = None, *, settings: LoadSettings = load) -> int:
    """The command line; returns the exit status.

    Args:
        argv: arguments without the program's name; None = ``sys.argv``.
        settings: makes the settings of ``serve`` and ``say`` out of their flags.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(argv, settings)
    except ChatterboxError as error:
        if "--debug" in argv:
            raise
        sys.stderr.write(f"chatterbox-vllm: {error}\n")
        return 2 if isinstance(error, InvalidRequest | ConfigurationError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads what is printed, as ``head``, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is written at the exit
        return 1


def _run(argv: list[str], settings: LoadSettings) -> int:
    try:
        if argv and argv[0] in COMMANDS:
            with _ended_in_order() if argv[0] == "quantize" else nullcontext():
                return _run_main(f"chatterbox_vllm.{COMMANDS[argv[0]][0]}", argv[1:])
        if argv[:1] == ["bench"] and argv[1:2] and argv[1] in BENCHES:
            return _run_main(f"chatterbox_vllm.bench.{argv[1]}", argv[2:])
        arguments = _parser().parse_args(argv)
        return int(arguments.run(arguments, settings) or 0)
    finally:
        sys.stdout.flush()  # here a closed pipe can still be told from an error


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Meanwhile SIGTERM and SIGHUP raise SystemExit, so that half-written files are removed.

    One that is handled or ignored already, as nohup has it, stays so.
    """
    ours = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_DFL]

    def end(number: int, _frame: object) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)  # a second one, as systemd sends, must not stop the removing
        sys.exit(128 + number)

    for each in ours:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)


def _run_main(module: str, argv: Sequence[str]) -> int:
    return int(import_module(module).main(argv) or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chatterbox-vllm", description="Chatterbox text to speech on vLLM.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _serve_parser(commands.add_parser("serve", help="start the HTTP server", allow_abbrev=False))
    _say_parser(commands.add_parser("say", help="speak a text into a file", allow_abbrev=False))
    _demo_parser(commands.add_parser("demo-checkpoint", help="write a checkpoint of random weights"))
    for name, (_, told) in COMMANDS.items():
        commands.add_parser(name, help=told, add_help=False)
    bench = commands.add_parser("bench", help="measure speed", description="Each has its own --help.")
    bench.add_argument("name", choices=BENCHES, help="; ".join(f"{name}: {text}" for name, text in BENCHES.items()))
    return parser


def _serve_parser(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [flags]"
    parser.description = (
        "Serves OpenAI's speech API. A flag beats the environment, which beats .env, config.py, a preset and the "
        "default, in this order. The key of the API has no flag, as others could read it: CHATTERBOX_API_KEY."
    )
    parser.epilog = "The first Ctrl-C lets requests in hand finish, the second ends at once."
    _add_choices(parser)
    _add_settings(parser, [name for name in Settings.model_fields if name not in _NO_FLAG])
    parser.set_defaults(run=_serve)


def _say_parser(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s TEXT -o FILE [flags]"
    parser.description = "Speaks a text into a file, without a server."
    parser.add_argument("text", help="what to say; - reads it from standard input")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".wav, .mp3, .opus, .aac, .flac or .pcm")
    parser.add_argument("--voice", help="a recording of the voice, or a voice's name (default: the built-in voice)")
    parser.add_argument("--language", help="code of the text's language; multilingual models")
    parser.add_argument("--seed", type=int, help="the same seed and text sound the same")
    parser.add_argument("--speed", type=float, default=1.0, help="tempo, from 0.25 to 4; the pitch stays (default: 1)")
    _add_choices(parser)
    _add_settings(parser, [*_SAY, *_SAY_TOO])
    parser.set_defaults(run=_say)


def _demo_parser(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes random weights in upstream's layout: everything runs, and speaks noise."
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny", help="full has the real sizes: 3.2 GB")
    parser.add_argument("--variant", choices=get_args(VariantName), default="english")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same tensors")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=_demo_checkpoint)


def _add_choices(parser: argparse.ArgumentParser) -> None:
    """``--multilingual`` and ``--low-vram`` in place of ``--variant multilingual`` and ``--preset low-vram``."""
    for name, choices in (("variant", get_args(VariantName)), ("preset", PRESETS)):
        group = parser.add_mutually_exclusive_group()
        text = Settings.model_fields[name].description
        group.add_argument(
            flag(name), choices=choices, default=argparse.SUPPRESS, help=f"{text} ({variables(name)[0]})"
        )
        for choice in choices:
            values = PRESETS.get(choice, {})
            told = ", ".join(f"{key}={value}" for key, value in values.items()) or f"the {choice} model"
            group.add_argument(
                f"--{choice}", dest=name, action="store_const", const=choice, default=argparse.SUPPRESS, help=told
            )


def _add_settings(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """A flag for each setting. Values stay text: ``sources.load`` parses and checks them."""
    for name in names:
        if allowed(Settings.model_fields[name]) == "true or false":
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag(name), action=action, default=argparse.SUPPRESS, help=_help(name))
        else:
            kind = name.rpartition("_")[2].upper()
            parser.add_argument(flag(name), metavar=kind, default=argparse.SUPPRESS, help=_help(name))


def _help(name: str) -> str:
    field = Settings.model_fields[name]
    default = f"default {default_text(field)}; " if default_text(field) else ""
    return f"{field.description} ({allowed(field)}; {default}{', '.join(variables(name))})".replace("%", "%%")


def _flags(arguments: argparse.Namespace, *, without: Iterable[str] = ()) -> dict[str, Any]:
    return {
        name: value for name, value in vars(arguments).items() if name in Settings.model_fields.keys() - set(without)
    }


def _serve(arguments: argparse.Namespace, settings: LoadSettings) -> None:
    chosen = settings(_flags(arguments))
    from chatterbox_vllm.api.app import serve

    serve(chosen)


def _demo_checkpoint(arguments: argparse.Namespace, _settings: LoadSettings) -> None:
    from chatterbox_vllm.checkpoint import Variant
    from chatterbox_vllm.demo_checkpoint import write_demo

    made = write_demo(arguments.folder, size=arguments.size, variant=Variant(arguments.variant), seed=arguments.seed)
    print(f"{made.folder}: random weights; CHATTERBOX_MODEL={made.folder} serves them, as noise")


def _say(arguments: argparse.Namespace, settings: LoadSettings) -> None:
    chosen = settings(_flags(arguments, without=["language"]))
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    asyncio.run(_speak(arguments, chosen, text))


async def _speak(arguments: argparse.Namespace, settings: Settings, text: str) -> None:
    from chatterbox_vllm.api.app import engine_arguments, log_to_stderr

    format, options = _checked(arguments, settings, text)
    log_to_stderr(settings)
    from chatterbox_vllm.engine import AsyncChatterbox
    from chatterbox_vllm.types import SpeechRequest

    engine = await AsyncChatterbox.start(**engine_arguments(settings))
    try:
        voice = await _voice(engine, arguments.voice)
        language = arguments.language or (settings.language if engine.checkpoint.variant.is_multilingual else None)
        samples = await engine.speak(SpeechRequest(text=text, voice=voice, language=language, options=options))
    finally:
        await engine.shutdown()
    from chatterbox_vllm.api.render import render

    write_whole(arguments.output, render(samples, format, arguments.speed), "--output")
    print(f"{arguments.output}: {len(samples) / engine.sample_rate / arguments.speed:.1f} s of speech")


def _checked(arguments: argparse.Namespace, settings: Settings, text: str) -> tuple[str, SpeechOptions]:
    """Refuses what cannot work before the seconds that loading takes; returns the format and the options."""
    from chatterbox_vllm.audio.encode import check_format
    from chatterbox_vllm.audio.tempo import Tempo
    from chatterbox_vllm.text.frontend import check_text

    check_text(text)
    Tempo(arguments.speed)
    if not arguments.output.parent.is_dir():
        raise ConfigurationError(f"cannot write {arguments.output}: no such folder", param="--output")
    format = check_format(arguments.output.suffix.lstrip(".").lower())
    return format, settings.options.but(seed=arguments.seed)


async def _voice(engine: AsyncChatterbox, voice: str | None) -> VoiceFeatures:
    if voice is not None and Path(voice).is_file():  # noqa: ASYNC240 (one look, before anything else runs here)
        return await engine.voices.enrolled(Path(voice), param="--voice")
    return await engine.voices.named(voice)


if __name__ == "__main__":
    sys.exit(main())
