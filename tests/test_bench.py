"""The benches: what counts as heard, as failed and as an underrun, and that the commands run."""

from __future__ import annotations

import asyncio
import json
import struct
import subprocess
import sys
import threading
import time
from collections import Counter as Tally
from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from chatterbox_vllm import cli
from chatterbox_vllm.bench import observers, report, sentences, serve, traffic
from chatterbox_vllm.bench.client import Answer, Transfer, answer, transfer
from chatterbox_vllm.bench.playback import Playback, playback
from chatterbox_vllm.errors import ConfigurationError, EngineError, MissingDependency
from tests.fake_engine import PIECE, FakeChatterbox, running

ROOT = Path(__file__).resolve().parent.parent
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def sound(seconds: float) -> bytes:
    return b"\x01\x02" * round(24_000 * seconds)


def wav(data: bytes, size: int = 0xFFFFFFFF, *, code: int = 1, channels: int = 1, rate: int = 24_000) -> bytes:
    layout = struct.pack("<HHIIHH", code, channels, rate, 2 * channels * rate, 2 * channels, 16)
    return (
        b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0"
        + layout
        + b"LIST\x02\0\0\0ab"
        + struct.pack("<4sI", b"data", size)
        + data
    )


# --- what a listener hears


@pytest.mark.parametrize(
    ("chunks", "heard"),
    [
        ([], None),
        ([(1.0, 0)], None),
        ([(1.0, 100)], Playback(2.0)),
        ([(1.0, 100), (2.0, 50)], Playback(2.5)),  # just in time
        ([(1.0, 100), (1.0, 100), (2.5, 100)], Playback(4.0)),  # early, then from the buffer
        ([(1.0, 100), (2.5, 100)], Playback(3.5, 0.5, 0.5)),
        ([(1.0, 100), (2.25, 100), (4.25, 25), (4.5, 25)], Playback(4.75, 1.25, 1.0)),  # no buffer grows in a gap
        ([(0.0, 0), (1.0, 100), (9.0, 0)], Playback(2.0)),  # a late end is no silence
        ([(1.0, 100), (2.0005, 100)], Playback(3.0005)),  # below the clock's grain
    ],
)
def test_playback(chunks: list[tuple[float, int]], heard: Playback | None) -> None:
    assert playback(chunks, sample_rate=100) == heard
    assert heard is None or heard.ran_dry == (heard.dry_seconds > 0)


def received(*reads: tuple[float, bytes], **fields: Any) -> Answer:
    made = Transfer(
        1.0, [(at, len(data)) for at, data in reads], bytearray(b"".join(data for _, data in reads)), **fields
    )
    made.ended = reads[-1][0] if reads else 1.0
    return answer(made)


def test_pcm_is_timed_to_its_first_sample_and_first_sound() -> None:
    got = received((1.5, b"\0"), (1.75, b"\0\0\0"), (2.0, b"\0\1" + sound(1.0)), (4.0, b""))
    assert (got.first_byte, got.first_audible, got.total, got.failure) == (0.75, 1.0, 3.0, None)
    assert got.audio_seconds == pytest.approx(1.0 + 3 / 24_000)
    assert got.rtf == pytest.approx(3.0, rel=1e-3)
    assert got.playback is not None
    assert got.playback.dry_seconds == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 48_000])
def test_wav_s_header_is_no_sound(size: int) -> None:
    data = wav(sound(1.0), size)
    got = received((1.25, data[:30]), (1.5, data[30:-24_000]), (2.0, data[-24_000:]))
    assert (got.failure, got.first_byte, got.first_audible, got.audio_seconds) == (None, 0.5, 0.5, 1.0)
    assert got.playback == Playback(2.5)


def test_wav_tells_its_rate_and_channels() -> None:
    assert received((2.0, wav(sound(1.0), rate=12_000, channels=2))).audio_seconds == 1.0
    assert received((2.0, sound(1.0)), sample_rate=48_000).audio_seconds == 0.5


