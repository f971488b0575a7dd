"""HiFT on a CUDA card: channels last, cuDNN's convolutions in TF32, ``hift_kernels`` for all that is between them.

Computes what ``hift.Hift`` computes. What decides about phases stays float32 and float64: the pitch, the cycles and the
two Fourier transforms. The other convolutions round their inputs to TF32, as they do upstream, where that is cuDNN's
default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor, nn
from torch.nn import functional as F

from chatterbox_vllm.types import SAMPLE_RATE
from chatterbox_vllm.vocoder import hift as reference
from chatterbox_vllm.vocoder.batching import starts, within
from chatterbox_vllm.vocoder.cuda import hift_kernels
from chatterbox_vllm.vocoder.cuda.captured import Captured
from chatterbox_vllm.vocoder.hift import BINS, FFT, GAP, HOP, LOUDEST, SPECTRA, UPSAMPLING, Hift, Stretch
from chatterbox_vllm.vocoder.source import FRAME_SAMPLES, cycles_per_sample
from chatterbox_vllm.vocoder.transfer import to_device

_PADDED_BINS: Final = 20
"""Real and imaginary parts, 18 together, and two zeros: tensor cores want multiples of four channels."""
_SAMPLES: Final = 256
"""Of one program of ``hift_kernels.excite``."""
_SPECTRA_ROWS: Final = 64
"""Of one program of ``hift_kernels.analyse``."""
_ELEMENTS: Final = 4096
"""Of one program of ``hift_kernels.activate``."""
_MOST_CYCLES: Final = 1e6
"""Of a wave in a frame: far more than a wave of sound, and few enough to be summed up exactly."""
_LARGEST_CAPTURED: Final = 768
"""Frames. A graph keeps memory of its own, and the time that larger ones take hides the launches."""


@dataclass(frozen=True, eq=False)
class _Convolution:
    """``weight`` (outputs, inputs, 1, taps) with channels last; ``bias`` (outputs,), added later."""

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int
    dilation: int
    transposed: bool

    def __call__(self, x: Tensor) -> Tensor:
        """(B, inputs, 1, L), channels last, to (B, outputs, 1, L'), without bias."""
        if self.transposed:
            y = F.conv_transpose2d(x, self.weight, None, (1, self.stride), (0, self.padding))
        else:
            y = F.conv2d(x, self.weight, None, (1, self.stride), (0, self.padding), (1, self.dilation))
        return y.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, eq=False)
class _Layer:
    """Snake, convolution, snake, convolution, and what came in on top."""

    first_alpha: Tensor
    first: _Convolution
    second_alpha: Tensor
    second: _Convolution


@dataclass(frozen=True, eq=False)
class _Stage:
    up: _Convolution
    down: _Convolution
    source_block: list[_Layer]
    blocks: list[list[_Layer]]
    nothing: Tensor


@dataclass(frozen=True, eq=False)
class _Packed:
    """Where utterances are among L frames, and what is known of them.

    Args:
        utterance, place, length: (L,) int32, see ``hift_kernels``; ``utterance`` is a row of what follows.
        anchor: (R,) int64, the frame at which an utterance's cycles are known.
        cycles, offsets, keys, first: (R, ...) as ``Stretch`` has them.
    """

    utterance: Tensor
    place: Tensor
    length: Tensor
    anchor: Tensor
    cycles: Tensor
    offsets: Tensor
    keys: Tensor
    first: Tensor

    def clear(self, x: Tensor, rate: int = 1, extra: int = 0) -> Tensor:
        """``Edges.clear``: (1, C, L) of which what is between utterances becomes zero."""
        assert (rate, extra) == (1, 0)
        return torch.where(self.place < self.length, x, 0.0)  # a product would leave what is not a number

    def spectra(self) -> Tensor:
        """(120 L, 1) float32: 1 where an utterance has a spectrum, of which it has one more than hops."""
        hop = torch.arange(SPECTRA, device=self.place.device)
        within = (self.place < self.length)[:, None] | ((self.place == self.length)[:, None] & (hop == 0))
        return within.flatten()[:, None].float()


