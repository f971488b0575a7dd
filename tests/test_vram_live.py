"""``chatterbox-vllm memory``: the table that needs no GPU, and the memory test against a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatterbox_vllm.bench import memory
from chatterbox_vllm.bench.memory import main
from chatterbox_vllm.checkpoint import Checkpoint
from chatterbox_vllm.errors import ConfigurationError, EngineError
from chatterbox_vllm.quantization.estimate import QuantizationMemoryEstimator
from chatterbox_vllm.quantization.policy import Policy
from tests.fake_engine import FakeChatterbox, Running, running


class Weighed(FakeChatterbox):
    """Says of its memory what it is told to."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(pieces=1)
        parts = QuantizationMemoryEstimator(checkpoint).estimate(Policy(t3="int8"))
        own = ("t3", "t3_embeddings", "flow_encoder", "estimator", "hift")
        self.components = {name: parts[name].after for name in own}
        self.components["other"] = parts["vocoder_other"].after
        self.budget: int | None = 2**31
        self.peak = self.reserved = 2**30

    async def memory(self) -> dict[str, Any]:
        sizes = {"weights": self.peak, "allocated": self.peak, "peak": self.peak, "reserved": self.reserved}
        return {
            "processes": [{"name": "t3 and vocoder", **sizes}],
            "components": self.components,
            "budget": self.budget,
            "items": {},
        }


@pytest.fixture(scope="module")
def server(demo: Checkpoint) -> Iterator[Running]:
    with running(Weighed(demo)) as started:
        yield started


@pytest.fixture
def engine(server: Running, demo: Checkpoint) -> Weighed:
    assert isinstance(server.engine, Weighed)
    Weighed.__init__(server.engine, demo)
    return server.engine


def test_a_server_that_keeps_to_its_budget(server: Running, engine: Weighed, demo: Checkpoint) -> None:
    assert main(["--url", server.url, "--model", str(demo.folder), "--requests", "3"]) == 0
    assert engine.finished == 3


def test_a_server_over_its_budget(server: Running, engine: Weighed, capsys: pytest.CaptureFixture[str]) -> None:
    engine.reserved = 2**31 + 1
    assert main(["--url", server.url, "--requests", "1"]) == 1
    assert f"the budget is {2**31:,}" in capsys.readouterr().out
    engine.budget = None
    assert main(["--url", server.url, "--requests", "1"]) == 0


def test_weights_that_are_not_as_computed(
    server: Running, engine: Weighed, demo: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.components["hift"] = int(engine.components["hift"] * 1.04)
    assert main(["--url", server.url, "--model", str(demo.folder), "--requests", "1", "--json"]) == 0
    engine.components["hift"] = int(engine.components["hift"] * 1.04)
    capsys.readouterr()
    assert main(["--url", server.url, "--model", str(demo.folder), "--requests", "1", "--json"]) == 1
    (failure,) = json.loads(capsys.readouterr().out)["failures"]
    assert failure.startswith("hift: ")


def test_a_server_that_does_not_answer(server: Running, engine: Weighed) -> None:
    engine.dead = True
    with pytest.raises(EngineError, match="503"):
        main(["--url", server.url, "--requests", "1"])
    engine.dead = False
    with pytest.raises(EngineError, match="cannot be asked"):
        main(["--url", "http://127.0.0.1:9", "--requests", "1"])


def test_the_table_without_a_budget(demo: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(demo.folder), "--quantization", "fp8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["weights,", "none", "conservative", "mixed", "aggressive", "fp8"]


def test_the_table_of_a_budget(demo: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", str(demo.folder), "--vram-budget", "2GiB", "--max-model-len", "640"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "T3's cache" in out
    assert "budget" in out
    assert main([*command, "--max-batch-size", "1", "--quantization-strategy", "aggressive", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["plan"]["policy"]["estimator"] == "bnb-4bit"
    assert report["plan"]["bytes"] == sum(report["plan"]["items"].values())
    assert report["fits"]["none"]["max_batch_size"] == 1


def test_a_budget_that_holds_nothing(demo: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    """For a reader of JSON that is an answer, too; for a person an error."""
    command = ["--model", str(demo.folder), "--vram-budget", "1MiB", "--quantization", "none"]
    assert main([*command, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["plan"] == {"fits": False, "reason": report["failures"][0]}
    assert "MiB" in report["plan"]["reason"]
    with pytest.raises(ConfigurationError, match="vram_budget"):
        main(command)


def test_a_smaller_card_has_smaller_contexts(demo: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    def needed(multiprocessors: int) -> int:
        command = ["--model", str(demo.folder), "--vram-budget", "64GiB", "--max-batch-size", "1", "--json"]
        assert main([*command, "--multiprocessors", str(multiprocessors)]) == 0
        return int(json.loads(capsys.readouterr().out)["plan"]["bytes"])

    assert needed(28) < needed(132)


def test_a_card_that_is_no_hopper_has_fewer_graphs(demo: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    def mode(*more: str) -> str:
        command = ["--model", str(demo.folder), "--vram-budget", "64GiB", "--max-batch-size", "1", "--json", *more]
        assert main(command) == 0
        return str(json.loads(capsys.readouterr().out)["plan"]["t3_arguments"]["compilation_config"])

    assert "DECODE_ONLY" in mode("--no-step-graphs")
    assert "DECODE_ONLY" not in mode()


def test_another_server_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(*_: object) -> bytes:
        return b'{"ok": true}'

    monkeypatch.setattr(memory, "_answer", answer)
    with pytest.raises(EngineError, match="http://there does not answer as this server does: 'processes' is missing"):
        main(["--url", "http://there", "--requests", "1"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--url", "http://there", "--vram-budget", "2GiB"], "^--vram-budget does not go with --url; leave it out"),
        (["--url", "http://there", "--no-step-graphs"], "^--no-step-graphs does not go with --url"),
        (["--model", "demo", "--requests", "3"], "^--requests needs --url"),
        (["--url", "there"], "^--url=there is no address; write http://"),
        (["--url", ""], "^--url= is no address"),
    ],
)
def test_an_option_without_an_effect_is_refused(options: list[str], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        main(options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--seconds", "-1"], "--seconds: must be more than 0"),
        (["--timeout", "soon"], "--timeout: 'soon' is not a number"),
        (["--max-model-len", "abc"], "--max-model-len: 'abc' is not a whole number"),
        (["--max-batch-size", "0"], "--max-batch-size: must be at least 1"),
    ],
)
def test_a_number_that_is_none(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(options)
    assert told in capsys.readouterr().err


def test_an_address_may_have_the_path_of_openai_s(server: Running) -> None:
    assert main(["--url", f"{server.url}/v1", "--requests", "1"]) == 0


def test_what_does_not_fit_is_refused(demo: Checkpoint) -> None:
    with pytest.raises(ConfigurationError, match="what would fit"):
        main(["--model", str(demo.folder), "--vram-budget", "512MiB"])
    with pytest.raises(ConfigurationError, match="give one"):
        main(["--model", str(demo.folder), "--quantization", "awq", "--quantization-strategy", "mixed"])


def test_nothing_is_loaded(demo: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files whose weights are cut off are as good: only headers are read."""
    for path in demo.folder.iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            length = 8 + int.from_bytes(content[:8], "little")
            with (tmp_path / path.name).open("wb") as file:
                file.write(content[:length])
                file.truncate(len(content))
        else:
            (tmp_path / path.name).write_bytes(content)
    assert main(["--model", str(tmp_path)]) == 0
    hollow = capsys.readouterr().out
    assert main(["--model", str(demo.folder)]) == 0
    assert capsys.readouterr().out == hollow