@pytest.mark.parametrize(
    ("data", "failure"),
    [
        (b"", "empty"),
        (wav(b""), "empty"),
        (bytes(4800), "silent"),
        (wav(bytes(4800)), "silent"),
        (b"\1\2\3", "cut off"),
        (wav(b"\1\2\3"), "cut off"),
        (wav(sound(0.5), 48_000), "cut off"),
        (wav(sound(0.5))[:30], "unreadable wav"),
        (wav(sound(0.5), code=85), "unreadable wav"),
    ],
)
def test_what_is_no_whole_sound_has_failed(data: bytes, failure: str) -> None:
    assert received((2.0, data)).failure == failure


# --- requests


async def whole(request: web.Request) -> web.StreamResponse:
    """1 s of sound in 250 ms pieces, as fast as they go."""
    response = web.StreamResponse(headers={"Content-Type": "audio/pcm"})
    await response.prepare(request)
    for _ in range(4):
        await response.write(sound(0.25))
    return response


async def late(request: web.Request) -> web.StreamResponse:
    """A piece of 50 ms, and 100 ms after it another one."""
    response = web.StreamResponse(headers={"Content-Type": "audio/pcm"})
    await response.prepare(request)
    await response.write(sound(0.05))
    await asyncio.sleep(0.1)
    await response.write(sound(0.05))
    return response


async def cut(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "audio/pcm"})
    await response.prepare(request)
    await response.write(sound(0.25))
    assert request.transport is not None
    request.transport.close()
    return response


def at_rate(rate: str) -> Handler:
    """A second of sound that is said to have that rate."""

    async def speak(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=sound(1.0), content_type="audio/pcm", headers={"X-Sample-Rate": rate})

    return speak


async def dropped(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


def status(code: int) -> Handler:
    async def refuse(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=code)

    return refuse


async def serving(handler: Handler, work: Callable[[str], Awaitable[Any]]) -> Any:
    app = web.Application()
    app.router.add_post("/v1/audio/speech", handler)
    async with TestServer(app) as server:
        return await work(str(server.make_url("/")).rstrip("/"))


def bench(handler: Handler, *argv: str) -> dict[str, Any]:
    """The result of ``bench serve`` against ``handler``."""

    async def work(url: str) -> dict[str, Any]:
        arguments = serve.parser().parse_args(["--url", url, "--warmup", "0", "--ramp", "0", "--requests", "6", *argv])
        serve.check(arguments)
        return await serve.run(arguments)

    result: dict[str, Any] = asyncio.run(serving(handler, work))
    return result


@pytest.fixture(autouse=True)
def no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "BACK_OFF", 0.0)


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (status(429), "HTTP 429"),
        (status(500), "HTTP 500"),
        (status(200), "not audio but application/json"),
        (cut, "cut off"),
        (dropped, "connection lost"),
        *((at_rate(rate), "bad sample rate") for rate in ("24000.0", "24kHz", "0", "-24000", "", "9" * 400)),
    ],
)
def test_failures_are_counted_by_reason_and_are_never_fast(handler: Handler, reason: str) -> None:
    (level,) = bench(handler, "--concurrency", "3")["levels"]
    assert (level["ok"], level["failed"], level["reasons"]) == (0, 6, {reason: 6})
    assert level["first_audio_p50"] is level["rtf_p50"] is None
    assert level["audio_rate"] == 0


def test_some_fail_among_good_ones() -> None:
    turn = iter(range(100))

    async def sometimes(request: web.Request) -> web.StreamResponse:
        return await (cut if next(turn) % 3 == 0 else whole)(request)

    (level,) = bench(sometimes, "--concurrency", "2")["levels"]
    assert (level["ok"], level["failed"], level["reasons"]) == (4, 2, {"cut off": 2})
    assert level["audio_seconds"] == 1.0
    assert [each["failure"] for each in level["requests"]].count(None) == 4


def test_a_sample_rate_is_believed() -> None:
    (level,) = bench(at_rate("48000"), "--concurrency", "1")["levels"]
    assert (level["ok"], level["audio_seconds"]) == (6, 0.5)