@dataclass(frozen=True)
class _Rate:
    """Activations with ``rows`` rows a frame and, if ``extra``, one more in each utterance."""

    packed: _Packed
    rows: int
    extra: bool

    def activate(
        self,
        x: Tensor,
        bias: Tensor,
        *,
        add: Tensor | None = None,
        alpha: Tensor | None = None,
        keep: bool = False,
        mirror: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See ``hift_kernels.activate``: the sum (if kept) and its snake (if there is an alpha)."""
        _, channels, _, count = x.shape
        rows = max(1, _ELEMENTS // channels)
        total = torch.empty_like(x) if keep else x
        active = torch.empty_like(x) if alpha is not None else x
        hift_kernels.activate[(triton.cdiv(count, rows),)](
            x,
            bias,
            x if add is None else add,
            bias if alpha is None else alpha,
            total,
            active,
            self.packed.place,
            self.packed.length,
            count,
            CHANNELS=channels,
            RATE=self.rows,
            EXTRA=self.extra,
            MIRROR=mirror,
            ADD=add is not None,
            KEEP=keep,
            SNAKE=alpha is not None,
            ROWS=rows,
        )
        return total, active

    def residual(self, layers: list[_Layer], x: Tensor, active: Tensor) -> Tensor:
        """``ResBlock.forward``; ``active`` is the snake of ``x`` that comes first."""
        following = [layer.first_alpha for layer in layers[1:]]
        for layer, alpha in zip(layers, [*following, None], strict=True):
            _, active = self.activate(layer.first(active), layer.first.bias, alpha=layer.second_alpha)
            x, active = self.activate(layer.second(active), layer.second.bias, add=x, alpha=alpha, keep=True)
        return x


class FusedHift:
    """``Hift`` for CUDA cards.

    Args:
        hift: its pitch predictor and source move to the card and are used; its other weights are copied.
        device: the card.
        pool: memory of graphs, see ``Captured``.
    """

    def __init__(self, hift: Hift, *, device: torch.device, pool: tuple[int, int] | None) -> None:
        self._predictor, self._merge = hift.f0_predictor.to(device), hift.m_source.to(device)
        self._device = device
        self._pool = pool
        self._graphs: dict[int, Captured[tuple[Tensor, Tensor]]] = {}
        self._pre = _convolution(hift.conv_pre, device)
        self._post = _convolution(hift.conv_post, device, outputs=_PADDED_BINS)
        kernels = len(hift.resblocks) // len(UPSAMPLING)
        self._stages = [
            _Stage(
                up=_convolution(hift.ups[stage], device),
                down=_convolution(hift.source_downs[stage], device, inputs=_PADDED_BINS),
                source_block=_layers(hift.source_resblocks[stage], device),
                blocks=[_layers(block, device) for block in hift.resblocks[stage * kernels : (stage + 1) * kernels]],
                nothing=torch.zeros_like(hift.ups[stage].bias, device=device),
            )
            for stage in range(len(UPSAMPLING))
        ]
        window = reference.window(device)
        self._analysis = F.pad(reference.analysis(device)[:, 0].T.float(), (0, _PADDED_BINS - 2 * BINS)).contiguous()
        self._synthesis = reference.synthesis(device)[:, 0].float().contiguous()
        self._weight = window.square().float()

    @property
    def weights(self) -> list[Any]:
        """Where its weights on the card are."""
        return [self._predictor, self._merge, self._pre, self._post, self._stages]

    @staticmethod
    def fits(hift: Hift) -> bool:
        """Whether the kernels can compute networks of this size: channels must be a power of two."""
        width = hift.conv_pre.out_channels
        return width >= 16 << len(UPSAMPLING) and width & (width - 1) == 0

    def __call__(self, stretch: Stretch) -> tuple[list[Tensor], list[Tensor]]:
        """As ``Hift.forward``, a row at a time: (480 frames,) samples and (waves, frames + 1) cycles.

        They may lie in memory that the next call overwrites. Frames are padded to one of few sizes, since cuDNN plans
        anew for each.
        """
        frames = np.asarray(stretch.frames)
        size, begins = _size_for(int((frames + GAP).sum())), starts(frames + GAP)
        ends = begins + frames
        padded = np.arange(len(frames)) * stretch.mel.shape[1]
        order = np.stack([np.repeat(padded, frames), np.repeat(begins, frames)]) + within(frames)
        source, target = to_device(torch.from_numpy(order), self._device)
        mel = torch.zeros(size, stretch.mel.shape[2], device=self._device)
        mel.index_copy_(0, target, stretch.mel.flatten(0, 1)[source])
        inputs = (
            mel,
            to_device(_tables(size, frames), self._device),
            stretch.anchor + to_device(torch.from_numpy(begins), self._device),
            stretch.cycles,
            stretch.offsets,
            stretch.keys,
            stretch.first,
        )
        samples, cycles = self._run(size, inputs)
        return (
            [samples[FRAME_SAMPLES * begin : FRAME_SAMPLES * end] for begin, end in zip(begins, ends, strict=True)],
            [cycles[:, begin : end + 1] for begin, end in zip(begins, ends, strict=True)],
        )

    def warm_up(self, frames: int) -> None:
        """Captures graphs, and has cuDNN plan, for up to ``frames`` frames."""
        sizes = [_size_for(1)]
        while sizes[-1] < frames:
            sizes.append(_size_for(sizes[-1] + 1))
        for size in reversed(sizes):  # what the largest one needs is enough for all
            self._run(size, self._examples(size))

    def _run(self, size: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """``_compute``, from a graph where launching would take longer than computing."""
        if size > _LARGEST_CAPTURED:
            return self._compute(*inputs)
        if size not in self._graphs:
            self._graphs[size] = Captured(self._compute, self._examples(size), self._pool)
        return self._graphs[size](*inputs)

    def _examples(self, size: int) -> tuple[Tensor, ...]:
        """Inputs of ``_compute`` for ``size`` frames that hold no utterance."""
        rows, waves = size // (1 + GAP) + 1, self._merge.waves

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self._device)

        return (
            zeros(size, self._pre.weight.shape[1]),
            _tables(size, np.zeros(0, dtype=np.int64)).to(self._device),
            zeros(rows, dtype=torch.int64),
            zeros(rows, waves, dtype=torch.float64),
            zeros(rows, waves),
            zeros(rows, dtype=torch.int64),
            zeros(rows, dtype=torch.int64),
        )

    def _compute(self, mel: Tensor, tables: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        """``Hift.forward`` for packed utterances: (480 L,) samples and (waves, L) cycles."""
        packed = _Packed(*tables, *rows)
        mel = mel.T[None]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pitch = packed.clear(self._predictor(mel, packed))
        cycles = self._cycles(pitch, packed)
        source = self._source(pitch, cycles, packed)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            return self._decode(mel, source, packed), cycles

    def _cycles(self, pitch: Tensor, packed: _Packed) -> Tensor:
        """``cycles_at_frames`` for packed utterances: (waves, L) float64."""
        turned = cycles_per_sample(pitch, self._merge.waves)[0].double() * FRAME_SAMPLES
        # What is wrong with one utterance must not be summed up into the next ones.
        turned = torch.where(turned.abs() < _MOST_CYCLES, turned, 0.0)
        gone = turned.cumsum(-1) - turned
        known = packed.cycles.T - gone[:, packed.anchor]
        return gone + known[:, packed.utterance]

    def _source(self, pitch: Tensor, cycles: Tensor, packed: _Packed) -> Tensor:
        """(480 L,), ``Source.forward``."""
        frames, linear = len(packed.place), self._merge.l_linear
        out = torch.empty(frames * FRAME_SAMPLES, device=pitch.device)
        hift_kernels.excite[(triton.cdiv(FRAME_SAMPLES, _SAMPLES), frames)](
            pitch,
            cycles,
            packed.offsets,
            linear.weight,
            linear.bias,
            packed.keys,
            packed.first,
            packed.utterance,
            packed.place,
            packed.length,
            out,
            frames,
            WAVES=linear.in_features,
            LANES=(linear.in_features + 1) // 2,
            SAMPLES=FRAME_SAMPLES,
            RATE=float(SAMPLE_RATE),
            BLOCK=_SAMPLES,
        )
        return out

    def _decode(self, mel: Tensor, source: Tensor, packed: _Packed) -> Tensor:
        spectra = self._spectra(source, packed)
        x, _ = _Rate(packed, 1, extra=False).activate(self._pre(_last(mel[:, :, None])), self._pre.bias, keep=True)
        rows = 1
        for stage, factor in zip(self._stages, UPSAMPLING, strict=True):
            rows *= factor
            rate = _Rate(packed, rows, extra=rows == SPECTRA)
            start = stage.source_block[0].first_alpha
            sound, active = rate.activate(stage.down(spectra), stage.down.bias, alpha=start, keep=True)
            sound = rate.residual(stage.source_block, sound, active)
            first, *others = stage.blocks
            x = stage.up(F.leaky_relu(x, 0.1))
            x, active = rate.activate(
                x, stage.up.bias, add=sound, alpha=first[0].first_alpha, keep=True, mirror=rate.extra
            )
            total = rate.residual(first, x, active)
            for block in others:
                _, active = rate.activate(x, stage.nothing, alpha=block[0].first_alpha)
                total += rate.residual(block, x, active)
            x = total / len(stage.blocks)
        return self._samples(self._post(F.leaky_relu(x)), packed)

    def _spectra(self, source: Tensor, packed: _Packed) -> Tensor:
        """(480 L,) to (1, 20, 1, 120 L), channels last: ``hift.spectra``."""
        count = len(packed.place) * SPECTRA
        out = torch.empty(count, _PADDED_BINS, device=source.device)
        hift_kernels.analyse[(triton.cdiv(count, _SPECTRA_ROWS),)](
            source,
            self._analysis,
            out,
            packed.place,
            packed.length,
            count,
            SAMPLES=FRAME_SAMPLES,
            RATE=SPECTRA,
            FFT=FFT,
            HOP=HOP,
            COLUMNS=_PADDED_BINS,
            PADDED=triton.next_power_of_2(_PADDED_BINS),
            ROWS=_SPECTRA_ROWS,
        )
        return out.T[None, :, None]

    def _samples(self, x: Tensor, packed: _Packed) -> Tensor:
        """(1, 20, 1, 120 L) log-magnitudes and phases to (480 L,): ``hift.samples``."""
        x = (x + self._post.bias[:, None, None])[0, :, 0].T
        magnitude = x[:, :BINS].exp().clamp(max=1e2)
        angle = torch.sin(x[:, BINS : 2 * BINS])
        spectra = torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1)
        within = packed.spectra()
        # Where there is no spectrum, the network's output is anything, infinity included.
        wave = _overlapped(torch.where(within > 0, spectra, 0.0) @ self._synthesis)
        wave = wave / _overlapped(within * self._weight).clamp(min=1e-8)
        return wave[FFT // 2 : FFT // 2 + FRAME_SAMPLES * len(packed.place)].clamp(-LOUDEST, LOUDEST)


def _overlapped(frames: Tensor) -> Tensor:
    """(N, 16) windows, one every 4 samples, to their sum (4 N + 12,)."""
    parts = frames.unflatten(-1, (-1, HOP)).unbind(1)
    last = len(parts) - 1
    return torch.stack([F.pad(part, (0, 0, shift, last - shift)) for shift, part in enumerate(parts)]).sum(0).flatten()


def _size_for(frames: int) -> int:
    """The smallest of 48, 64, 96, 128, 192, ... that is enough."""
    power = max(64, 1 << (frames - 1).bit_length())
    smaller = power * 3 // 4
    return smaller if frames <= smaller else power


def _tables(size: int, frames: npt.NDArray[np.int64]) -> Tensor:
    """(3, size) int32 ``utterance``, ``place`` and ``length`` of ``_Packed``, for utterances of so many frames."""
    room = frames + GAP
    tables = np.zeros((3, size), dtype=np.int32)
    tables[1] = 1  # behind the end, which is 0
    tables[:, : room.sum()] = np.repeat(np.arange(len(frames)), room), within(room), np.repeat(frames, room)
    return torch.from_numpy(tables)


def _layers(block: nn.Module, device: torch.device) -> list[_Layer]:
    parts = zip(block.activations1, block.convs1, block.activations2, block.convs2, strict=True)
    return [
        _Layer(
            first.alpha.to(device), _convolution(conv1, device), second.alpha.to(device), _convolution(conv2, device)
        )
        for first, conv1, second, conv2 in parts
    ]


def _convolution(conv: nn.Module, device: torch.device, *, inputs: int = 0, outputs: int = 0) -> _Convolution:
    """With zero weights for channels up to ``inputs`` and ``outputs``."""
    weight, bias = conv.weight, conv.bias
    transposed = isinstance(conv, nn.ConvTranspose1d)
    weight = F.pad(weight, (0, 0, 0, max(0, inputs - weight.shape[1]), 0, max(0, outputs - weight.shape[0])))
    bias = F.pad(bias, (0, max(0, outputs - len(bias))))
    return _Convolution(
        weight=_last(weight.unsqueeze(2)).to(device),
        bias=bias.contiguous().to(device),
        stride=conv.stride[0],
        padding=conv.padding[0],
        dilation=conv.dilation[0],
        transposed=transposed,
    )


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
