"""The wheel is imported without torchaudio, without its __init__, and without a trace of a fake."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from chatterbox_vllm import upstream
from chatterbox_vllm.errors import ConfigurationError, MissingDependency
from chatterbox_vllm.upstream import standin

GOLDEN = Path(__file__).parent / "data" / "torchaudio.npz"
"""What torchaudio 2.11 makes of ``signal()``, written by running its Python source."""


def signal() -> torch.Tensor:
    """(1, 4801) float32 whose every digit is the same on every machine."""
    n = torch.arange(4801, dtype=torch.float64)
    return ((n * n * 0.00037).sin() * 0.4 + (n * 0.9).cos() * 0.1).float()[None]


@pytest.mark.parametrize("name", ["s3gen", "t3", "voice_encoder", "s3tokenizer", "s3gen.xvector"])
def test_modules_load(name: str) -> None:
    assert upstream.load(name).__name__ == f"chatterbox.models.{name}"


def test_nothing_is_faked_for_others() -> None:
    upstream.load("s3gen")
    upstream.import_module("perth.perth_net.perth_net_implicit.perth_watermarker")
    if importlib.util.find_spec("torchaudio") is None:
        assert not [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]
    assert not hasattr(sys.modules["chatterbox"], "ChatterboxTTS"), "chatterbox/__init__.py ran"


def test_importing_it_is_cheap() -> None:
    code = "import sys, chatterbox_vllm.upstream; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_numba_keeps_what_it_compiles_in_our_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    code = "import os, chatterbox_vllm.upstream; print(os.environ['NUMBA_CACHE_DIR'])"
    reply = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert reply.stdout.strip() == str(tmp_path / "numba")


def test_numba_without_a_folder_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError(f"cannot cache function {name!r}: no locator available for file 'utils.py'")

    monkeypatch.setattr(upstream.importlib, "import_module", fail)
    with pytest.raises(ConfigurationError, match="set CHATTERBOX_CACHE_DIR"):
        upstream.load("s3gen")


def test_a_package_whose_module_has_another_name() -> None:
    error = upstream._missing("chatterbox.models.s3gen", "yaml.nodes")
    assert error.command == f"{upstream.PIP} install PyYAML"


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "perth"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingDependency, match="pip install resemble-perth"):
        upstream.import_module("perth.perth_net")
    with pytest.raises(MissingDependency, match=r"--no-deps chatterbox-tts==0\.1\.7"):
        upstream.load("no_such_module")


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    upstream._torchaudio.cache_clear()
    yield
    upstream._torchaudio.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
def test_the_real_torchaudio_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    real, transforms = ModuleType("torchaudio"), ModuleType("torchaudio.transforms")
    real.transforms = transforms  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchaudio", real)
    monkeypatch.setitem(sys.modules, "torchaudio.transforms", transforms)
    assert upstream._import("torchaudio") is real
    assert upstream._import("torchaudio.transforms", fromlist=("Resample",)) is transforms


@pytest.mark.usefixtures("fresh_choice")
def test_a_broken_torchaudio_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchaudio.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    assert upstream._import("torchaudio") is standin.torchaudio
    assert upstream._import("torchaudio.compliance.kaldi", fromlist=("fbank",)).fbank is standin.fbank


@pytest.mark.parametrize(("orig", "new"), [(24000, 16000), (16000, 24000), (44100, 16000)])
def test_resample_is_torchaudios(orig: int, new: int) -> None:
    golden = np.load(GOLDEN)[f"resample_{orig}_{new}"]
    np.testing.assert_allclose(standin.Resample(orig, new)(signal()).numpy(), golden, atol=1e-6)


def test_resample_keeps_the_batch_and_the_same_rate() -> None:
    waves = torch.stack([signal(), -signal()])
    assert standin.Resample(16000, 16000)(waves) is waves
    halved = standin.Resample(16000, 8000)(waves)
    assert halved.shape == (2, 1, 2401)
    torch.testing.assert_close(halved[0], -halved[1])


def test_fbank_is_torchaudios() -> None:
    golden = np.load(GOLDEN)["fbank_80"]
    np.testing.assert_allclose(standin.fbank(signal(), num_mel_bins=80).numpy(), golden, atol=5e-4)


def test_spectrogram_and_its_inverse_agree() -> None:
    sizes = {"n_fft": 2048, "win_length": 2048, "hop_length": 320, "window_fn": torch.hann_window}
    spectrum = standin.Spectrogram(**sizes, power=None, normalized=False)(signal()[0])
    assert spectrum.shape == (1025, 16)
    back = standin.InverseSpectrogram(**sizes, normalized=False)(spectrum)
    torch.testing.assert_close(back, signal()[0, : len(back)], atol=1e-5, rtol=0)