def test_a_server_that_is_not_there() -> None:
    async def ask() -> Transfer:
        async with aiohttp.ClientSession() as session:
            return await transfer(session, "http://127.0.0.1:9/x", {})

    assert asyncio.run(ask()).failure == "no connection"
    with pytest.raises(EngineError, match="answered none of 2 requests to warm up: no connection"):
        serve.main(["--url", "http://127.0.0.1:9", "--warmup", "2"])


def test_underruns_are_found_and_only_there(capsys: pytest.CaptureFixture[str]) -> None:
    (good,) = bench(whole, "--concurrency", "2")["levels"]
    (bad,) = bench(late, "--concurrency", "2")["levels"]
    assert (good["ok"], good["underruns"], good["worst_gap"]) == (6, 0, 0)
    assert (bad["ok"], bad["underruns"]) == (6, 6)
    assert 40 < bad["worst_gap"] == bad["worst_dry"] < 1000
    assert 100 < 1000 * bad["requests"][0]["total"] < 1000
    assert len(capsys.readouterr().out.splitlines()) == 4


# --- arrivals


class Crowd:
    """Answers at once, and knows how many were there together."""

    def __init__(self) -> None:
        self.now = self.most = self.asked = 0
        self.sizes: list[int] = []

    async def ask(self) -> Transfer:
        self.asked += 1
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        return Transfer(0.0, failure="none")


def test_closed_has_so_many_clients_and_requests() -> None:
    crowd = Crowd()
    answers = asyncio.run(traffic.closed(crowd.ask, clients=3, requests=10, ramp=0))
    assert (len(answers), crowd.asked, crowd.most) == (10, 10, 3)


def test_a_burst_comes_at_once_and_again() -> None:
    assert (
        len(bench(whole, "--arrival", "burst", "--concurrency", "9", "--requests", "2")["levels"][0]["requests"]) == 9
    )
    crowd = Crowd()
    answers = asyncio.run(traffic.burst(crowd.ask, size=4, requests=10))
    assert (len(answers), crowd.asked, crowd.most) == (10, 10, 4)


def test_poisson_comes_at_its_rate_whatever_is_answered() -> None:
    moments = list(traffic._moments(10.0, 2000, seed=1))
    assert moments == list(traffic._moments(10.0, 2000, seed=1))
    assert moments[-1] == pytest.approx(200, rel=0.1)
    crowd = Crowd()
    assert len(asyncio.run(traffic.poisson(crowd.ask, rate=1000.0, requests=10, seed=0))) == 10


def test_a_listening_client_hears_to_the_end_before_it_asks_again() -> None:
    (hasty,) = bench(late, "--concurrency", "1", "--requests", "2")["levels"]
    (patient,) = bench(whole, "--concurrency", "1", "--requests", "2", "--realtime-clients")["levels"]
    assert patient["requests"][1]["sent"] >= 1.0
    assert hasty["requests"][1]["sent"] < 1.0


@pytest.mark.parametrize(
    ("true", "start", "resolution", "found"),
    [(37, 4, 1, 37), (37, 64, 1, 37), (0, 4, 1, 0), (100, 1, 1, 64), (64, 1, 1, 64), (37, 4, 8, 32), (1, 1, 1, 1)],
)
def test_the_largest_that_holds(true: int, start: int, resolution: int, found: int) -> None:
    tried: list[int] = []

    async def holds(clients: int) -> bool:
        tried.append(clients)
        return clients <= true

    most = asyncio.run(traffic.largest(holds, start=start, limit=64, resolution=resolution))
    assert most == found
    assert len(tried) == len(set(tried)) <= 13
    assert max(tried) <= 64


def test_find_max_against_a_server_with_places(capsys: pytest.CaptureFixture[str]) -> None:
    active = 0

    async def five(request: web.Request) -> web.StreamResponse:
        nonlocal active
        if active >= 5:
            return await status(429)(request)
        active += 1
        try:
            await asyncio.sleep(0.02)
            return await whole(request)
        finally:
            active -= 1

    result = bench(five, "--concurrency", "1", "--find-max", "--arrival", "burst", "--requests", "16")
    assert result["most_clients"] == 5
    assert "without underrun or failure: 5" in capsys.readouterr().out


