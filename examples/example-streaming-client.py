"""Ask a running server for speech and save it as it is made, or play it: sound comes long before the text is spoken.

python examples/example-streaming-client.py "Hello there." -o hello.wav
python examples/example-streaming-client.py "Hello there." -o - | aplay -f S16_LE -r 24000
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import httpx
import soundfile

TEXT = "This arrives piece by piece. While you hear the first words, the last ones are still to be spoken."
RATE, BYTES = 24_000, 2  # pcm is raw 16-bit mono


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Stream speech from a server.")
    parser.add_argument("text", nargs="?", default=TEXT)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's")
    parser.add_argument("--model", default=os.environ.get("CHATTERBOX_MODEL", "english"))
    parser.add_argument("--voice", default="default", help="an id of /v1/audio/voices")
    parser.add_argument("--max-tokens", type=int, default=1000, help="longest utterance; 25 tokens are a second")
    parser.add_argument("-o", "--output", default="speech.wav", help="- = raw samples to the standard output")
    arguments = parser.parse_args(argv)

    body = {"model": arguments.model, "input": arguments.text, "voice": arguments.voice}
    body |= {"max_tokens": arguments.max_tokens, "response_format": "pcm", "stream_format": "audio"}
    with ExitStack() as opened:
        stream = httpx.stream("POST", f"{arguments.url}/v1/audio/speech", json=body, timeout=60)
        started, received = time.perf_counter(), 0
        answer = opened.enter_context(stream)
        if answer.is_error:
            sys.exit(answer.read().decode())
        write = _writer(arguments.output, opened)
        for samples in answer.iter_bytes(RATE // 50 * BYTES):  # 20 ms; whole samples, but for a broken stream's last
            if not received:
                print(f"first sound after {time.perf_counter() - started:.2f} s", file=sys.stderr)
            received += len(samples)
            write(samples)
    seconds = time.perf_counter() - started
    print(f"{received / BYTES / RATE:.1f} s of sound in {seconds:.1f} s", file=sys.stderr)


def _writer(output: str, opened: ExitStack) -> Callable[[bytes], object]:
    if output == "-":
        return lambda samples: (sys.stdout.buffer.write(samples), sys.stdout.buffer.flush())
    file = opened.enter_context(soundfile.SoundFile(output, "w", RATE, channels=1, subtype="PCM_16"))
    return lambda samples: file.buffer_write(samples, dtype="int16")


if __name__ == "__main__":
    main()
