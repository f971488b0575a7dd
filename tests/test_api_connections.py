"""What happens to connections: clients that leave, streams that break, limits, drain; over a real uvicorn."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import openai
import pytest

from chatterbox_vllm import cli
from chatterbox_vllm.api import app, body, drain
from chatterbox_vllm.errors import CheckpointError
from chatterbox_vllm.settings import Settings
from tests.fake_engine import PIECE, FakeChatterbox, Running, free_port, is_ready, running, wait_for

GOOD: dict[str, Any] = {"input": "Hello there.", "response_format": "pcm"}
HEADERS = "Host: x\r\nContent-Type: application/json\r\n"


@contextlib.contextmanager
def raw_request(server: Running, *, version: str = "1.1", **fields: Any) -> Iterator[socket.socket]:
    """A socket that has sent one request."""
    body = json.dumps({**GOOD, **fields}).encode()
    head = f"POST /v1/audio/speech HTTP/{version}\r\n{HEADERS}Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        yield connection


def everything(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def first_sound(connection: socket.socket) -> bytes:
    received = b""
    while len(received.partition(b"\r\n\r\n")[2]) < 100:
        received += connection.recv(65536)
    return received


@pytest.fixture
def slow() -> Iterator[Running]:
    """100 pieces, 50 ms each: 5 s for a request."""
    with running(FakeChatterbox(pieces=100, delay=0.05)) as server:
        yield server


@pytest.mark.parametrize(
    "fields", [{"stream": True}, {"stream_format": "sse"}, {"stream": True, "response_format": "mp3"}]
)
def test_the_first_sound_is_sent_at_once(slow: Running, fields: dict[str, Any]) -> None:
    started = time.monotonic()
    with raw_request(slow, **fields) as connection:
        first_sound(connection)
        assert time.monotonic() - started < 1.0


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream_format": "sse"}])
@pytest.mark.parametrize("when", ["at once", "midway"])
def test_a_client_that_leaves_aborts_its_request(slow: Running, fields: dict[str, Any], when: str) -> None:
    with raw_request(slow, **fields) as connection:
        if when == "midway" and fields:
            first_sound(connection)
        else:
            wait_for(lambda: slow.engine.active == 1)
    assert wait_for(lambda: slow.engine.aborted == 1) < 0.5
    assert wait_for(lambda: slow.services.admission.active == 0) < 0.5
    assert slow.engine.active == slow.engine.finished == 0


def test_a_client_that_resets_aborts_its_request(slow: Running) -> None:
    with raw_request(slow, stream=True) as connection:
        first_sound(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert wait_for(lambda: slow.engine.aborted == 1) < 0.5


def test_others_do_not_notice_that_one_leaves() -> None:
    with running(FakeChatterbox(pieces=10, delay=0.02)) as server:
        whole = httpx.post(f"{server.url}/v1/audio/speech", json=GOOD).content
        received: list[bytes] = []

        def stay() -> None:
            answer = httpx.post(f"{server.url}/v1/audio/speech", json={**GOOD, "stream": True}, timeout=30)
            received.append(answer.content)

        threads = [threading.Thread(target=stay) for _ in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(8):
            with raw_request(server, stream=True) as connection:
                first_sound(connection)
        for thread in threads:
            thread.join()
        assert received == [whole] * 8
        wait_for(lambda: server.services.admission.active == 0)
        assert server.engine.finished + server.engine.aborted == 17
        assert server.engine.finished >= 9


def test_a_client_that_leaves_while_sending_harms_nothing(slow: Running) -> None:
    with socket.create_connection(("127.0.0.1", slow.port)) as connection:
        connection.sendall(f"POST /v1/audio/speech HTTP/1.1\r\n{HEADERS}Content-Length: 99\r\n\r\n{{".encode())
        time.sleep(0.05)
    assert httpx.get(f"{slow.url}/ready").status_code == 200
    assert slow.engine.requests == []


@pytest.mark.parametrize("name", ["pcm", "mp3", "wav"])
def test_a_stream_that_breaks_has_no_clean_end(name: str) -> None:
    engine = FakeChatterbox()
    engine.break_at = 2
    with running(engine) as server:
        with raw_request(server, stream=True, response_format=name) as connection:
            received = everything(connection)
        assert received.startswith(b"HTTP/1.1 200")
        assert not received.endswith(b"0\r\n\r\n")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.post(f"{server.url}/v1/audio/speech", json={**GOOD, "stream": True, "response_format": name})
        assert server.services.admission.active == engine.active == 0


def test_broken_events_say_why_and_have_no_clean_end() -> None:
    engine = FakeChatterbox()
    engine.break_at = 2
    with running(engine) as server, raw_request(server, stream_format="sse") as connection:
        received = everything(connection)
    assert not received.endswith(b"0\r\n\r\n")
    last = json.loads(received.rpartition(b"data: ")[2].partition(b"\n")[0])
    assert (last["type"], last["error"]["code"]) == ("error", "internal_error")
    assert "10.0.0.1" not in last["error"]["message"]
    assert b"speech.audio.done" not in received


def test_http_1_0_gets_the_whole_file() -> None:
    """It has no chunks, so that a broken stream would look complete."""
    with running(FakeChatterbox()) as server, raw_request(server, version="1.0", stream=True) as connection:
        head, _, body = everything(connection).partition(b"\r\n\r\n")
    assert f"content-length: {2 * 4 * PIECE}".encode() in head.lower()
    assert len(body) == 2 * 4 * PIECE


def test_a_reader_that_stalls_is_cut() -> None:
    engine = FakeChatterbox(pieces=4000)
    with running(engine, stalled_reader_timeout=0.3) as server, raw_request(server, stream=True) as connection:
        first_sound(connection)
        wait_for(lambda: engine.aborted == 1, seconds=10)
        wait_for(lambda: server.services.admission.active == 0)
        assert not everything(connection).endswith(b"0\r\n\r\n")


def test_a_body_that_does_not_arrive_frees_its_place(slow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "MOST_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", slow.port), timeout=10) as connection:
        connection.sendall(f"POST /v1/audio/speech HTTP/1.1\r\n{HEADERS}Content-Length: 100\r\n\r\n{{".encode())
        wait_for(lambda: slow.services.admission.active == 1)
        answer = connection.recv(65536)
    assert b" 408 " in answer.partition(b"\r\n")[0]
    assert b"request_timeout" in answer
    wait_for(lambda: slow.services.admission.active == 0)


def test_requests_over_the_limit_are_refused_until_one_is_done() -> None:
    with running(FakeChatterbox(pieces=100, delay=0.05), max_concurrent_requests=2) as server:
        with raw_request(server, stream=True) as first, raw_request(server, stream=True) as second:
            first_sound(first)
            first_sound(second)
            with httpx.Client(base_url=server.url) as client:
                client.get("/live")
                started = time.monotonic()
                refused = client.post("/v1/audio/speech", json=GOOD)
                assert time.monotonic() - started < 0.5
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        wait_for(lambda: server.services.admission.active == 0)
        server.engine.delay = 0.0
        assert httpx.post(f"{server.url}/v1/audio/speech", json=GOOD).status_code == 200


SERVER = """
import sys
from chatterbox_vllm import cli
from chatterbox_vllm.api import app
from tests.fake_engine import FakeChatterbox