# --- the command


def test_the_command_measures_our_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(FakeChatterbox(pieces=5)) as started:
        target, texts = tmp_path / "out.json", tmp_path / "texts"
        texts.write_text("One.\n\nTwo.\n", encoding="utf-8")
        argv = ["bench", "serve", "--url", started.url, "--concurrency", "1", "4", "--requests", "8", "--ramp", "0"]
        more = ["--json", str(target), "--text-file", str(texts), "--max-tokens", "50", "--extra-body", '{"seed": 3}']
        assert cli.main([*argv, *more, "--response-format", "wav", "--api-key", "s3cret"]) == 0
        asked = started.engine.requests
    assert Tally(request.text for request in asked) == {"One.": 10, "Two.": 10}  # four of them to warm up
    assert {(request.options.max_tokens, request.options.seed) for request in asked} == {(50, 3)}
    result = json.loads(target.read_text())
    assert "s3cret" not in target.read_text()
    assert [level["load"] for level in result["levels"]] == [1, 4]
    for level in result["levels"]:
        assert (level["ok"], level["failed"], len(level["requests"])) == (8, 0, 8)
        assert level["audio_seconds"] == pytest.approx(5 * PIECE / 24_000)
        assert level["server"]["refused"] == level["server"]["vocoder_wait_ms"] == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3
    assert shown[0].split()[:2] == ["load", "ok"]


