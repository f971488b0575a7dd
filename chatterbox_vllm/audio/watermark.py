"""Perth, the inaudible watermark upstream puts on all it speaks.

Mirrors ``perth.PerthImplicitWatermarker.apply_watermark`` as upstream calls it. A stream cannot be marked chunk by
chunk with that alone: each chunk's mark begins and ends for itself, and the jump between two is a click. Hence
``WatermarkStream``, which marks each chunk together with what came before it and fades from one mark to the next.
"""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from chatterbox_vllm import upstream
from chatterbox_vllm.types import SAMPLE_RATE

Samples = NDArray[np.float32]

_MODULE: Final = "perth.perth_net.perth_net_implicit"
_HOP: Final = 240
"""Samples of one of Perth's frames; it loses what is left over a multiple of it."""
_LEAST: Final = SAMPLE_RATE // 10
_LOADING: Final = threading.Lock()


class Watermarker:
    """Marks speech. The network, 37 MB, is loaded at the first call, once a process.

    Raises:
        MissingDependency: resemble-perth, or a package it needs, is not installed. Checked at once.
    """

    def __init__(self) -> None:
        upstream.import_module(f"{_MODULE}.perth_watermarker")

    def __call__(self, samples: Samples) -> Samples:
        """Marks (n,) float32 samples at 24 kHz; n may be 0. Thread-safe; 15 ms for 1 s on one core."""
        count = len(samples)
        if count == 0:
            return samples
        padded = np.pad(samples.astype(np.float32, copy=False), (0, _padding(count)))
        perth = _perth()
        with torch.inference_mode():
            marked: Samples = perth.apply_watermark(padded, sample_rate=SAMPLE_RATE)
        return np.asarray(marked[:count], np.float32)

    def confidence(self, samples: Samples) -> float:
        """How sure Perth is that these (n,) float32 samples at 24 kHz are marked, from 0 to 1."""
        padded = np.pad(samples.astype(np.float32, copy=False), (0, _padding(len(samples))))
        perth = _perth()
        with torch.inference_mode():
            return float(perth.get_watermark(padded, sample_rate=SAMPLE_RATE, round=False).item())

    def warm_up(self) -> None:
        """Loads the network and has its first, slow call behind it (about 10 s on one core)."""
        self(np.full(SAMPLE_RATE // 2, 0.1, np.float32))


class WatermarkStream:
    """Marks one utterance as it comes, without a click where two chunks meet.

    Each chunk is marked together with the half second before it, and its last 40 ms are held back, so that the
    mark can fade from how it was computed without the future to how it is with it.
    """

    _CONTEXT: Final = SAMPLE_RATE // 2
    _HELD: Final = SAMPLE_RATE // 25

    def __init__(self, watermarker: Watermarker) -> None:
        self._watermarker = watermarker
        self._sound: Samples = np.zeros(0, np.float32)
        """The context and, after it, what is held back."""
        self._held_mark: Samples = np.zeros(0, np.float32)

    @property
    def behind(self) -> float:
        """Seconds of sound that are held back."""
        return self._HELD / SAMPLE_RATE

    def feed(self, samples: Samples) -> Samples:
        """The marked samples that are final after these (n,) float32 ones."""
        return self._advance(samples, hold=self._HELD)

    def finish(self) -> Samples:
        """The last samples."""
        return self._advance(np.zeros(0, np.float32), hold=0)

    def _advance(self, samples: Samples, hold: int) -> Samples:
        start = len(self._sound) - len(self._held_mark)
        sound = np.concatenate([self._sound, samples.astype(np.float32, copy=False)])
        end = max(start, len(sound) - hold)
        if end == start and len(sound) == len(self._sound):
            return np.zeros(0, np.float32)
        mark = self._watermarker(sound) - sound
        fade = np.linspace(0.0, 1.0, len(self._held_mark), dtype=np.float32)
        held = slice(start, start + len(self._held_mark))
        mark[held] = self._held_mark + fade * (mark[held] - self._held_mark)
        keep = max(0, end - self._CONTEXT)
        self._sound, self._held_mark = sound[keep:], mark[end:]
        return sound[start:end] + mark[start:end]


def _padding(count: int) -> int:
    """Zeros to append: Perth's spectrogram needs a tenth of a second, and whole frames."""
    return max(_LEAST, -(-count // _HOP) * _HOP) - count


def _perth() -> Any:
    with _LOADING:
        return _load()


@cache
def _load() -> Any:
    """Perth's network and its hyper-parameters from the wheel, as its own loader does less the messages it prints."""
    root = Path(str(upstream.import_module(_MODULE).__file__)).parent.parent / "pretrained"
    manager = upstream.import_module(f"{_MODULE}.checkpoint_manager").CheckpointManager(root, "implicit")
    network = upstream.import_module(f"{_MODULE}.model.perth_net").PerthNet(manager.hp)
    newest = max((root / "implicit").glob("*.pth.tar"), key=lambda file: int(file.name.split(".")[0].split("_")[-1]))
    network.load_state_dict(torch.load(newest, map_location="cpu", weights_only=True)["model"])
    watermarker = upstream.import_module(f"{_MODULE}.perth_watermarker").PerthImplicitWatermarker
    return watermarker(run_name=None, perth_net=network.eval())
