"""``chatterbox-vllm quantize``: packing, AWQ's scaling, calibration, and the folder that is written."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatterbox_vllm import cli
from chatterbox_vllm.bench.workload import random_text, random_voice
from chatterbox_vllm.checkpoint import Checkpoint, load_tensors, resolve
from chatterbox_vllm.convert import calibration, command, main, quantize
from chatterbox_vllm.convert.calibration import record
from chatterbox_vllm.errors import CheckpointError, ConfigurationError
from chatterbox_vllm.evaluate.t3 import PlainT3
from chatterbox_vllm.quantization.awq import READERS, scale_layer
from chatterbox_vllm.quantization.packing import HEADER, STORABLE, Stored, pack, round_groups, round_rows, unpack
from chatterbox_vllm.t3 import conversion
from chatterbox_vllm.t3.conversion import linear_layers
from chatterbox_vllm.t3.folder import infer_config
from chatterbox_vllm.types import START_SPEECH, SpeechOptions
from tests.t3_reference import Request, upstream_cond, upstream_t3

TEXT = [5, 6, 7, 8, 9]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_packed_as_compressed_tensors_packs_them(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (24, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), pack_to_int32(signed, bits, packed_dim=1))
    assert torch.equal(pack(codes.T, bits).T, pack_to_int32(signed, bits, packed_dim=0))
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


def test_rows_are_rounded_as_bitsandbytes_rounds_them() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = drawn(16, 96)
    codes, largest, _ = functional.int8_vectorwise_quant(weight)
    ours = Stored("bnb-8bit").encode("x", weight)
    assert torch.equal(ours["x.weight_packed"], pack_to_int32(codes, 8, packed_dim=1))
    torch.testing.assert_close(127 * ours["x.weight_scale"].squeeze(1), largest)


@pytest.mark.parametrize("stored", [Stored("int8"), Stored("bnb-8bit"), Stored("awq", 32), Stored("awq", 64)])
def test_stored_tensors_decode_to_the_rounded_matrix(stored: Stored) -> None:
    weight = drawn(16, 128)
    weight[3] = 0
    tensors = stored.encode("x", weight)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == stored.shapes("x", 16, 128)
    if stored.method == "awq":
        rounded = round_groups(weight, stored.group_size)
        wanted, step = rounded.decoded(), rounded.scale.max()
    else:
        codes, scale = round_rows(weight)
        wanted, step = codes * scale, scale.max()
    torch.testing.assert_close(stored.decode("x", tensors), wanted)
    assert (wanted - weight).abs().max() <= step  # half a step, and half of one for the zero


def layer_of(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"tfmr.layers.{index}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def test_scaling_alone_changes_nothing(demo: Checkpoint) -> None:
    """The factors cancel out: before rounding, the scaled network computes the same."""
    tensors, voice = load_tensors(demo.t3), random_voice(0)

    def logits() -> Tensor:
        t3 = PlainT3(tensors, demo.t3, "none")
        return t3.log_probabilities(TEXT, voice, SpeechOptions(), [1, 2, 3]).float()

    before = logits()
    moved = 0
    for index, heard in enumerate(record(PlainT3(tensors, demo.t3, "none"), [TEXT], voice, 10)):
        old = layer_of(tensors, index)
        new = scale_layer(old, heard, 64).weights
        moved += sum(not torch.equal(old[name], new[name]) for name in old)
        tensors |= {f"tfmr.layers.{index}.{name}": weight for name, weight in new.items()}
    assert moved > 0
    torch.testing.assert_close(logits(), before, rtol=1e-4, atol=1e-4)


def test_scaling_lowers_the_error_where_channels_are_loud(demo: Checkpoint) -> None:
    layer = layer_of(load_tensors(demo.t3), 0)
    inputs = {name: drawn(64, layer[f"{name}.weight"].shape[1], seed=1) for name in READERS}
    for rows in inputs.values():
        rows[:, ::17] *= 30
    loud = scale_layer(layer, inputs, 64)
    assert loud.error < 0.6 * loud.plain_error
    even = {name: torch.ones_like(rows) for name, rows in inputs.items()}
    assert scale_layer(layer, even, 64).error == pytest.approx(scale_layer(layer, even, 64).plain_error)


def test_the_calibration_hears_what_upstream_s_layers_read(demo: Checkpoint) -> None:
    request = Request(random_text(0, 704), random_voice(0), 0.5, 0.5)
    theirs, read = upstream_t3(demo.t3), {}
    start, text = torch.tensor([[START_SPEECH]] * 2), torch.tensor([[255, *request.text, 0]] * 2)
    for name in READERS:
        theirs.tfmr.layers[-1].get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: read.update({name: inputs[0].transpose(0, 1)})
        )
    with torch.inference_mode():
        embeds, _ = theirs.prepare_input_embeds(
            t3_cond=upstream_cond(request), text_tokens=text, speech_tokens=start, cfg_weight=0.5
        )
        theirs.tfmr(inputs_embeds=torch.cat([embeds, embeds[:, -1:]], dim=1))
    t3 = PlainT3(load_tensors(demo.t3), demo.t3, "none")
    once, longer = (record(t3, [request.text], request.voice, tokens)[-1] for tokens in (1, 10))
    for name, positions in read.items():
        step = -(-2 * len(positions) // len(once[name]))  # of a prompt, only some are kept
        torch.testing.assert_close(once[name], positions[::step].flatten(0, 1), atol=1e-4, rtol=0)
        assert len(longer[name]) == len(once[name]) + 2 * 9  # the last token is not read


def test_the_calibration_keeps_both_halves_of_the_guidance(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    t3, text, voice = PlainT3(load_tensors(demo.t3), demo.t3, "none"), random_text(0, 704), random_voice(0)
    whole = record(t3, [text], voice, 40)[-1]
    monkeypatch.setattr(calibration, "ROWS", -(-len(whole[READERS[0]]) // 2))  # so that every other one is left out
    thinned = record(t3, [text], voice, 40)[-1]
    for name, rows in whole.items():
        pairs = rows.unflatten(0, (-1, 2))
        assert not torch.equal(pairs[:, 0], pairs[:, 1])
        assert torch.equal(thinned[name], pairs[::2].flatten(0, 1))


@pytest.mark.parametrize("method", STORABLE)
def test_the_command_writes_a_whole_checkpoint(demo: Checkpoint, tmp_path: Path, method: str) -> None:
    texts = tmp_path / "texts"
    texts.write_text("Hello there.\n\nSee you soon.\n", encoding="utf-8")
    out = tmp_path / "new" / "out"
    arguments = ["--method", method, *(["--texts", str(texts), "--tokens", "8"] if method == "awq" else [])]
    assert main([str(demo.folder), str(out), *arguments]) == 0
    made = resolve(out)
    assert made.variant == demo.variant
    assert made.is_demo
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in demo.folder.iterdir())
    assert made.s3gen.read_bytes() == demo.s3gen.read_bytes()
    assert Stored.of(made.t3).method == method
    config = infer_config(made.t3)
    assert config.quantization_config["quant_method"]
    source, tensors = load_tensors(demo.t3), load_tensors(made.t3)
    stems = linear_layers(config)
    for name in source.keys() & tensors.keys():  # what is not quantised is as it was, but for folded norms
        if name.removesuffix(".weight") not in stems and "layernorm" not in name:
            assert torch.equal(source[name], tensors[name]), name


def test_a_multilingual_checkpoint(multilingual_demo: Checkpoint, tmp_path: Path) -> None:
    report = quantize(multilingual_demo, tmp_path / "out", texts=["Guten Tag."], language="de", tokens=4, group_size=32)
    assert report.after < report.before
    assert report.error is not None
    assert report.error <= 1
    made = resolve(tmp_path / "out")
    assert made.variant == multilingual_demo.variant
    assert Stored.of(made.t3) == Stored("awq", 32)


def test_what_cannot_be_done_is_said_and_nothing_is_left(
    demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="not an empty folder"):
        quantize(demo, demo.folder)
    with pytest.raises(ConfigurationError, match="holds no text"):
        main([str(demo.folder), str(tmp_path / "out"), "--texts", "/dev/null"])
    with pytest.raises(ConfigurationError, match="tokens must be from 1 to 1000, not 0"):
        quantize(demo, tmp_path / "out", tokens=0)
    quantize(demo, tmp_path / "int8", method="int8")
    with pytest.raises(CheckpointError, match="is quantised already"):
        quantize(resolve(tmp_path / "int8"), tmp_path / "out")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "_link", full_disk)
    for out in ("out", "new/deep/out"):
        with pytest.raises(ConfigurationError, match="No space left"):
            quantize(demo, tmp_path / out, method="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="No space left"):
        quantize(demo, tmp_path / "empty" / "new" / "out", method="int8")
    assert list((tmp_path / "empty").iterdir()) == []  # and it is there itself, as it was before


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--group-size", "128"], "it has no groups"),
        (["--texts", "texts"], "it needs no calibration"),
        (["--language", "de"], "it needs no calibration"),
        (["--tokens", "100"], "it needs no calibration"),
        (["--device", "cpu"], "it needs no calibration"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    demo: Checkpoint, tmp_path: Path, given: list[str], why: str
) -> None:
    for method in ("int8", "bnb-8bit"):
        told = f"{given[0]} is for --method awq and has no effect on {method}: {why}; leave it out"
        with pytest.raises(ConfigurationError, match=told) as caught:
            main([str(demo.folder), str(tmp_path / "out"), "--method", method, *given])
        assert caught.value.param == given[0]
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_is_ended_leaves_nothing(
    demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal, while it writes, and by a second one while it removes what it wrote."""

    def half(_tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        assert path.is_relative_to(next(tmp_path.glob(".out.*")))
        assert callable(signal.getsignal(signal.SIGTERM)), "it would end the tests"
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(conversion, "save_file", half)
    with pytest.raises(SystemExit) as stop:
        cli.main(["quantize", str(demo.folder), str(tmp_path / "out"), "--method", "int8"])
    assert stop.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_file_is_checked_strictly(demo: Checkpoint, tmp_path: Path) -> None:
    quantize(demo, tmp_path / "out", texts=["Hello there."], tokens=4)
    good = tmp_path / "out" / demo.t3.name
    tensors, path = load_file(good), tmp_path / "t3_cfg.safetensors"

    def refused(changed: dict[str, Tensor], metadata: dict[str, str], message: str) -> None:
        save_file(changed, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=message):
            infer_config(path)

    said = Stored("awq", 128).metadata()
    scale = "tfmr.layers.0.mlp.up_proj.weight_scale"
    refused({name: each for name, each in tensors.items() if name != scale}, said, f"missing {scale}")
    refused({**tensors, scale: tensors[scale][:, :0]}, said, rf"{scale} is \(256, 0\), not \(256, 1\)")
    refused(tensors, {}, "no tensor 'tfmr.layers.0.mlp.up_proj.weight'")
    refused(tensors, {HEADER: '{"method": "awq", "group_size": 7}'}, "which is unknown here")
    refused(tensors, {HEADER: "awq"}, "which is unknown here")