def test_the_body_is_what_is_asked_for() -> None:
    bodies: list[Any] = []

    async def note(request: web.Request) -> web.StreamResponse:
        bodies.append((await request.json(), request.headers.get("Authorization")))
        return await whole(request)

    more = ["--extra-body", '{"stream": null, "x": 1}', "--voice", "v", "--model-name", "m", "--api-key", "k"]
    bench(note, "--concurrency", "1", "--requests", "1", *more)
    ((body, key),) = bodies
    assert body.pop("input")
    assert (body, key) == ({"model": "m", "voice": "v", "response_format": "pcm", "x": 1}, "Bearer k")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--arrival", "poisson"], "--rate"),
        (["--rate", "1"], "poisson"),
        (["--arrival", "burst", "--realtime-clients"], "closed"),
        (["--arrival", "poisson", "--rate", "1", "--find-max"], "--find-max"),
        (["--plot", "x.gif"], r"\.png, \.svg"),
    ],
)
def test_options_that_do_not_fit_are_refused(argv: list[str], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        serve.check(serve.parser().parse_args(argv))


@pytest.mark.parametrize(
    ("name", "argv", "told"),
    [
        ("serve", ["--json", "nowhere/x.json"], "argument --json: cannot write nowhere/x.json: no such folder; make"),
        ("serve", ["--plot", "nowhere/x.png"], "argument --plot: cannot write nowhere/x.png: no such folder; make"),
        ("serve", ["--json", "."], "argument --json: . is a folder; name a file"),
        ("t3", ["--json", "nowhere/x.json"], "argument --json: cannot write nowhere/x.json: no such folder; make"),
        ("vocoder", ["--json", "nowhere/x.json"], "argument --json: cannot write nowhere/x.json: no such folder; make"),
        ("t3", ["--rounds", "0"], "argument --rounds: must be at least 1"),
        ("t3", ["--requests", "4", "0"], "argument --requests: must be at least 1"),
        ("t3", ["--tokens", "0"], "argument --tokens: must be at least 1"),
        ("vocoder", ["--rounds", "0"], "argument --rounds: must be at least 1"),
        ("vocoder", ["--seconds", "0"], "argument --seconds: must be more than 0"),
        ("vocoder", ["--batch-sizes", "0"], "argument --batch-sizes: must be at least 1"),
        ("vocoder", ["--chunks", "-1"], "argument --chunks: must be at least 1"),
        ("vocoder", ["--steps", "0"], "argument --steps: must be at least 1"),
        ("vocoder", ["--max-frames", "0"], "argument --max-frames: must be at least 1"),
    ],
)
def test_what_could_not_end_well_is_refused_before_it_runs(
    name: str, argv: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        import_module(f"chatterbox_vllm.bench.{name}").parser().parse_args(argv)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("content", [b" \n", b"\xff\xfe", None])
def test_a_useless_text_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "texts").write_bytes(content)
    with pytest.raises(ConfigurationError, match="--text-file"):
        serve.main(["--text-file", str(tmp_path / "texts")])


def test_it_runs_without_torch_and_vllm() -> None:
    script = """
import sys
from chatterbox_vllm.bench import serve
serve.parser().format_help()
heavy = {"torch", "vllm", "transformers", "librosa", "matplotlib", "pynvml"} & set(sys.modules)
assert not heavy, heavy
"""
    reply = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert reply.returncode == 0, reply.stderr


@pytest.mark.parametrize("seconds", [1.0, 5.0, 10.0, 30.0])
def test_texts_are_about_as_long_as_asked(seconds: float) -> None:
    texts = [sentences.text(seed, seconds) for seed in range(50)]
    assert texts == [sentences.text(seed, seconds) for seed in range(50)]
    assert len(set(texts)) > 15
    if seconds > 4:
        assert all(abs(len(text) / sentences.CHARACTERS_A_SECOND - seconds) < 2.2 for text in texts)


# --- what is watched beside


def test_counters_are_differences_and_other_servers_have_none() -> None:
    before = observers.Counters.parsed(exposition(chunks=10, batches=5, wait=1.0, busy=2.0, refused=1))
    after = observers.Counters.parsed(exposition(chunks=30, batches=10, wait=1.5, busy=4.0, refused=4))
    after.taken = before.taken + 4.0
    assert after.since(before) == observers.ServerView(3, 25.0, 4.0, 0.5)
    assert observers.Counters.parsed("vllm_requests_total 3\n").since(before) is None
    assert observers.Counters.parsed("<html>").since(before) is None
    assert observers.Counters.parsed('a{b="c", ="d"} 1\n').values == {}
    assert after.since(observers.Counters()) is None


@pytest.mark.parametrize(
    ("body", "charset", "values"),
    [(b"a 3\n\xff\xfe", None, {}), (b"a 3\n", None, {"a": 3}), (b"a 3\n", "base64", {"a": 3})],
)
def test_metrics_that_are_no_text_are_none(body: bytes, charset: str | None, values: dict[str, float]) -> None:
    async def exposed(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type="text/plain", charset=charset)

    async def read() -> observers.Counters:
        app = web.Application()
        app.router.add_get("/metrics", exposed)
        async with TestServer(app) as server, aiohttp.ClientSession() as session:
            return await observers.Counters.read(session, str(server.make_url("")))

    assert asyncio.run(read()).values == values


def exposition(*, chunks: int, batches: int, wait: float, busy: float, refused: int) -> str:
    return f"""# TYPE chatterbox_requests counter
chatterbox_requests_total{{outcome="refused"}} {refused}
chatterbox_vocoder_chunks_total {chunks}
chatterbox_vocoder_batches_total {batches}
chatterbox_vocoder_queue_wait_seconds_total {wait}
chatterbox_vocoder_busy_seconds_total {busy}
"""


def test_gpu_utilisation_is_the_mean_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    values, drawn = iter([20, 40, 60]), threading.Event()

    def rates(card: str) -> SimpleNamespace:
        value = next(values, None)
        if value is None:  # the three before are noted
            drawn.set()
            return SimpleNamespace(gpu=40)
        return SimpleNamespace(gpu=value if card == "card 1" else 0)

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: f"card {index}",
        nvmlDeviceGetUtilizationRates=rates,
        NVMLError=OSError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    monkeypatch.setattr(observers, "_GPU_PERIOD", 0.001)
    gpu = observers.Gpu.beside("http://localhost:8000", 1)
    assert gpu is not None
    assert observers.Gpu.beside("http://elsewhere:8000", 0) is None
    with gpu.sampled() as busy:
        assert drawn.wait(5)
        assert busy() == pytest.approx(0.4)


def test_without_nvml_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu = observers.Gpu.beside("http://127.0.0.1:8000", 0)
    assert gpu is not None
    with gpu.sampled() as busy:
        assert busy() is None


def test_the_lag_is_what_the_loop_was_late() -> None:
    async def work() -> float:
        async with observers.Lag() as lag:
            await asyncio.sleep(0.02)
            time.sleep(0.1)  # noqa: ASYNC251 - what is measured
            await asyncio.sleep(0)
        return lag.worst

    assert 0.05 < asyncio.run(work()) < 1.0


def test_a_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency, match=r"pip install matplotlib"):
        serve.main(["--plot", str(tmp_path / "x.png")])


