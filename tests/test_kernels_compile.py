"""Every kernel compiles for the cards that it is for, and has the shared memory it needs there.

Triton's interpreter tells neither. No card is needed for it, but Triton's compiler: see ``test_kernels``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from chatterbox_vllm.vocoder.cuda.tiling import Tile, Tiling
from tests.kernel_support import fresh_modules

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or "TRITON_INTERPRET" in os.environ, reason="without Triton, test_kernels runs it"
)
CARDS = {80: 163, 89: 99, 90: 227}
"""Compute capabilities, and KiB of shared memory of a block there."""
WIDTH, INNER, HIDDEN = 256, 512, 1024
"""The estimator's."""


@pytest.fixture(params=CARDS, ids=lambda card: f"sm_{card}")
def card(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


class Compiler:
    """Compiles kernels for one card, as they are launched with contiguous tensors."""

    def __init__(self, card: int) -> None:
        self.card = card
        self.overlap = {"OVERLAP": card >= 90}

    def check(self, kernel: Any, types: str, constants: dict[str, Any], **options: int | bool) -> None:
        """``types`` are those of the arguments that are no constants, in Triton's words."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = kernel.arg_names
        values = [name for name in names if name not in constants]
        assert len(values) == len(types.split()), values
        signature = dict(zip(values, types.split(), strict=True)) | dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            fn=kernel,
            signature={name: signature[name] for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in values if signature[name][0] == "*"},
        )
        made = triton.compile(source, target=GPUTarget("cuda", self.card, 32), options=options)
        assert made.metadata.shared <= 1024 * CARDS[self.card], kernel.__name__

    def tiled(self, kernel: Any, types: str, constants: dict[str, Any], tile: Tile) -> None:
        pdl = {"launch_pdl": True} if self.card >= 90 else {}
        options = {"num_warps": tile.warps, "num_stages": tile.stages, **pdl}
        self.check(kernel, types, constants | self.overlap, **options)


@pytest.fixture
def compiler(card: int) -> Compiler:
    return Compiler(card)


@pytest.fixture
def t3() -> Iterator[Any]:
    samples = "vllm.v1.worker.gpu.sample.gumbel"
    with fresh_modules(samples, "chatterbox_vllm.t3.kernels"):
        yield importlib.import_module("chatterbox_vllm.t3.kernels")


def test_t3s(compiler: Compiler, t3: Any) -> None:
    tensors = "*bf16 i32 *bf16 i32 *bf16 i32 *bf16 i32 *bf16 i32 i32 i32 *i32 *i32 i32 fp32"
    compiler.check(t3.decode, tensors, {"WIDTH": 64, "PAGE": 16, "TILE": 128}, num_warps=8)
    state = "*bf16 i32 *i32 *i64 *fp32 *i32 i32 *i32 i32 *fp32 *fp32 *i64 *i32 *i32 *i64"
    compiler.check(t3.draw, state, {"COUNT": 6563, "SILENT": 6561, "STOP": 6562, "SIZE": 8192}, num_warps=8)


@pytest.mark.parametrize("rows", [1280, 2048, 4096, 16384])
def test_the_estimators(compiler: Compiler, rows: int) -> None:
    from chatterbox_vllm.vocoder.cuda import kernels

    tiling = Tiling.of(rows, width=WIDTH, shared_memory=1024 * CARDS[compiler.card])
    for tile, outputs, gelu in ((tiling.project, 3 * INNER, False), (tiling.up, HIDDEN, True)):
        cut = tile.fitting(columns=outputs, depth=WIDTH)
        sizes = {"INPUTS": WIDTH, "OUTPUTS": outputs, "ROWS": cut.rows, "COLUMNS": cut.columns, "DEPTH": cut.depth}
        compiler.tiled(kernels.matmul, "*bf16 *bf16 *fp32 *bf16 *i32", sizes | {"GELU": gelu}, cut)
    for tile, inputs in ((tiling.out, INNER), (tiling.down, HIDDEN)):
        cut = tile.fitting(columns=WIDTH, depth=inputs)
        sizes = {"INPUTS": inputs, "WIDTH": WIDTH, "NORM": True, "ROWS": cut.rows, "DEPTH": cut.depth}
        compiler.tiled(kernels.add_linear, "*fp32 *bf16 *bf16 *fp32 *fp32 *fp32 *bf16 *i32", sizes, cut)
    cut = tiling.attention
    sizes = {"INNER": INNER, "DIM": 64, "ROWS": cut.rows, "KEYS": cut.columns}
    compiler.tiled(kernels.attention, "*bf16 *bf16 *i32 fp32", sizes, cut)


@pytest.mark.parametrize(("inputs", "second", "skip"), [(320, 0, 0), (256, 256, 0), (256, 0, 320), (256, 0, 256)])
@pytest.mark.parametrize("rows", [1280, 2048, 16384])
def test_convolutions(compiler: Compiler, rows: int, inputs: int, second: int, skip: int) -> None:
    from chatterbox_vllm.vocoder.cuda import kernels

    tiling = Tiling.of(rows, width=WIDTH, shared_memory=1024 * CARDS[compiler.card])
    cut = tiling.conv.fitting(columns=WIDTH, depth=64 if 320 in (inputs, skip) else WIDTH)
    given = {"WIDTH": inputs, "SECOND": second, "SKIP": skip, "SKIP_SECOND": 0, "SHIFT": not skip, "ACTIVATE": True}
    sizes = {"OUTPUTS": WIDTH, "KEEP": skip > 0, "NORM": skip > 0, "ROWS": cut.rows, "DEPTH": cut.depth}
    first = "*bf16 *bf16 *bf16 *fp32 *fp32 *fp32 *fp32 *bf16 *bf16 *bf16 *fp32"
    stream = "*fp32" if skip else "*bf16"
    compiler.tiled(kernels.convolution, f"{first} {stream} *bf16 *fp32 *fp32 *i32 *i32", given | sizes, cut)


def test_the_solvers_step(compiler: Compiler) -> None:
    from chatterbox_vllm.vocoder.cuda import kernels

    sizes = {"WIDTH": WIDTH, "MELS": 80, "MELS_PADDED": 128, "INPUTS": 320, "ROWS": 32}
    types = "*bf16 *bf16 *fp32 *fp32 *bf16 *i32 *i32 *fp32 fp32"
    compiler.check(kernels.euler, types, sizes | compiler.overlap)


@pytest.mark.parametrize("transposed", [False, True])
def test_decoded_matrices(compiler: Compiler, transposed: bool) -> None:
    from chatterbox_vllm.vocoder.cuda import dequantize_kernels

    options = compiler.overlap | {"TRANSPOSED": transposed}
    four = "*u8 *u8 *fp32 *fp32 *fp32 *fp32 *i32 *bf16"
    compiler.check(dequantize_kernels.four_bit, four, options, enable_fp_fusion=False)
    compiler.check(dequantize_kernels.eight_bit, "*i8 *fp32 *i32 *bf16", options, enable_fp_fusion=False)


def test_hifts(compiler: Compiler) -> None:
    from chatterbox_vllm.vocoder.cuda import hift_kernels

    for channels, rate, mirror in ((256, 8, False), (64, 120, True)):
        sizes = {"CHANNELS": channels, "RATE": rate, "EXTRA": mirror, "MIRROR": mirror, "ROWS": 4096 // channels}
        kinds = {"ADD": True, "KEEP": True, "SNAKE": True}
        compiler.check(hift_kernels.activate, "*fp32 " * 6 + "*i32 *i32 i32", sizes | kinds)
    lanes = {"LANES": 40, "CHANNELS": 80, "PADDED": 64, "ROWS": 16}
    compiler.check(hift_kernels.normals, "*i64 *i64 *fp32 i32", lanes)
    sizes = {"WAVES": 9, "LANES": 5, "SAMPLES": 480, "RATE": 24000.0, "BLOCK": 256}
    types = "*fp32 *fp64 *fp32 *fp32 *fp32 *i64 *i64 *i32 *i32 *i32 *fp32 i32"
    compiler.check(hift_kernels.excite, types, sizes)
    sizes = {"SAMPLES": 480, "RATE": 120, "FFT": 16, "HOP": 4, "COLUMNS": 20, "PADDED": 32, "ROWS": 64}
    compiler.check(hift_kernels.analyse, "*fp32 *fp32 *fp32 *i32 *i32 i32", sizes)