async def start(settings):
    return engine
engine = FakeChatterbox(pieces=20, delay=0.05)
app._engine = start
status = cli.main(["serve", *sys.argv[1:]])
print("stopped", engine.dead, engine.finished, engine.aborted, flush=True)
sys.exit(status)
"""


@contextlib.contextmanager
def server_process(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``chatterbox-vllm serve`` in a process of its own, with the fake engine; 1 s for a request."""
    port = str(free_port())
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, "--port", port, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: process.poll() is not None or is_ready(url), seconds=30)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def test_a_signal_lets_requests_finish_and_refuses_new_ones() -> None:
    with server_process() as (process, url):
        with httpx.Client(base_url=url, timeout=10) as client, httpx.Client(base_url=url) as other:
            other.get("/live")
            with client.stream("POST", "/v1/audio/speech", json={**GOOD, "stream": True}) as response:
                pieces = response.iter_raw()
                received = next(pieces)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
                refused = other.post("/v1/audio/speech", json=GOOD)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
                assert httpx.get(f"{url}/ready").status_code == 503
                assert httpx.get(f"{url}/live").status_code == 200
                received += b"".join(pieces)
        assert len(received) == 2 * 20 * PIECE
        assert process.wait(5) == 0
        assert process.communicate()[0].endswith("stopped True 1 0\n")


def test_the_drain_has_an_end() -> None:
    with server_process("--drain-timeout", "0.2") as (process, url):
        with httpx.stream("POST", f"{url}/v1/audio/speech", json={**GOOD, "stream": True}) as response:
            pieces = response.iter_raw()
            next(pieces)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                list(pieces)
        assert process.wait(5) == 0
        assert process.communicate()[0].endswith("stopped True 0 1\n")


def test_a_second_signal_cuts_what_is_in_hand_but_not_an_echo_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "ECHO", 0.5)
    with (
        running(FakeChatterbox(pieces=1, delay=30), drain_timeout=30) as server,
        raw_request(server) as connection,
    ):
        wait_for(lambda: server.engine.active == 1)
        server.server.handle_exit(signal.SIGINT, None)
        server.server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.6)
        assert server.engine.active == 1
        server.server.handle_exit(signal.SIGTERM, None)
        assert everything(connection).startswith(b"HTTP/1.1 503")
    assert server.engine.aborted == 1


