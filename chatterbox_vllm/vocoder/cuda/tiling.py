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
        rows, columns: of its result; of attention, ``columns`` are keys.
        depth: of the pieces of the inner dimension; of attention, a head's channels.
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

    def attending_within(self, shared_memory: int) -> Tile:
        """As ``within``, for attention: the queries stay, and keys and values are in flight; of them fewer, if need be.

        So many queries and keys as a head has channels always fit.
        """
        room, keys = shared_memory - _RESERVED - _HALF_BYTES * self.rows * self.depth, self.columns
        piece = 2 * _HALF_BYTES * self.depth
        while keys > self.depth and 2 * piece * keys > room:
            keys //= 2
        return replace(self, columns=keys, stages=max(2, min(self.stages, room // (piece * keys))))

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
        """The fastest for so many rows, on an H200 at a width of 256.

        They were found one kernel at a time, of 17 to 22 tried for each, by the time of 28 whole blocks with weights of
        their own. Few rows are cut small, so that all multiprocessors have some; many rows large, so that weights are
        read less.
        """
        if rows <= 1280:
            tiling = cls(
                project=Tile(64, 128, 256, 4, 2),
                attention=Tile(64, 64, 64, 4, 3),
                out=Tile(16, width, 128, 4, 3),
                up=Tile(64, 64, 256, 4, 2),
                down=Tile(16, width, 128, 4, 3),
                conv=Tile(16, width, 64, 4, 4),
            )
        elif rows <= 2048:
            tiling = cls(
                project=Tile(64, 128, 64, 4, 3),
                attention=Tile(64, 128, 64, 4, 3),
                out=Tile(16, width, 128, 4, 3),
                up=Tile(64, 64, 64, 4, 3),
                down=Tile(16, width, 128, 4, 3),
                conv=Tile(16, width, 128, 4, 3),
            )
        elif rows <= 4096:
            tiling = cls(
                project=Tile(128, 128, 64, 8, 3),
                attention=Tile(64, 64, 64, 4, 2),
                out=Tile(32, width, 128, 8, 3),
                up=Tile(64, 128, 64, 4, 2),
                down=Tile(64, width, 64, 8, 4),
                conv=Tile(64, width, 32, 8, 4),
            )
        else:
            tiling = cls(
                project=Tile(128, 128, 64, 8, 2),
                attention=Tile(64, 64, 64, 4, 3),
                out=Tile(64, width, 64, 8, 4),
                up=Tile(128, 128, 64, 8, 3),
                down=Tile(64, width, 64, 8, 4),
                conv=Tile(64, width, 64, 8, 4),
            )
        tiles = {name: tile.within(shared_memory) for name, tile in vars(tiling).items()}
        return cls(**tiles | {"attention": tiling.attention.attending_within(shared_memory)})
