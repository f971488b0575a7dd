"""How the estimator's kernels cut their work: found by trying them on an H200, see ``Tiling.of``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

_HALF_BYTES: Final = 2
_SHALLOWEST: Final = 16
"""What a tensor core takes at once."""
_RESERVED: Final = 8 * 1024
"""Shared memory left to the compiler, for reductions and changes of layout."""


@dataclass(frozen=True)
class Tile:
    """What one program of a kernel computes at a time.

    Args:
        rows, columns: of its result.
        depth: of the pieces of the inner dimension; for attention, ``columns`` are keys and ``depth`` is unused.
        warps: that work on it.
        stages: pieces in flight.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def within(self, shared_memory: int) -> Tile:
        """With no more in flight than fits a multiprocessor's shared memory: two stages at least, of smaller pieces."""
        room, depth = shared_memory - _RESERVED, self.depth
        piece = _HALF_BYTES * (self.rows + self.columns)
        while depth > _SHALLOWEST and 2 * piece * depth > room:
            depth //= 2
        return replace(self, depth=depth, stages=max(2, min(self.stages, room // (piece * depth))))

    def fitting(self, *, columns: int, depth: int) -> Tile:
        """With columns and depth that divide those of a network."""
        return replace(self, columns=math.gcd(self.columns, columns), depth=math.gcd(self.depth, depth))


@dataclass(frozen=True)
class Tiling:
    """A tile for each kernel. Tiles of ``out``, ``down`` and ``conv`` span whole rows: their columns are the width."""

    project: Tile
    attention: Tile
    out: Tile
    up: Tile
    down: Tile
    conv: Tile

    @classmethod
    def of(cls, rows: int, *, width: int, shared_memory: int) -> Tiling:
        """The fastest of 10 to 50 tried for each kernel with so many rows, on an H200 at a width of 256.

        Few rows are cut small, so that all multiprocessors have some; many rows large, so that weights are read less.
        """
        if rows <= 2048:
            tiling = cls(
                project=Tile(64, 128, 64, 4, 3),
                attention=Tile(64, 64, 64, 4, 3),
                out=Tile(16, width, 64, 4, 4),
                up=Tile(64, 64, 64, 4, 3),
                down=Tile(16, width, 128, 4, 3),
                conv=Tile(16, width, 64, 4, 4),
            )
        elif rows <= 8192:
            tiling = cls(
                project=Tile(64, 128, 64, 4, 2),
                attention=Tile(64, 64, 64, 4, 3),
                out=Tile(32, width, 32, 4, 3),
                up=Tile(64, 128, 64, 4, 2),
                down=Tile(64, width, 64, 8, 3),
                conv=Tile(32, width, 32, 4, 3),
            )
        else:
            tiling = cls(
                project=Tile(128, 128, 64, 8, 3),
                attention=Tile(64, 64, 64, 4, 3),
                out=Tile(64, width, 64, 8, 4),
                up=Tile(128, 128, 64, 8, 2),
                down=Tile(64, width, 64, 8, 4),
                conv=Tile(64, width, 64, 4, 2),
            )
        return cls(**{name: tile.within(shared_memory) for name, tile in vars(tiling).items()})
