"""How the linear layers of a T3 file are stored: whole, as rows of 8-bit integers, or as groups of 4-bit integers.

A quantised file is laid out as upstream's, but for the linear layers of the Llama: each ``NAME.weight`` is replaced by
tensors of the same stem, in formats that vLLM loads without a conversion of its own.

    method     tensors beside the stem NAME                                             format
    none       weight (outputs, inputs), floating                                       upstream's
    int8       weight int8, weight_scale (outputs, 1) float32                           compressed-tensors W8A8
    bnb-8bit   weight_packed (outputs, inputs / 4) int32, weight_scale (outputs, 1) float32,
               weight_shape (2,) int64                                                  compressed-tensors W8A16
    awq        weight_packed (outputs, inputs / 8) int32, weight_scale (outputs, groups) float32,
               weight_zero_point (outputs / 8, groups) int32, weight_shape (2,) int64   compressed-tensors W4A16

int8 and bnb-8bit have the same integers, those of bitsandbytes' LLM.int8; with int8, activations are rounded, too. The
file's header says which it is (``Stored``), so that nobody has to be told. This module knows matrices, not T3; it
imports torch only where it computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from chatterbox_vllm.errors import CheckpointError
from chatterbox_vllm.quantization.policy import Method

if TYPE_CHECKING:
    from torch import Tensor

HEADER: Final = "chatterbox_vllm.quantization"
"""Key of a safetensors header."""
STORABLE: Final = (Method.AWQ, Method.INT8, Method.BNB_8BIT)
"""Methods of which there are files; the others quantise while vLLM loads."""
GROUP_SIZES: Final = (128, 64, 32)
"""Inputs that share a 4-bit scale; all of vLLM's 4-bit kernels know the first."""
WORD: Final = 32
"""Bits of what integers are packed into."""
PACKED: Final = {Method.AWQ: 4, Method.BNB_8BIT: 8}
"""Bits of a packed integer."""
_ZERO: Final = 128
"""The 8-bit code that means 0."""


