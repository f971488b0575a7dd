"""Every kernel compiles for the cards that it is for, and has the shared memory it needs there.

Triton's interpreter tells neither. No card is needed for it, but Triton's compiler: see ``test_kernels``.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from chatterbox_vllm.types import SAMPLE_RATE, START_SPEECH, STOP_SPEECH
from chatterbox_vllm.vocoder.cuda.tiling import Tile, Tiling
from tests.kernel_support import fresh_modules

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or "TRITON_INTERPRET" in os.environ, reason="without Triton, test_kernels runs it"
)
CARDS = {80: 163, 89: 99, 90: 227}
"""Compute capabilities, and KiB of shared memory of a block there."""
WIDTH, INNER, HIDDEN = 256, 512, 1024
"""The estimator's."""


class Compiler:
    """Compiles kernels for one card, as they are launched with contiguous tensors."""

    def __init__(self, card: int) -> None:
        self.card = card
        self.overlap = {"OVERLAP": card >= 90}

    def check(self, kernel: Any, types: str, constants: dict[str, Any], **options: int | bool) -> Any:
        """What Triton made. ``types`` are those of the arguments that are no constants, in Triton's words."""
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
        return made

    def tiled(self, kernel: Any, types: str, constants: dict[str, Any], tile: Tile) -> None:
        pdl = {"launch_pdl": True} if self.card >= 90 else {}
        options = {"num_warps": tile.warps, "num_stages": tile.stages, **pdl}
        self.check(kernel, types, constants | self.overlap, **options)


@pytest.fixture(params=CARDS, ids=lambda card: f"sm_{card}")
def compiler(request: pytest.FixtureRequest) -> Compiler:
    return Compiler(request.param)


@pytest.fixture
def t3() -> Iterator[dict[str, Any]]:
    names = [f"chatterbox_vllm.t3.{name}" for name in ("kernels", "attention", "sampler")]
    with fresh_modules("vllm.v1.worker.gpu.sample.gumbel", *names):
        yield {name.rpartition(".")[2]: importlib.import_module(name) for name in names}


def test_t3s(compiler: Compiler, t3: dict[str, Any]) -> None:
    kernels, attention, sampler = t3.values()
    tensors = "*bf16 i32 *bf16 i32 *bf16 i32 *bf16 i32 *bf16 i32 i32 i32 *i32 *i32 i32 fp32"
    for _, tile, warps in attention.SHAPES:
        compiler.check(kernels.decode, tensors, {"WIDTH": 64, "PAGE": 16, "TILE": tile}, num_warps=warps)
    state = "*bf16 i32 *i32 *i64 *fp32 *i32 i32 *i32 i32 *fp32 *fp32 *i64 *i32 *i32 *i64"
    ids = {"COUNT": STOP_SPEECH + 1, "SILENT": START_SPEECH, "STOP": STOP_SPEECH, "SIZE": 8192}
    compiler.check(kernels.draw, state, ids, num_warps=sampler._WARPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 32, 64, 128, 256])
def test_t3s_four_bits(rows: int, dtype: torch.dtype) -> None:
    from chatterbox_vllm.t3 import four_bit
    from chatterbox_vllm.t3 import four_bit_kernels as kernels

    compiler, half = Compiler(four_bit.HOPPER), {torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    common = {"GROUP": 128, "PLANE": 64, "MAGIC": four_bit.MAGIC[dtype][0], "ON_CARD": True}
    for outputs, inputs in ((3072, 1024), (1024, 1024), (8192, 1024), (1024, 4096)):
        tile = four_bit.Tile.of(rows, outputs, inputs, 132)
        cut = {"OUTPUTS": tile.outputs, "ROWS": tile.rows, "SPLITS": tile.splits, "STAGES": tile.stages}
        target = half if tile.splits == 1 else "*fp32"
        types = f"{half} *i16 *i32 {target} i32 i32"
        made = compiler.check(kernels.multiply, types, common | cut | {"INPUTS": inputs})
        assert "wgmma" in made.asm["ptx"]
        assert "st.shared" not in made.asm["ptx"], "the widened matrix stays in registers"
    compiler.check(kernels.widen, f"*i16 *i32 {half} i32", common | {"INPUTS": 1024, "OUTPUTS": 64})
    compiler.check(kernels.add, f"*fp32 {half} i32", {"SPLITS": 4, "BLOCK": 1024})


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
    cut = tiling.conv.fitting(columns=WIDTH, depth=math.gcd(inputs, second, skip))
    given = {"WIDTH": inputs, "SECOND": second, "SKIP": skip, "SKIP_SECOND": 0, "SHIFT": not skip, "ACTIVATE": True}
    sizes = {"OUTPUTS": WIDTH, "KEEP": skip > 0, "NORM": skip > 0, "ROWS": cut.rows, "DEPTH": cut.depth}
    first = "*bf16 *bf16 *bf16 *fp32 *fp32 *fp32 *fp32 *bf16 *bf16 *bf16 *fp32"
    stream = "*fp32" if skip else "*bf16"
    compiler.tiled(kernels.convolution, f"{first} {stream} *bf16 *fp32 *fp32 *i32 *i32", given | sizes, cut)


def test_the_solvers_step(compiler: Compiler) -> None:
    from chatterbox_vllm.vocoder.cuda import estimator, kernels

    sizes = {"WIDTH": WIDTH, "MELS": 80, "MELS_PADDED": 128, "INPUTS": 320, "ROWS": estimator._FRAMES}
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
    from chatterbox_vllm.vocoder.cuda import backend, hift, hift_kernels

    for channels, rate, last in ((256, 8, False), (64, hift.SPECTRA, True)):
        rows = hift._ELEMENTS // channels
        sizes = {"CHANNELS": channels, "RATE": rate, "EXTRA": last, "MIRROR": last, "ROWS": rows}
        kinds = {"ADD": True, "KEEP": True, "SNAKE": True}
        compiler.check(hift_kernels.activate, "*fp32 " * 6 + "*i32 *i32 i32", sizes | kinds)
    lanes = {"LANES": 40, "CHANNELS": 80, "PADDED": 64, "ROWS": backend._POSITIONS}
    compiler.check(hift_kernels.normals, "*i64 *i64 *fp32 i32", lanes)
    waves = {"WAVES": 9, "LANES": 5, "RATE": float(SAMPLE_RATE), "BLOCK": hift._SAMPLES}
    types = "*fp32 *fp64 *fp32 *fp32 *fp32 *i64 *i64 *i32 *i32 *i32 *fp32 i32"
    compiler.check(hift_kernels.excite, types, waves | {"SAMPLES": hift.FRAME_SAMPLES})
    sizes = {"SAMPLES": hift.FRAME_SAMPLES, "RATE": hift.SPECTRA, "FFT": hift.FFT, "HOP": hift.HOP}
    bins = {"COLUMNS": hift._PADDED_BINS, "PADDED": 32, "ROWS": hift._SPECTRA_ROWS}
    compiler.check(hift_kernels.analyse, "*fp32 *fp32 *fp32 *i32 *i32 i32", sizes | bins)