@pytest.mark.parametrize(
    ("loads", "shown"),
    [([1, 16, 64, 112, 128], "1 16 64 - 128"), ([110, 120, 128], "110 120 128"), ([4], "4"), ([0.5, 100], "0.5 100")],
)
def test_labels_do_not_cover_each_other(loads: list[float], shown: str) -> None:
    assert [label or "-" for label in report.tick_labels(loads)] == shown.split()


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    good = Answer(0.0, 1.0, None, 0.1, 0.2, 2.0, Playback(3.0))
    levels = [report.summary(n, [good] * n, gpu_busy=None, server=None, client_lag=0.0) for n in (1, 4)]
    for suffix in (".png", ".svg"):
        report.plot(tmp_path / f"plot{suffix}", levels, title="t", axis="clients")
        assert (tmp_path / f"plot{suffix}").stat().st_size > 1000


def test_a_level_s_figures() -> None:
    answers = [
        Answer(0.0, 1.0, None, 0.1, 0.1 * n, 2.0, Playback(9.0, 0.5 * (n == 3), 0.25 * (n == 3))) for n in (1, 2, 3)
    ]
    level = report.summary(3, [*answers, Answer(1.0, 4.0, "HTTP 429")], gpu_busy=0.5, server=None, client_lag=0.001)
    assert (level.ok, level.failed, level.reasons, level.holds) == (3, 1, {"HTTP 429": 1}, False)
    assert (level.underruns, level.worst_gap, level.worst_dry) == (1, 250.0, 500.0)
    assert (level.first_byte_p50, level.first_audio_p50, level.first_audio_p95) == pytest.approx((100.0, 200.0, 290.0))
    assert (level.seconds, level.audio_rate, level.audio_seconds, level.rtf_p50) == (4.0, 1.5, 2.0, 0.5)
    assert "1 x HTTP 429" in report.row(level)
    assert len(report.row(level).splitlines()[0]) == len(report.heading())


# --- the vocoder's


def test_device_time_is_the_union_of_intervals() -> None:
    from chatterbox_vllm.bench.vocoder import covered

    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2), (3, 4)]) == 5


def test_bench_vocoder_runs_on_a_cpu(tmp_path: Path, demo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.json"
    argv = ["--model", str(demo.folder), "--device", "cpu", "--rounds", "1", "--warmup", "0", "--steps", "2"]
    sizes = ["--seconds", "2", "--reference-seconds", "1", "--batch-sizes", "1", "2", "--chunks", "2"]
    assert cli.main(["bench", "vocoder", *argv, *sizes, "--json", str(target)]) == 0
    rows = json.loads(target.read_text())["results"]
    assert [(row["work"], row["batch"]) for row in rows] == [("whole", 1), ("whole", 2), ("chunk", 2)]
    assert [row["audio_seconds"] for row in rows] == pytest.approx([2.0, 4.0, 2 * 7 / 25])
    assert all(row["host_share"] is row["peak_gib"] is None and row["ms"] > 0 for row in rows)
    assert capsys.readouterr().out.count("-") == 6