def test_a_request_whose_body_still_arrives_when_the_drain_begins_is_finished() -> None:
    content = json.dumps(GOOD).encode()
    with (
        running(FakeChatterbox(), max_concurrent_requests=1) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection,
    ):
        head = f"POST /v1/audio/speech HTTP/1.1\r\n{HEADERS}Content-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content[:-1])
        wait_for(lambda: server.services.admission.active == 1)
        assert httpx.post(f"{server.url}/v1/audio/speech", json=GOOD).status_code == 429
        server.server.handle_exit(signal.SIGTERM, None)
        connection.sendall(content[-1:])
        received = everything(connection)
    assert received.startswith(b"HTTP/1.1 200")
    assert len(received.partition(b"\r\n\r\n")[2]) == 2 * 4 * PIECE
    assert server.services.admission.active == 0


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
def test_requests_that_the_drain_cuts_before_their_first_sound_get_503(fields: dict[str, Any]) -> None:
    with (
        running(FakeChatterbox(pieces=1, delay=30), drain_timeout=0.2) as server,
        raw_request(server, **fields) as connection,
    ):
        wait_for(lambda: server.engine.active == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        head, _, body = everything(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503")
    assert json.loads(body)["error"]["code"] == "engine_unavailable"
    assert server.engine.aborted == 1


def test_the_probes_answer_while_the_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    may_start, engine = threading.Event(), FakeChatterbox()

    async def start(_settings: Settings) -> FakeChatterbox:
        await asyncio.to_thread(may_start.wait)
        return engine

    monkeypatch.setattr(app, "_engine", start)
    with running(None) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/live").status_code == 200
        early = client.get("/ready")
        assert (early.status_code, early.json()["reason"]) == (503, "the engine is starting")
        refused = client.post("/v1/audio/speech", json=GOOD)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
        may_start.set()
        wait_for(lambda: client.get("/ready").status_code == 200)
        assert client.post("/v1/audio/speech", json=GOOD).status_code == 200
    assert engine.dead


@pytest.mark.parametrize("error", [CheckpointError("no such folder"), RuntimeError("CUDA error")])
def test_an_engine_that_cannot_start_ends_the_server(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def start(_settings: Settings) -> FakeChatterbox:
        await asyncio.sleep(0.1)
        raise error

    monkeypatch.setattr(app, "_engine", start)
    with pytest.raises(type(error), match=str(error)):
        app.serve(Settings(port=0))


def test_a_port_that_is_taken_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    told = capsys.readouterr().err
    assert told.startswith("chatterbox-vllm: cannot listen on 127.0.0.1:")
    assert told.count("\n") == 1


@pytest.fixture(scope="module")
def sdk() -> Iterator[openai.OpenAI]:
    with running(FakeChatterbox()) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="anything", max_retries=0)


@pytest.mark.parametrize("voice", ["alloy", {"id": "vera"}])
def test_openai_s_client_gets_a_file(sdk: openai.OpenAI, tmp_path: Path, voice: Any) -> None:
    target = tmp_path / "speech.mp3"
    with sdk.audio.speech.with_streaming_response.create(model="tts-1", voice=voice, input="Hi.") as response:
        response.stream_to_file(target)
    assert response.headers["content-type"] == "audio/mpeg"
    with av.open(str(target)) as container:
        assert container.format.name == "mp3"


def test_openai_s_client_streams_with_our_fields(sdk: openai.OpenAI) -> None:
    create = sdk.audio.speech.with_streaming_response.create
    extra = {"cfg_weight": 0.3, "seed": 5}
    with create(
        model="chatterbox", voice="vera", input="Hi.", response_format="pcm", stream_format="audio", extra_body=extra
    ) as response:
        assert sum(map(len, response.iter_bytes())) == 2 * 4 * PIECE


def test_openai_s_client_reads_events(sdk: openai.OpenAI) -> None:
    create = sdk.audio.speech.with_streaming_response.create
    with create(
        model="gpt-4o-mini-tts", voice="alloy", input="Hi.", response_format="pcm", stream_format="sse"
    ) as response:
        events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
    assert sum(len(base64.b64decode(event.get("audio", ""))) for event in events) == 2 * 4 * PIECE
    assert events[-1]["usage"]["output_tokens"] == 20


def test_openai_s_client_raises_our_errors(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.audio.speech.create(model="tts-1", voice="alloy", input="")
    assert (bad.value.param, bad.value.type) == ("input", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.audio.speech.create(model="tts-1", voice="nobody", input="Hi.")
    assert (unknown.value.param, unknown.value.code) == ("voice", "voice_not_found")
    assert next(model.id for model in sdk.models.list()) == "chatterbox"
