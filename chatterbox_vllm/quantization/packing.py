"""How the linear layers of a T3 file are stored: whole, as rows of int8, or as groups of packed 4-bit integers.

A quantised file is laid out as upstream's, but for the linear layers of the Llama: each ``NAME.weight`` is replaced by
tensors of the same stem, in formats that vLLM loads without a conversion of its own.

    method     tensors beside the stem NAME                                             format
    none       weight (outputs, inputs), floating                                       upstream's
    int8       weight int8, weight_scale (outputs, 1) float32                           compressed-tensors W8A8
    bnb-8bit   weight int8, SCB (outputs,) float32, the rows' largest magnitudes        bitsandbytes' LLM.int8
    awq        weight_packed (outputs, inputs / 8) int32, weight_scale (outputs, groups) float32,
               weight_zero_point (outputs / 8, groups) int32, weight_shape (2,) int64   compressed-tensors W4A16

The file's header says which (``Stored``), so that nobody has to be told. This module knows matrices, not T3; it
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
_NIBBLES: Final = 8
"""4-bit integers in an int32."""


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
        return "weight_packed" if self.method == Method.AWQ else "weight"

    def shapes(self, stem: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that stand for the matrix (outputs, inputs) called ``stem``."""
        if self.method == Method.AWQ:
            groups = inputs // self.group_size
            return {
                f"{stem}.weight_packed": (outputs, inputs // _NIBBLES),
                f"{stem}.weight_scale": (outputs, groups),
                f"{stem}.weight_zero_point": (outputs // _NIBBLES, groups),
                f"{stem}.weight_shape": (2,),
            }
        more: dict[str, dict[str, tuple[int, ...]]] = {
            Method.INT8: {f"{stem}.weight_scale": (outputs, 1)},
            Method.BNB_8BIT: {f"{stem}.SCB": (outputs,)},
        }
        return {f"{stem}.weight": (outputs, inputs), **more.get(self.method, {})}

    def encode(self, stem: str, weight: Tensor) -> dict[str, Tensor]:
        """``weight`` (outputs, inputs), floating, rounded and stored; the tensors are ``shapes``'s."""
        import torch

        if self.method == Method.NONE:
            return {f"{stem}.weight": weight}
        if self.method == Method.AWQ:
            rounded = round_groups(weight, self.group_size)
            return {
                f"{stem}.weight_packed": pack(rounded.codes),
                f"{stem}.weight_scale": rounded.scale,
                f"{stem}.weight_zero_point": pack(rounded.zero.T).T.contiguous(),
                f"{stem}.weight_shape": torch.tensor(weight.shape),
            }
        codes, scale = round_rows(weight)
        if self.method == Method.INT8:
            return {f"{stem}.weight": codes, f"{stem}.weight_scale": scale}
        return {f"{stem}.weight": codes, f"{stem}.SCB": scale.squeeze(1) * 127}

    def decode(self, stem: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """(outputs, inputs) float32: the matrix that ``encode``'s tensors stand for."""
        if self.method == Method.AWQ:
            scale = tensors[f"{stem}.weight_scale"].float()
            zero = unpack(tensors[f"{stem}.weight_zero_point"].T).T
            return Groups(unpack(tensors[f"{stem}.weight_packed"]), scale, zero).decoded()
        weight = tensors[f"{stem}.weight"].float()
        if self.method == Method.INT8:
            return weight * tensors[f"{stem}.weight_scale"]
        if self.method == Method.BNB_8BIT:
            return weight * (tensors[f"{stem}.SCB"] / 127).unsqueeze(1)
        return weight


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
    """A row of zeros has zeros for codes, whatever it is divided by, but 0."""
    import torch

    return largest.clamp(min=torch.finfo(torch.float32).tiny)


def pack(codes: Tensor) -> Tensor:
    """(rows, n) uint8 of 0 to 15 -> (rows, n / 8) int32, the first code in the lowest bits."""
    import torch

    wide = codes.to(torch.int32).unflatten(1, (-1, _NIBBLES))
    packed = wide[..., 0].clone()
    for place in range(1, _NIBBLES):
        packed |= wide[..., place] << 4 * place
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The inverse of ``pack``: (rows, n) int32 -> (rows, 8 n) uint8."""
    import torch

    places = 4 * torch.arange(_NIBBLES, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(2) >> places) & 15).to(torch.uint8).flatten(1)