@dataclass(frozen=True)
class Stored:
    """How a file stores its linear layers.

    Args:
        method: ``none`` or one of ``STORABLE``.
        group_size: inputs that share a scale; 0 unless the method is ``awq``.
    """

    method: str = Method.NONE
    group_size: int = 0

    @classmethod
    def of(cls, path: Path) -> Self:
        """What the header of the safetensors file ``path`` says; a file that says nothing is not quantised.

        Raises:
            CheckpointError: the file cannot be read, or says what this program does not know.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                said = (file.metadata() or {}).get(HEADER)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file ({error}); download it again") from error
        if said is None:
            return cls()
        try:
            stored = cls(**json.loads(said))
            known = stored.method in STORABLE and (stored.group_size in GROUP_SIZES) == (stored.method == Method.AWQ)
        except (ValueError, TypeError):
            known = False
        if not known:
            raise CheckpointError(f"{path} is quantised as {said}, which is unknown here; quantise it again")
        return stored

    def metadata(self) -> dict[str, str]:
        """The header that ``of`` reads."""
        return {HEADER: json.dumps(asdict(self))}

    @property
    def codes(self) -> str:
        """The tensor beside a stem that has the matrix's rows."""
        return "weight_packed" if self.method in PACKED else "weight"

    def shapes(self, stem: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that stand for the matrix (outputs, inputs) called ``stem``."""
        if self.method == Method.NONE:
            return {f"{stem}.weight": (outputs, inputs)}
        if self.method == Method.INT8:
            return {f"{stem}.weight": (outputs, inputs), f"{stem}.weight_scale": (outputs, 1)}
        bits = PACKED[Method(self.method)]
        groups = inputs // self.group_size if self.group_size else 1
        shapes: dict[str, tuple[int, ...]] = {
            f"{stem}.weight_packed": (outputs, inputs * bits // WORD),
            f"{stem}.weight_scale": (outputs, groups),
            f"{stem}.weight_shape": (2,),
        }
        if self.method == Method.AWQ:
            shapes[f"{stem}.weight_zero_point"] = (outputs * bits // WORD, groups)
        return shapes

    def encode(self, stem: str, weight: Tensor) -> dict[str, Tensor]:
        """``weight`` (outputs, inputs), floating, rounded and stored; the tensors are ``shapes``'s."""
        import torch

        if self.method == Method.NONE:
            return {f"{stem}.weight": weight}
        if self.method == Method.AWQ:
            rounded = round_groups(weight, self.group_size)
            return {
                f"{stem}.weight_packed": pack(rounded.codes, 4),
                f"{stem}.weight_scale": rounded.scale,
                f"{stem}.weight_zero_point": pack(rounded.zero.T, 4).T.contiguous(),
                f"{stem}.weight_shape": torch.tensor(weight.shape),
            }
        codes, scale = round_rows(weight)
        if self.method == Method.INT8:
            return {f"{stem}.weight": codes, f"{stem}.weight_scale": scale}
        return {
            f"{stem}.weight_packed": pack(codes.to(torch.int16) + _ZERO, 8),
            f"{stem}.weight_scale": scale,
            f"{stem}.weight_shape": torch.tensor(weight.shape),
        }

    def decode(self, stem: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """(outputs, inputs) float32: the matrix that ``encode``'s tensors stand for."""
        if self.method == Method.NONE:
            return tensors[f"{stem}.weight"].float()
        scale = tensors[f"{stem}.weight_scale"].float()
        if self.method == Method.INT8:
            return tensors[f"{stem}.weight"].float() * scale
        packed = tensors[f"{stem}.weight_packed"]
        if self.method == Method.BNB_8BIT:
            return (unpack(packed, 8).float() - _ZERO) * scale
        zero = unpack(tensors[f"{stem}.weight_zero_point"].T, 4).T
        return Groups(unpack(packed, 4), scale, zero).decoded()


class Groups(NamedTuple):
    """A matrix (outputs, inputs) in 4 bits: ``(codes - zero) * scale``, the last two once a group of inputs.

    Args:
        codes: (outputs, inputs) uint8, 0 to 15.
        scale: (outputs, groups) float32.
        zero: (outputs, groups) uint8, 0 to 15: the code that means 0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def decoded(self) -> Tensor:
        """(outputs, inputs) float32."""
        groups = self.codes.float().unflatten(1, (self.scale.shape[1], -1))
        return ((groups - self.zero.unsqueeze(2)) * self.scale.unsqueeze(2)).flatten(1)


def round_groups(weight: Tensor, group_size: int) -> Groups:
    """The nearest 4-bit integers; each group of inputs spans from its least to its largest weight, and 0.

    Args:
        weight: (outputs, inputs), floating; inputs a multiple of ``group_size``.
    """
    import torch

    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-low / scale).round()
    codes = (groups / scale.unsqueeze(2)).round() + zero.unsqueeze(2)
    return Groups(codes.clamp(0, 15).to(torch.uint8).flatten(1), scale, zero.to(torch.uint8))


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest 8-bit integers, a scale a row; bitsandbytes' ``int8_vectorwise_quant`` without outliers.

    Args:
        weight: (outputs, inputs), floating.

    Returns:
        (outputs, inputs) int8 from -127 to 127, and (outputs, 1) float32: ``codes * scale`` is the matrix.
    """
    codes, largest = row_codes(weight)
    return codes, (_divisor(largest) / 127)[:, None]


def row_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``round_rows``, with the (outputs,) largest magnitudes of the rows in place of scales; 0 for a row of zeros."""
    import torch

    wide = weight.float()
    largest = wide.abs().amax(1)
    return (wide * (127 / _divisor(largest))[:, None]).round().to(torch.int8), largest


def _divisor(largest: Tensor) -> Tensor:
    """A row of zeros has zeros for codes, whatever it is divided by that has a finite reciprocal."""
    return largest.clamp(min=1e-30)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) integers from 0 to 2^bits - 1 -> (rows, n x bits / 32) int32, the first code in the lowest bits."""
    import torch

    wide = codes.to(torch.int32).unflatten(1, (-1, WORD // bits))
    packed = wide[..., 0].clone()
    for place in range(1, wide.shape[2]):
        packed |= wide[..., place] << bits * place
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of ``pack``: (rows, n) int32 -> (rows, n x 32 / bits) uint8."""
    import torch

    places = torch.arange(0, WORD, bits, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(2) >> places) & (2**bits - 1)).to(torch.uint8).flatten(1)
