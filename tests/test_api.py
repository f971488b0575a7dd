"""The HTTP API over a fake engine: what is answered, in which format, and what bad input gets."""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Iterator
from typing import Any, get_args

import av
import httpx
import numpy as np
import pytest

from chatterbox_vllm.api.schemas import Format
from chatterbox_vllm.audio.encode import FORMATS, StreamEncoder
from chatterbox_vllm.audio.tempo import Tempo
from chatterbox_vllm.errors import EngineDead, MissingDependency, Overloaded
from chatterbox_vllm.types import AT_ONCE, Listening
from tests.fake_engine import PIECE, FakeChatterbox, Running, base64_of, running, wait_for, wav

GOOD = {"input": "Hello there.", "seed": 7, "response_format": "pcm"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeChatterbox()) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as made:
        yield made


def speak(client: httpx.Client, body: Any = None, **fields: Any) -> httpx.Response:
    return client.post("/v1/audio/speech", json={**GOOD, **fields} if body is None else body)


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def decoded(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.concatenate(frames)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    blocks = response.text.strip().split("\n\n")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_whole_pcm_is_the_engine_s_sound(client: httpx.Client, server: Running) -> None:
    response = speak(client)
    assert response.status_code == 200
    assert response.headers["content-type"] == "audio/pcm"
    assert response.headers["x-sample-rate"] == "24000"
    assert int(response.headers["content-length"]) == len(response.content) == 2 * PIECE * server.engine.pieces
    sound = np.concatenate(server.engine.sound(server.engine.requests[-1]))
    assert np.allclose(np.frombuffer(response.content, "<i2") / 32767, sound, atol=1e-4)


def test_streamed_pcm_equals_the_whole(client: httpx.Client) -> None:
    response = speak(client, stream=True)
    assert response.headers["transfer-encoding"] == "chunked"
    assert response.content == speak(client).content


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("streamed", [False, True])
def test_formats_are_what_they_say(client: httpx.Client, name: str, streamed: bool) -> None:
    response = speak(client, response_format=name, stream=streamed)
    assert response.headers["content-type"] == FORMATS[name]
    if name != "pcm":
        rate = 48_000 if name == "opus" else 24_000
        assert 0.8 <= len(decoded(response.content)) / rate <= 0.95


def test_mp3_is_the_default_and_every_format_is_accepted(client: httpx.Client) -> None:
    assert client.post("/v1/audio/speech", json={"input": "Hi."}).headers["content-type"] == "audio/mpeg"
    assert set(get_args(Format)) == set(FORMATS)


def test_a_whole_wav_has_its_true_size(client: httpx.Client) -> None:
    whole, streamed = speak(client, response_format="wav"), speak(client, response_format="wav", stream=True)
    assert struct.unpack("<I", whole.content[4:8])[0] == len(whole.content) - 8
    assert streamed.content[4:8] == b"\xff\xff\xff\xff"
    assert streamed.content[44:] == whole.content[44:]


@pytest.mark.parametrize("streamed", [False, True])
def test_speed_changes_the_length(client: httpx.Client, streamed: bool) -> None:
    plain, fast = speak(client), speak(client, speed=2.0, stream=streamed)
    assert 0.4 < len(fast.content) / len(plain.content) < 0.6


def test_a_stream_is_timed_by_what_its_format_and_speed_keep_back(client: httpx.Client, server: Running) -> None:
    speak(client, stream=True)
    assert server.engine.listening == AT_ONCE
    speak(client, stream=True, speed=2.0, response_format="mp3")
    assert server.engine.listening == Listening(2.0, Tempo(2.0).behind + StreamEncoder("mp3").behind)


@pytest.mark.parametrize("name", ["pcm", "mp3", "wav", "flac"])
@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream_format": "sse"}])
def test_a_sound_of_which_speed_leaves_nothing_is_no_answer(name: str, fields: dict[str, Any]) -> None:
    engine = FakeChatterbox()
    engine.sound = lambda _: [np.full(960, 0.1, np.float32)]  # type: ignore[method-assign]
    with running(engine) as started, httpx.Client(base_url=started.url) as client:
        response = speak(client, speed=4.0, response_format=name, **fields)
        assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
        assert speak(client, response_format=name, **fields).status_code == 200


@pytest.mark.parametrize("name", ["pcm", "mp3", "wav"])
def test_events_carry_the_streamed_file(client: httpx.Client, name: str) -> None:
    response = speak(client, response_format=name, stream_format="sse")
    assert response.headers["content-type"].startswith("text/event-stream")
    *deltas, done = events(response)
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    file = b"".join(base64.b64decode(event["audio"]) for event in deltas)
    assert file == speak(client, response_format=name, stream_format="audio").content
    usage = {"input_tokens": len(GOOD["input"]), "output_tokens": 20, "total_tokens": len(GOOD["input"]) + 20}
    assert done == {"type": "speech.audio.done", "usage": usage}


def test_options_reach_the_engine(client: httpx.Client, server: Running) -> None:
    assert (
        speak(client, exaggeration=1, cfg_weight=0, temperature=0, max_new_tokens=50, language="en").status_code == 200
    )
    request = server.engine.requests[-1]
    options = request.options
    assert (options.exaggeration, options.cfg_weight, options.temperature) == (1.0, 0.0, 0.0)
    assert (options.max_tokens, options.seed, options.top_p) == (50, 7, 1.0)
    assert (request.language, request.voice) == ("en", "default")


@pytest.mark.parametrize("voice", ["vera", {"id": "vera"}])
def test_a_voice_is_a_name_or_an_object(client: httpx.Client, server: Running, voice: Any) -> None:
    assert speak(client, voice=voice).status_code == 200
    assert server.engine.requests[-1].voice == "vera"


@pytest.mark.parametrize("head", ["", "data:audio/wav;base64,"])
def test_a_recording_in_the_request_is_the_voice(client: httpx.Client, server: Running, head: str) -> None:
    assert speak(client, ref_audio=head + base64_of(wav(2.0)), voice="nobody").status_code == 200
    assert server.engine.requests[-1].voice == "48000 samples"


def test_null_and_unknown_fields_are_ignored(client: httpx.Client) -> None:
    assert speak(client, voice=None, speed=None, seed=None, instructions="gently", lang_code="a").status_code == 200


def test_the_alias_route_speaks(client: httpx.Client) -> None:
    assert client.post("/audio/speech", json=GOOD).content == speak(client).content


LONG_NUMBER = "1" * 400
BAD_INPUT: dict[str, tuple[Any, int, str | None]] = {
    "empty text": ({"input": ""}, 400, "input"),
    "blank text": ({"input": " \n\t "}, 400, "input"),
    "no text": ({"voice": "default"}, 400, "input"),
    "null text": ({"input": None}, 400, "input"),
    "1 MB of text": ({"input": "word " * 200_000}, 413, "input"),
    "one character too many": ({"input": "x" * 4097}, 413, "input"),
    "NUL": ({"input": "a\0b"}, 400, "input"),
    "text is a number": ({"input": 5}, 400, "input"),
    "text is a list": ({"input": ["a"]}, 400, "input"),
    "unknown voice": ({**GOOD, "voice": "nobody"}, 404, "voice"),
    "voice is a path": ({**GOOD, "voice": "../../etc/passwd"}, 404, "voice"),
    "voice is a number": ({**GOOD, "voice": 3}, 400, "voice"),
    "voice without id": ({**GOOD, "voice": {"name": "x"}}, 400, "voice"),
    "endless voice": ({**GOOD, "voice": "v" * 10_000}, 400, "voice"),
    "unknown format": ({**GOOD, "response_format": "midi"}, 400, "response_format"),
    "format is a list": ({**GOOD, "response_format": ["mp3"]}, 400, "response_format"),
    "unknown stream format": ({**GOOD, "stream_format": "ws"}, 400, "stream_format"),
    "contradictory stream": ({**GOOD, "stream_format": "sse", "stream": False}, 400, "stream"),
    "speed too high": ({**GOOD, "speed": 4.1}, 400, "speed"),
    "speed 0": ({**GOOD, "speed": 0}, 400, "speed"),
    "number as text": ({**GOOD, "temperature": "0.5"}, 400, "temperature"),
    "number is true": ({**GOOD, "temperature": True}, 400, "temperature"),
    "switch is text": ({**GOOD, "stream": "yes"}, 400, "stream"),
    "negative temperature": ({**GOOD, "temperature": -1}, 400, "temperature"),
    "top_p 0": ({**GOOD, "top_p": 0}, 400, "top_p"),
    "penalty 0": ({**GOOD, "repetition_penalty": 0}, 400, "repetition_penalty"),
    "seed is a float": ({**GOOD, "seed": 1.5}, 400, "seed"),
    "seed too large": ({**GOOD, "seed": 2**63}, 400, "seed"),
    "no steps": ({**GOOD, "diffusion_steps": 0}, 400, "diffusion_steps"),
    "too many tokens": ({**GOOD, "max_new_tokens": 100_000}, 400, "max_new_tokens"),
    "two limits": ({**GOOD, "max_tokens": 5, "max_new_tokens": 6}, 400, "max_new_tokens"),
    "empty language": ({**GOOD, "language": ""}, 400, "language"),
    "unknown language": ({**GOOD, "language_id": "xx"}, 400, "language_id"),
    "two languages": ({**GOOD, "language": "en", "language_id": "fr"}, 400, "language"),
    "model is a number": ({**GOOD, "model": 1}, 400, "model"),
    "NaN": (b'{"input":"hi","temperature":NaN}', 400, "temperature"),
    "infinity": (b'{"input":"hi","cfg_weight":-Infinity}', 400, "cfg_weight"),
    "beyond floats": (b'{"input":"hi","min_p":1e999}', 400, "min_p"),
    "long number": (f'{{"input":"hi","top_p":{LONG_NUMBER}}}'.encode(), 400, "top_p"),
    "long integer": (f'{{"input":"hi","seed":{LONG_NUMBER}}}'.encode(), 400, "seed"),
    "not JSON": (b"input=hello", 400, None),
    "half a JSON": (b'{"input": "hel', 400, None),
    "nothing": (b"", 400, None),
    "a list": (b"[]", 400, None),
    "not UTF-8": (b'{"input": "\xff"}', 400, None),
    "half a surrogate pair": (b'{"input": "\\ud800"}', 400, None),
    "deep": (b"[" * 100_000, 400, None),
    "empty recording": ({**GOOD, "ref_audio": ""}, 400, "ref_audio"),
    "recording is no base64": ({**GOOD, "ref_audio": "%%%"}, 400, "ref_audio"),
    "recording is a URL": ({**GOOD, "ref_audio": "http://127.0.0.1/a.wav"}, 400, "ref_audio"),
    "data URL without base64": ({**GOOD, "ref_audio": "data:audio/wav,abc"}, 400, "ref_audio"),
    "0-byte wav": ({**GOOD, "ref_audio": "data:audio/wav;base64,"}, 400, "ref_audio"),
    "wav cut short": ({**GOOD, "ref_audio": base64_of(wav()[:60])}, 400, "ref_audio"),
    "text called wav": (
        {**GOOD, "ref_audio": base64_of(b"this is a text file, not a recording" * 50)},
        400,
        "ref_audio",
    ),
    "recording is a number": ({**GOOD, "ref_audio": 7}, 400, "ref_audio"),
    "recording too large": ({**GOOD, "ref_audio": "A" * 14_000_000}, 413, "ref_audio"),
    "body too large": ({**GOOD, "ref_audio": "A" * (20 * 2**20)}, 413, None),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_by_name_and_does_no_harm(client: httpx.Client, server: Running, name: str) -> None:
    body, status, param = BAD_INPUT[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post("/v1/audio/speech", content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    error = error_of(response)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert len(error["message"]) < 500
    assert speak(client).status_code == 200
    wait_for(lambda: server.services.admission.active == server.engine.active == 0)


@pytest.mark.parametrize("field", ["language", "language_id"])
def test_a_message_names_the_language_as_the_request_does(client: httpx.Client, field: str) -> None:
    error = error_of(speak(client, **{field: ""}))
    assert error["param"] == field
    assert error["message"].startswith(f"{field} must be one of ar, da, ")


def test_a_body_that_grows_too_large_is_cut_short(client: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        yield b'{"input": "'
        for _ in range(20):
            yield b"x" * 2**20

    response = client.post("/v1/audio/speech", content=endless(), headers={"content-type": "application/json"})
    assert (response.status_code, error_of(response)["code"]) == (413, "too_large")


def test_only_json_is_read(client: httpx.Client) -> None:
    """A form or plain text can be sent from any web page's script without the browser asking."""
    for headers in ({"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}, {}):
        response = client.post("/v1/audio/speech", content=json.dumps(GOOD), headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "unknown_url"),
        ("GET", "/v1/test", 404, "unknown_url"),
        ("GET", "/v1/readyz", 404, "unknown_url"),
        ("GET", "/v1/audio/speech", 405, "method_not_allowed"),
        ("POST", "/v1/audio/speech/", 404, "unknown_url"),
        ("GET", "/v1/models/", 404, "unknown_url"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/nothing", 404, "model_not_found"),
        ("GET", "/v1/audio/voices?legacy=perhaps", 400, "invalid_value"),
        ("GET", "/%ff%00", 404, "unknown_url"),
    ],
)
def test_every_error_has_openai_s_shape(client: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    response = client.request(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (RuntimeError("secret 10.0.0.1"), 500, "internal_error", None),
        (EngineDead("the engine has died"), 503, "engine_unavailable", "5"),
        (Overloaded("full", retry_after=3), 429, "rate_limit_exceeded", "3"),
        (
            MissingDependency("pykakasi", purpose="for Japanese", command="pip install pykakasi"),
            501,
            "missing_dependency",
            None,
        ),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_failures_before_the_first_sound_are_http_errors(
    error: Exception, status: int, code: str, retry: str | None, streamed: bool
) -> None:
    engine = FakeChatterbox()
    engine.break_at, engine.error = 0, error
    with running(engine) as started, httpx.Client(base_url=started.url) as client:
        response = speak(client, stream=streamed)
        assert (response.status_code, error_of(response)["code"]) == (status, code)
        assert response.headers.get("retry-after") == retry
        assert response.headers["x-request-id"]
        assert "10.0.0.1" not in response.text
        engine.break_at = None
        assert speak(client).status_code == 200


def test_request_ids(client: httpx.Client) -> None:
    assert client.get("/live", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = client.get("/live", headers={"x-request-id": "no good; <id>"}).headers["x-request-id"]
    assert made.isalnum()
    assert made != client.get("/live").headers["x-request-id"]


def test_models_and_voices(client: httpx.Client) -> None:
    models = client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]][:2] == ["chatterbox", "tts-1"]
    assert client.get("/v1/models/tts-1-hd").json()["object"] == "model"
    names = ["default", "alloy", "vera"]
    assert client.get("/v1/audio/voices").json() == {"voices": [{"id": name, "name": name} for name in names]}
    assert client.get("/v1/audio/voices?legacy=true").json() == {"voices": names}


def test_multilingual_requests_have_a_language() -> None:
    with running(FakeChatterbox(multilingual=True), language="fr") as started:
        with httpx.Client(base_url=started.url) as client:
            assert speak(client).status_code == speak(client, language_id="de").status_code == 200
            assert client.get("/v1/models").json()["data"][0]["id"] == "chatterbox-multilingual"
        assert [request.language for request in started.engine.requests] == ["fr", "de"]


def test_the_deployment_s_defaults_apply() -> None:
    with (
        running(FakeChatterbox(), temperature=0.1, cfg_weight=0.9) as started,
        httpx.Client(base_url=started.url) as client,
    ):
        assert speak(client, temperature=0.2).status_code == 200
        options = started.engine.requests[-1].options
        assert (options.temperature, options.cfg_weight) == (0.2, 0.9)


def test_a_key_guards_every_route_but_the_probes() -> None:
    with running(FakeChatterbox(), api_key="s3cret") as started, httpx.Client(base_url=started.url) as client:
        open_routes = set()
        for path, methods in client.get("/openapi.json", headers=bearer("s3cret")).json()["paths"].items():
            for method in methods:
                response = client.request(method, path.replace("{name}", "tts-1"), json=GOOD)
                if response.status_code == 401:
                    assert error_of(response)["code"] == "invalid_api_key"
                    assert response.headers["www-authenticate"] == "Bearer"
                else:
                    open_routes.add(path)
        assert open_routes == {"/live", "/ready", "/health"}
        other = [{"authorization": text} for text in ("Bearer", "Basic s3cret", "s3cret", "Bearer s3cret s3cret")]
        for wrong in ({}, bearer("s3cre"), bearer("s3crett"), *other):
            for path in ("/v1/models", "/audio/voices", "/v1/audio/models", "/openapi.json"):
                assert client.get(path, headers=wrong).status_code == 401
            assert client.post("/audio/speech", json=GOOD, headers=wrong).status_code == 401
        assert started.engine.requests == []
        assert client.post("/v1/audio/speech", json=GOOD, headers=bearer("s3cret")).status_code == 200


@pytest.mark.parametrize("key", ["pässwörd", "voilà", "密钥"])
def test_a_key_may_have_letters_of_any_alphabet(key: str) -> None:
    with running(FakeChatterbox(), api_key=key) as started, httpx.Client(base_url=started.url) as client:
        for sent, status in ((key, 200), (key[:-1], 401), (key + "é", 401)):
            headers = {b"authorization": b"Bearer " + sent.encode()}
            assert client.get("/v1/models", headers=headers).status_code == status


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_any_key_is_taken_where_none_is_set(client: httpx.Client) -> None:
    assert client.get("/v1/models", headers=bearer("whatever")).status_code == 200


def test_the_probes_tell_life_from_readiness() -> None:
    with running(FakeChatterbox()) as started, httpx.Client(base_url=started.url) as client:
        assert [client.get(path).status_code for path in ("/live", "/ready", "/health")] == [200, 200, 200]
        started.services.admission.drain()
        assert [client.get(path).status_code for path in ("/live", "/ready", "/health")] == [200, 503, 503]
        assert [client.head(path).status_code for path in ("/live", "/ready", "/health")] == [200, 503, 503]
        assert client.get("/health").json()["status"] == "draining"
        started.engine.dead = True
        assert [client.get(path).status_code for path in ("/live", "/ready", "/health")] == [503, 503, 503]
        refused = speak(client)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "engine_unavailable")


def test_the_schema_describes_the_body(client: httpx.Client) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/v1/audio/speech"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert {"input", "voice", "exaggeration", "ref_audio"} <= set(schema["properties"])
    assert "$ref" not in json.dumps(schema)
