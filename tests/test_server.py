"""The whole server: HTTP in, sound out, through a real engine on the tiny demo checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import multiprocessing
import socket
import struct
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import httpx
import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from chatterbox_vllm import engine as engine_module
from chatterbox_vllm.audio.encode import FORMATS
from chatterbox_vllm.checkpoint import Checkpoint
from chatterbox_vllm.engine import AsyncChatterbox
from chatterbox_vllm.types import OPTION_RANGES, SAMPLES_PER_TOKEN
from chatterbox_vllm.vocoder.distance import mel_distance
from chatterbox_vllm.vocoder.stage import Vocoder
from chatterbox_vllm.vocoder.utterance import Chunk, Utterance
from tests.audio_support import sound_file, voice_like
from tests.fake_engine import Running, base64_of, running, wait_for
from tests.test_api import BAD_INPUT, error_of

GOOD = {"input": "Good day to you, dear listener.", "response_format": "pcm", "seed": 5, "max_new_tokens": 30}
SENTENCES = [f"Sentence number {n} is about as long as the sentences of a story are." for n in range(12)]
RECORDING = base64_of(sound_file(voice_like(2.0)))


@dataclass(eq=False)
class Heard:
    """What the vocoder was given for one utterance, and what it gave."""

    utterance: Utterance
    chunks: list[tuple[Tensor, bool]] = field(default_factory=list)
    sounds: list[Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> Tensor:
        return torch.cat([tokens for tokens, _ in self.chunks])

    @property
    def mel(self) -> Tensor:
        assert self.utterance.mel is not None
        return self.utterance.mel


@dataclass
class Server:
    """A server that speaks, and a look inside."""

    running: Running
    processes: set[psutil.Process] = field(default_factory=set)

    @property
    def engine(self) -> AsyncChatterbox:
        engine = self.running.services.engine
        assert engine is not None
        return engine

    def speak(self, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.running.url}/v1/audio/speech", json={**GOOD, **fields}, timeout=120)

    def sound(self, **fields: Any) -> bytes:
        """A good answer's file; a broken stream raises."""
        response = self.speak(**fields)
        assert response.status_code == 200, response.text
        return response.content

    def status(self, path: str) -> int:
        return httpx.get(self.running.url + path, timeout=10).status_code

    def is_up(self) -> bool:
        assert self.running.services.failure is None
        return self.status("/ready") == 200

    def inside(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What ``work`` returns in the server's event loop."""
        loop = self.running.server._loop
        assert loop is not None
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    def tasks(self) -> set[asyncio.Task[Any]]:
        async def others() -> set[asyncio.Task[Any]]:
            return asyncio.all_tasks() - {asyncio.current_task()}

        return self.inside(others())

    @property
    def held(self) -> dict[str, int]:
        """How much is held of what requests may hold."""
        return {
            "slots": self.running.services.admission.active,
            "requests": self.engine.health().active,
            "T3": self.engine._t3.unfinished,
            "vocoder": self.engine._worker.waiting,
        }

    def wait_until_idle(self, seconds: float = 15.0) -> None:
        wait_for(lambda: not any(self.held.values()), seconds)

    def has_leaked(self) -> bool:
        """Whether vLLM holds KV blocks."""
        leaked: bool = self.inside(self.engine._t3.leaked())
        return leaked

    @contextlib.contextmanager
    def eavesdropping(self) -> Iterator[dict[int, list[Heard]]]:
        """The utterances that pass through the vocoder meanwhile, by their seed."""
        heard: defaultdict[int, list[Heard]] = defaultdict(list)
        submit = self.engine._worker.submit

        async def listening(chunk: Chunk) -> Tensor:
            known = heard[chunk.utterance.seed]
            if not known or known[-1].utterance is not chunk.utterance:
                known.append(Heard(chunk.utterance))
            known[-1].chunks.append((chunk.tokens, chunk.final))
            sound = await submit(chunk)
            known[-1].sounds.append(sound)
            return sound

        with patch.object(self.engine._worker, "submit", listening):
            yield heard


@pytest.fixture(scope="module")
def server(demo: Checkpoint, cache: Path) -> Iterator[Server]:
    before = engine_processes()
    with running(None, model=str(demo.folder), watermark=False, max_model_len=1024, max_batch_size=32) as started:
        made = Server(started)
        wait_for(made.is_up, seconds=240)
        made.processes = engine_processes() - before
        made.sound(stream=True)
        yield made
    wait_for(lambda: not any(map(is_alive, made.processes)), seconds=30)


def engine_processes() -> set[psutil.Process]:
    """Another test's engine may have some, too."""
    return {psutil.Process(child.pid) for child in multiprocessing.active_children()}


@pytest.fixture(scope="module")
def vocoder(demo: Checkpoint) -> Vocoder:
    """Another one with the server's weights."""
    return Vocoder.from_checkpoint(demo.s3gen)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def together(work: Callable[[Any], Any], items: Iterable[Any], clients: int = 32) -> list[Any]:
    """As many clients at once."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(work, items))


def pcm(file: bytes) -> np.ndarray[Any, np.dtype[np.int16]]:
    """The samples of a wav or pcm file."""
    return np.frombuffer(file[44:] if file.startswith(b"RIFF") else file, "<i2")


def pcm_of(sounds: list[Tensor]) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.rint(torch.cat(sounds).clamp(-1, 1).numpy() * 32767).astype("<i2")


# 32 clients at once: streams against whole files


@dataclass
class Answer:
    """One request's two answers."""

    fields: dict[str, Any]
    stream: bytes
    whole: bytes
    streamed: Heard
    spoken: Heard


VARIED: list[dict[str, Any]] = [
    {},
    {"ref_audio": RECORDING},
    {"cfg_weight": 0.0, "voice": "alloy"},
    {"temperature": 0.0, "exaggeration": 1.5},
    {"top_p": 0.8, "min_p": 0.0, "repetition_penalty": 1.5, "cfg_weight": 1.0},
]


def asked(index: int) -> dict[str, Any]:
    return {
        "input": " ".join(SENTENCES[index % 7 : index % 7 + 1 + index % 3]),
        "seed": 1000 * index,
        "response_format": "wav" if index % 2 else "pcm",
        "max_new_tokens": 60 + 10 * (index % 5),
        **VARIED[index % len(VARIED)],
    }


@pytest.fixture(scope="module")
def answers(server: Server) -> list[Answer]:
    """32 requests, all streamed at once, then all whole at once."""
    requests = [asked(index) for index in range(32)]
    with server.eavesdropping() as heard:
        streams = together(lambda fields: server.sound(stream=True, **fields), requests)
        wholes = together(lambda fields: server.sound(**fields), requests)
    each = [heard[fields["seed"]] for fields in requests]
    assert [len(utterances) for utterances in each] == [2] * 32
    return [Answer(*parts[:3], *parts[3]) for parts in zip(requests, streams, wholes, each, strict=True)]


def test_streams_are_complete_and_as_long_as_the_whole(answers: list[Answer]) -> None:
    for answer in answers:
        assert len(answer.streamed.chunks) > 1
        assert len(answer.stream) == len(answer.whole)
        assert len(pcm(answer.stream)) == SAMPLES_PER_TOKEN * len(answer.spoken.tokens) > SAMPLES_PER_TOKEN * 20


def test_streams_have_the_tokens_of_the_whole(answers: list[Answer]) -> None:
    for answer in answers:
        assert torch.equal(answer.streamed.tokens, answer.spoken.tokens)
    assert len({tuple(answer.spoken.tokens.tolist()) for answer in answers}) == len(answers)


def test_what_is_sent_is_what_the_vocoder_gave(answers: list[Answer]) -> None:
    for answer in answers:
        assert np.array_equal(pcm(answer.stream), pcm_of(answer.streamed.sounds))
        assert np.array_equal(pcm(answer.whole), pcm_of(answer.spoken.sounds))


def test_streams_are_within_the_vocoder_s_distance(answers: list[Answer], vocoder: Vocoder) -> None:
    """In mels, 0.3 to 0.7 dB, where another seed's noise makes 12 dB of the same tokens."""
    for answer in answers:
        assert 0.0 < mel_distance(answer.spoken.mel, answer.streamed.mel) < 1.0
    for answer in answers[:4]:
        other = vocoder.open(answer.spoken.utterance.voice, seed=answer.fields["seed"] + 1)
        vocoder.advance([Chunk(other, answer.spoken.tokens, final=True)])
        assert other.mel is not None
        assert mel_distance(answer.spoken.mel, other.mel) > 8.0


def test_streams_have_no_seams(answers: list[Answer], vocoder: Vocoder) -> None:
    """Their sound is the one that their mel has when it is spoken in one piece."""
    for answer in answers:
        utterance = answer.streamed.utterance
        with patch.object(vocoder, "_flow", lambda _, mel=answer.streamed.mel: [mel]):
            sound = vocoder.synthesize(answer.streamed.tokens, utterance.voice, seed=utterance.seed)
        assert (sound - torch.cat(answer.streamed.sounds)).abs().max() < 1e-5


def test_streams_can_be_made_again_from_their_chunks(answers: list[Answer], vocoder: Vocoder) -> None:
    for answer in answers[:5]:
        utterance = vocoder.open(answer.streamed.utterance.voice, seed=answer.fields["seed"])
        sounds = [vocoder.advance([Chunk(utterance, *chunk)])[0] for chunk in answer.streamed.chunks]
        assert np.array_equal(pcm(answer.stream), pcm_of(sounds))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_sounds_the_same_alone_and_in_a_batch(server: Server, answers: list[Answer], streamed: bool) -> None:
    """A stream, too: its tokens decide where it is cut, not how fast they came."""
    for answer in answers[:5]:
        assert server.sound(stream=streamed, **answer.fields) == (answer.stream if streamed else answer.whole)


# long text and formats


@pytest.mark.parametrize("streamed", [False, True])
def test_a_long_text_is_split_spoken_and_joined(server: Server, streamed: bool) -> None:
    with server.eavesdropping() as heard:
        joined = pcm(server.sound(input=" ".join(SENTENCES), stream=streamed))
    assert list(heard) == [5, 6, 7]
    parts = [utterances[0] for utterances in heard.values()]
    assert np.array_equal(joined, np.concatenate([pcm_of(part.sounds) for part in parts]))
    pieces = [" ".join(SENTENCES[start : start + 4]) for start in (0, 4, 8)]
    alone = [server.sound(input=piece, seed=seed) for seed, piece in enumerate(pieces, start=5)]
    assert len(joined) == sum(len(pcm(sound)) for sound in alone)
    if not streamed:
        assert np.array_equal(joined, np.concatenate([pcm(sound) for sound in alone]))


@pytest.mark.parametrize("streamed", [False, True])
def test_formats_decode_to_the_same_sound(server: Server, streamed: bool) -> None:
    with server.eavesdropping() as heard:
        files = {name: server.sound(response_format=name, stream=streamed) for name in FORMATS}
    for name, utterance in zip(files, heard[5], strict=True):
        sound = pcm_of(utterance.sounds)
        if name in ("wav", "pcm"):
            assert np.array_equal(pcm(files[name]), sound)
            continue
        decoded = decode(files[name])
        if name == "flac":
            assert np.array_equal(decoded, sound)
        assert 0 <= len(decoded) - len(sound) < 0.1 * 24_000
        assert 0.8 < decoded.std() / sound.std() < 1.25


def decode(file: bytes) -> np.ndarray[Any, np.dtype[np.int16]]:
    """A file's samples at 24 kHz."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=24_000)
    with av.open(io.BytesIO(file)) as container:
        frames = [frame for coded in [*container.decode(audio=0), None] for frame in resampler.resample(coded)]
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])


# bad input


BAD_HERE: dict[str, tuple[Any, int, str | None]] = {
    **{f"{name} is NaN": (f'{{"input":"hi","{name}":NaN}}'.encode(), 400, name) for name in [*OPTION_RANGES, "speed"]},
    "half a wav": ({**GOOD, "ref_audio": base64_of(sound_file(voice_like(2.0))[:40_000])}, 400, "ref_audio"),
    "silence": ({**GOOD, "ref_audio": base64_of(sound_file(np.zeros(48_000, np.float32)))}, 400, "ref_audio"),
    "too short": ({**GOOD, "ref_audio": base64_of(sound_file(voice_like(0.2)))}, 400, "ref_audio"),
    "unknown language": ({**GOOD, "language": "xx"}, 400, "language"),
    "a language of another model": ({**GOOD, "language_id": "fr"}, 400, "language_id"),
    "nothing to see": ({"input": "\u200b\u2060"}, 400, "input"),
}


@pytest.mark.parametrize("streamed", [False, True])
def test_bad_input_is_refused_by_name_and_does_no_harm(server: Server, streamed: bool) -> None:
    answered, expected = {}, {}
    with httpx.Client(base_url=server.running.url, timeout=30) as client:
        for name, (body, status, param) in (BAD_INPUT | BAD_HERE).items():
            content = body if isinstance(body, bytes) else json.dumps({"stream": streamed, **body}).encode()
            response = client.post("/v1/audio/speech", content=content, headers={"content-type": "application/json"})
            answered[name] = (response.status_code, error_of(response)["param"])
            expected[name] = (status, param)
    assert answered == expected
    server.wait_until_idle()
    assert len(server.sound(stream=streamed)) == 2 * SAMPLES_PER_TOKEN * 30


ODD_TEXTS = [
    "!!! ... ???", "\N{WINKING FACE}", "\u202eolleh", "[STOP][START][UH]", "<|endoftext|> {{x}}", "e\u0301" * 50,
    "\u4f60\u597d", "x" * 4096, "a\n\n\tb\r\nc", "1" * 300, "\ufffd\uffff",
]  # fmt: skip


def test_odd_texts_are_spoken(server: Server) -> None:
    for response in together(lambda text: server.speak(input=text, max_new_tokens=3), ODD_TEXTS):
        assert response.status_code == 200, response.text
        assert len(response.content) >= 2 * SAMPLES_PER_TOKEN


# clients that leave


def leave(server: Server, index: int) -> None:
    """Sends a long request and goes: after the first sound or, of a whole file, before it; by a close or a reset."""
    streamed = index % 2 == 0
    body = json.dumps({**GOOD, "input": " ".join(SENTENCES), "max_new_tokens": 200, "stream": streamed}).encode()
    head = "POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.running.port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if streamed:
            assert connection.recv(64).startswith(b"HTTP/1.1 200")
        else:
            time.sleep(index % 10 / 20)
        if index % 3 == 0:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_one_client_that_leaves_gives_everything_back(server: Server) -> None:
    fields = {**GOOD, "input": " ".join(SENTENCES * 4), "max_new_tokens": 1000, "stream": True}
    with httpx.stream("POST", f"{server.running.url}/v1/audio/speech", json=fields, timeout=60) as response:
        pieces = response.iter_raw()
        next(pieces)
        held = server.held
        assert (held["slots"], held["requests"], held["T3"] > 1) == (1, 1, True)
        assert server.has_leaked()
    server.wait_until_idle(seconds=4)
    assert not server.has_leaked()


def test_200_requests_of_which_a_third_is_cut_leave_nothing(server: Server) -> None:
    before, whole = server.tasks(), server.sound(diffusion_steps=2)
    utterances: list[weakref.ref[Utterance]] = []
    aborted: list[Any] = []
    llm = server.engine._t3._llm
    opened, abort = engine_module.open_utterance, llm.abort

    def opening(*args: Any, **options: Any) -> Utterance:
        utterance = opened(*args, **options)
        utterances.append(weakref.ref(utterance))
        return utterance

    async def aborting(*args: Any, **options: Any) -> None:
        aborted.append(args)
        await abort(*args, **options)

    def client(index: int) -> bytes | None:
        if index % 3 == 0:
            leave(server, index // 3)
            return None
        return server.sound(diffusion_steps=2, stream=index % 3 == 1)

    with patch.object(engine_module, "open_utterance", opening), patch.object(llm, "abort", aborting):
        kept = together(client, range(200), clients=24)
        server.wait_until_idle()
    assert [len(sound) for sound in kept if sound is not None] == [len(whole)] * 133
    assert set(kept[2::3]) == {whole}
    assert len(aborted) > 67
    assert not server.has_leaked()
    wait_for(lambda: server.tasks() <= before, seconds=5)
    wait_for(lambda: gc.collect() >= 0 and not any(utterance() for utterance in utterances), seconds=5)
    assert server.sound(diffusion_steps=2) == whole


# the engine's death; another one is starting after it


def test_the_engine_s_death_is_told_to_everyone(server: Server) -> None:
    fields = {"input": " ".join(SENTENCES * 4), "max_new_tokens": 1000, "stream": True}
    begun = threading.Semaphore(0)

    def client() -> tuple[int, float]:
        with httpx.stream("POST", f"{server.running.url}/v1/audio/speech", json={**GOOD, **fields}, timeout=60) as made:
            try:
                for _ in made.iter_raw():
                    begun.release()
            except httpx.RemoteProtocolError:
                return 0, time.monotonic()
            return made.status_code, time.monotonic()

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client) for _ in range(8)]
        for _ in range(2):
            assert begun.acquire(timeout=60)
        killed = time.monotonic()
        for process in server.processes:
            process.kill()
        wait_for(lambda: server.status("/ready") == 503, seconds=3)
        refused = server.speak()
        answers = [made.result() for made in clients]
    assert (refused.status_code, error_of(refused)["code"]) == (503, "engine_unavailable")
    assert {status for status, _ in answers} <= {0, 503}
    assert 0 in {status for status, _ in answers}
    assert max(ended for _, ended in answers) - killed < 5
    wait_for(lambda: not any(map(is_alive, server.processes)), seconds=10)
    assert server.running.services.admission.active == 0
