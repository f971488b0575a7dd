"""Where the rows of a padded batch end, for networks whose convolutions see both ways."""

from __future__ import annotations

import torch
from torch import Tensor


class Edges:
    """Clears what lies past the end of each row, so that a convolution finds the zeros it would find alone.

    Args:
        lengths: (B,) int64 frames of each row.
        ragged: whether a row is shorter than the longest; the clearing costs nothing where none is.
    """

    def __init__(self, lengths: Tensor, *, ragged: bool) -> None:
        self.lengths = lengths
        self.ragged = ragged
        self._masks: dict[tuple[int, int], Tensor] = {}

    def clear(self, x: Tensor, rate: int = 1, extra: int = 0) -> Tensor:
        """``x`` (B, C, L), zero from place ``rate * length + extra`` of each row on."""
        return x * self.mask(x.shape[-1], rate, extra) if self.ragged else x

    def mask(self, places: int, rate: int = 1, extra: int = 0) -> Tensor:
        """(B, 1, places) float32: 1 within each row, 0 past its end."""
        if (rate, extra) not in self._masks:
            place = torch.arange(places, device=self.lengths.device)
            ends = self.lengths[:, None, None] * rate + extra
            self._masks[rate, extra] = (place < ends).float()
        return self._masks[rate, extra]

    def reflected(self, x: Tensor, rate: int, margin: int) -> Tensor:
        """Pads ``x`` (B, L) by ``margin`` on both sides, mirrored at the edges of each row."""
        place = torch.arange(-margin, x.shape[-1] + margin, device=x.device).abs()
        last = self.lengths[:, None] * rate - 1
        return x.gather(1, (last - (last - place).abs()).abs())
