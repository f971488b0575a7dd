"""``chatterbox-vllm eval``: equal methods are equal, coarser ones are farther, and what is broken is noticed."""

from __future__ import annotations

import builtins
import errno
import io
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatterbox_vllm import evaluate
from chatterbox_vllm.checkpoint import DEMO_MARKER, Checkpoint
from chatterbox_vllm.errors import ConfigurationError, InvalidRequest, MissingDependency
from chatterbox_vllm.evaluate.compare import divergence, summary
from chatterbox_vllm.evaluate.methods import contender, quantize
from chatterbox_vllm.evaluate.report import RANDOM
from chatterbox_vllm.evaluate.sound import Recogniser, edits, words
from chatterbox_vllm.evaluate.t3 import PlainT3, read_t3
from chatterbox_vllm.files import write_whole
from chatterbox_vllm.quantization.packing import Stored
from chatterbox_vllm.t3.conversion import encoded, write
from chatterbox_vllm.t3.folder import infer_config
from chatterbox_vllm.types import STOP_SPEECH, SpeechOptions
from tests.t3_reference import requests, upstream_tokens

TOKENS = 30
needs_nf4 = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.fixture
def compare(demo: Checkpoint, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command on one short text; its JSON, with what it printed under ``printed``."""
    texts = tmp_path / "texts.txt"
    texts.write_text("Hello there.\n\n", encoding="utf-8")

    def run(method: str | Path, *more: object, model: Path = demo.folder) -> dict[str, Any]:
        file = tmp_path / "figures.json"
        options = ["--model", model, "--method", method, "--texts", texts, "--max-tokens", TOKENS, "--steps", 2]
        assert evaluate.main([*map(str, options), "--device", "cpu", "--json", str(file), *map(str, more)]) == 0
        return json.loads(file.read_text(encoding="utf-8")) | {"printed": capsys.readouterr().out}

    return run


@pytest.fixture
def copy(demo: Checkpoint, tmp_path: Path) -> Checkpoint:
    """The demo checkpoint in a folder of its own."""
    from chatterbox_vllm.checkpoint import locate

    return locate(shutil.copytree(demo.folder, tmp_path / "copy"))


# --- the command


def test_equal_methods_are_equal(compare: Any) -> None:
    found = compare("none")
    figures = found["summary"]
    assert figures["divergence"] == figures["mel_db"] == [0.0, 0.0]
    assert figures["agreement"] == 1.0
    assert figures["a_to_b"] == pytest.approx(1.0, abs=1e-6)
    assert figures["a_to_voice"] == figures["b_to_voice"]
    assert figures["wrong_a"] is None
    assert len(found["texts"][0]["divergence"]) in {TOKENS, found["texts"][0]["tokens"] + 1}


@needs_nf4
def test_four_bits_are_farther_than_eight(compare: Any) -> None:
    eight, four = compare("int8"), compare("bnb-4bit")
    for figure in ("divergence", "mel_db"):
        assert 0.0 < eight["summary"][figure][0] < four["summary"][figure][0] / 3
    assert four["summary"]["agreement"] < eight["summary"]["agreement"] <= 1.0
    assert four["a"] == {"checkpoint": four["b"]["checkpoint"], "t3": "bnb-4bit"} | dict.fromkeys(
        ("flow_encoder", "estimator"), "bnb-4bit"
    ) | {"voice_encoder": "none"}


def test_a_broken_weight_is_noticed(compare: Any, copy: Checkpoint) -> None:
    """One matrix of T3, and one of the vocoder, with the wrong sign: far beyond what rounding does."""
    rounding = compare("int8")["summary"]
    for file, key in (
        (copy.t3, "tfmr.layers.1.mlp.down_proj.weight"),
        (copy.s3gen, "flow.decoder.estimator.mid_blocks.0.1.0.ff.net.2.weight"),
    ):
        tensors = load_file(file)
        save_file({**tensors, key: -tensors[key]}, file)
    broken = compare(copy.folder)["summary"]
    for figure in ("divergence", "mel_db"):
        assert broken[figure][0] > 10 * rounding[figure][0]


def test_random_weights_are_said_to_be_random(compare: Any, copy: Checkpoint) -> None:
    assert compare("none")["printed"].endswith(f"{RANDOM}\n")
    (copy.folder / DEMO_MARKER).unlink()
    trained = compare("none", model=copy.folder)
    assert RANDOM not in trained["printed"]
    assert not trained["random_weights"]


def test_what_cannot_be_compared_is_refused(demo: Checkpoint, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n", encoding="utf-8")
    options = ["--model", str(demo.folder), "--method"]
    for arguments, told in (
        (["awq"], "chatterbox-vllm quantize"),
        (["auto"], "choose none"),
        (["none", "--against", "gptq"], "--against gptq: choose none, bnb-4bit"),
        (["none", "--texts", str(empty)], "write a text on each line"),
        (["none", "--plot", "x.txt"], "--plot must end in"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            evaluate.main([*options, *arguments])
    with pytest.raises(InvalidRequest):
        evaluate.main([*options, "none", "--max-tokens", "0"])


def test_a_device_that_is_not_there_is_refused(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(device: str, told: str) -> None:
        with pytest.raises(ConfigurationError, match=f"^--device must be cpu{told}, not '{device}'"):
            evaluate.main(["--model", str(demo.folder), "--method", "none", "--device", device])

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device in ("cuda", "banana", "meta"):
        refused(device, "; this machine has no CUDA device")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused("cuda:2", ", cuda:0 to cuda:1")


def test_other_variants_are_no_comparison(compare: Any, demo: Checkpoint, multilingual_demo: Checkpoint) -> None:
    """Their ids mean other texts. Either way round, and with the model itself."""
    english, other = f"{demo.folder} is english and reads 704", f"{multilingual_demo.folder} is multilingual and reads"
    with pytest.raises(ConfigurationError, match=f"A, {other} .*; B, {english} "):
        compare(multilingual_demo.folder)
    with pytest.raises(ConfigurationError, match=f"A, {english} .*; B, {other} "):
        compare(demo.folder, "--against", multilingual_demo.folder)


def test_a_text_that_cannot_be_spoken_is_found_before_any_is(
    compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoken(*_: Any) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(PlainT3, "__init__", spoken)
    texts = tmp_path / "some.txt"
    for wrong, told in (("a\x07b", r"has the control character U\+0007"), ("long " * 2000, "takes [0-9]+ tokens")):
        texts.write_text(f"Good.\n\n{wrong}\nGood.\n", encoding="utf-8")
        with pytest.raises(InvalidRequest, match=rf"^--texts .*some\.txt: line 3 {told}"):
            compare("none", "--texts", texts)


def test_a_plot_without_matplotlib_is_refused_at_once(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency, match="pip install matplotlib"):
        evaluate.main(["--model", str(demo.folder), "--method", "none", "--plot", "x.png"])


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_without_a_folder_is_refused_at_once(tmp_path: Path, option: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--method", "none", option, str(tmp_path / "nowhere" / "x.png")])
    assert f"argument {option}: cannot write" in capsys.readouterr().err


def test_a_plot(compare: Any, tmp_path: Path) -> None:
    compare("int8", "--plot", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_full_disk_leaves_what_was_there(
    compare: Any, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not half a file; and the error is a sentence that names the file."""
    file = tmp_path / "before.png"
    file.write_text("before", encoding="utf-8")
    open_file = io.open

    def full(name: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if "w" in mode and "before" in str(name):
            open_file(name, mode, *more, **options).close()  # it is empty now, and stays so
            raise OSError(errno.ENOSPC, "No space left on device", str(name))
        return open_file(name, mode, *more, **options)

    for module in (io, builtins):  # of pathlib, and of everybody else
        monkeypatch.setattr(module, "open", full)
    with pytest.raises(ConfigurationError, match=rf"{option}: cannot write .*before\.png: No space left on device; "):
        compare("none", option, file)
    assert file.read_text(encoding="utf-8") == "before"
    assert {each.name for each in tmp_path.iterdir()} <= {"before.png", "texts.txt", "figures.json"}


def test_a_device_and_a_link_are_written_to(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="/dev/full: No space left"):
        write_whole(Path("/dev/full"), b"x", "--json")
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(file)
    write_whole(link, b"x", "--json")
    assert link.is_symlink()
    assert file.read_bytes() == b"x"


# --- T3


def test_plain_t3_says_upstream_s_tokens(demo: Checkpoint) -> None:
    """Greedy, with mixed guidance weights, exaggerations and lengths; and it finds each of them the likeliest."""
    asked, plain = requests(5, 704), PlainT3(read_t3(demo.t3), demo.t3, "none")
    theirs = upstream_tokens(demo.t3, asked, TOKENS)
    for request, tokens in zip(asked, theirs, strict=True):
        options = SpeechOptions(
            temperature=0.0, max_tokens=TOKENS, cfg_weight=request.cfg_weight, exaggeration=request.exaggeration
        )
        assert plain.speak(request.text, request.voice, options) == tokens
        plainest = plain.speak(request.text, request.voice, options.but(repetition_penalty=1.0))
        found = plain.log_probabilities(request.text, request.voice, options, plainest)
        assert found.exp().sum(-1).allclose(torch.ones(len(plainest), dtype=torch.float64))
        assert found.argmax(-1).tolist() == [min(token, STOP_SPEECH - 1) for token in plainest]


def test_speech_ends_by_itself_and_by_its_seed(demo: Checkpoint) -> None:
    request, plain = requests(1, 704)[0], PlainT3(read_t3(demo.t3), demo.t3, "none")
    first, again, other = (plain.speak(request.text, request.voice, SpeechOptions(seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert first[-1] == STOP_SPEECH
    assert STOP_SPEECH not in first[:-1]
    count = len(first) + 5
    endless = plain.speak(request.text, request.voice, SpeechOptions(seed=1, max_tokens=count), can_end=False)
    assert len(endless) == count
    assert STOP_SPEECH not in endless


@pytest.mark.parametrize("method", ["int8", "bnb-8bit"])
def test_a_quantised_file_is_what_its_method_makes(
    demo: Checkpoint, copy: Checkpoint, method: str, tmp_path: Path
) -> None:
    """The rows that vLLM will load, against the rows that are made here from the original."""
    tensors, stored = load_file(demo.t3), Stored(method)
    write(copy.t3, encoded(tensors.items(), stored, infer_config(demo.t3)), stored)
    request, options = requests(1, 704)[0], SpeechOptions(seed=1, max_tokens=TOKENS)
    whole = PlainT3(read_t3(demo.t3), demo.t3, "none")
    tokens = whole.speak(request.text, request.voice, options)
    exact, made, found = (
        t3.log_probabilities(request.text, request.voice, options, tokens)
        for t3 in (
            whole,
            PlainT3(read_t3(demo.t3), demo.t3, method),
            PlainT3(read_t3(copy.t3), copy.t3, contender(str(copy.folder), demo, "--method").policy.t3),
        )
    )
    assert 0.0 <= float(divergence(made, found).mean()) < float(divergence(exact, made).mean()) / 1000


def test_a_quantised_file_has_its_method(demo: Checkpoint, copy: Checkpoint) -> None:
    stored = Stored("int8")
    write(copy.t3, encoded(load_file(demo.t3).items(), stored, infer_config(demo.t3)), stored)
    assert contender("none", copy, "--method").policy.t3 == "int8"
    mixed = contender("mixed", copy, "--method").policy
    assert (mixed.t3, mixed.estimator, mixed.strategy) == ("int8", "bnb-8bit", "mixed")
    with pytest.raises(ConfigurationError, match="is int8 already"):
        contender("bnb-8bit", copy, "--method")


# --- methods


def test_rounding_is_the_kernels() -> None:
    """What stands for vLLM's dynamic int8 and float8: rows that do not see each other, errors of the right size."""
    draw = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(64, 128, generator=draw), torch.randn(10, 128, generator=draw)
    louder = torch.cat([inputs, 100 * inputs])
    exact = inputs @ weight.T
    for method, least, most in (("int8", 0.005, 0.02), ("fp8", 0.02, 0.05), ("bnb-8bit", 0.003, 0.01)):
        module = torch.nn.Sequential(torch.nn.Linear(128, 64, bias=False))
        module[0].weight.data = weight.clone()
        quantize(module, method)
        found = module(inputs)
        assert least < float((found - exact).norm() / exact.norm()) < most
        assert module(louder)[:10].allclose(found, atol=1e-5)


def test_methods_have_the_spellings_of_quantization(demo: Checkpoint) -> None:
    for word, method in (("INT8", "int8"), ("bitsandbytes", "bnb-4bit"), ("Bnb-8bit", "bnb-8bit"), ("NONE", "none")):
        assert contender(word, demo, "--method").policy == contender(method, demo, "--method").policy
    assert contender("FP8", demo, "--method").policy.t3 == "fp8"
    with pytest.raises(ConfigurationError, match="chatterbox-vllm quantize"):
        contender("AWQ", demo, "--method")


def test_profiles_and_strategies_are_known(demo: Checkpoint, tmp_path: Path) -> None:
    profile = tmp_path / "mine.toml"
    profile.write_text('t3 = "int8"\n', encoding="utf-8")
    assert contender(str(profile), demo, "--method").policy.methods["t3"] == "int8"
    assert contender("mixed", demo, "--method").policy.t3 == "bnb-4bit"
    assert contender("fp8", demo, "--method").policy.estimator == "none"


# --- what is heard


def test_words_and_edits() -> None:
    assert words("Don’t stop, he said: 3 times!") == ["don't", "stop", "he", "said", "3", "times"]
    assert words("你好，世界", "zh") == ["你", "好", "世", "界"]
    assert edits("kitten", "sitting") == 3
    assert edits(["a", "b"], []) == edits([], ["a", "b"]) == 2
    assert edits(["a", "b", "c"], ["a", "c"]) == 1


def test_marks_belong_to_words() -> None:
    """In Hindi the vowels are marks: who hears another vowel hears another word."""
    girl, boy = words("लड़की आयी", "hi"), words("लड़का आया", "hi")
    assert len(girl) == len(boy) == edits(girl, boy) == 2
    assert len(words("नमस्ते दुनिया", "hi")) == 2
    assert words("क्\u200dष") == words("क्ष")  # a joiner changes how it is written, not what is said
    assert words("I ❤\ufe0f you \u0301!") == ["i", "you"]


def test_the_same_word_in_another_encoding_is_the_same() -> None:
    assert words("CAFE\u0301") == words("café") == ["caf\u00e9"]
    assert words("don’t") == words("don't") == ["don't"]
    assert words("ｶﾞ", "ja") == words("ガ", "JA") == ["ガ"]
    assert words("你好", "ZH") == ["你", "好"]


def test_a_recogniser_counts_words(compare: Any, tmp_path: Path) -> None:
    """A tiny one, of random weights: it hears something, or nothing, but not what was said."""
    folder = _recogniser(tmp_path / "asr")
    found = compare("none", "--asr", folder)
    assert found["summary"]["wrong_a"] == found["summary"]["wrong_b"] > 0.0
    assert found["texts"][0]["heard_a"]["count"] == 2
    assert "words not understood" in found["printed"]


def test_a_recogniser_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="openai/whisper-small"):
        Recogniser(str(tmp_path))


def _recogniser(folder: Path) -> Path:
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    folder.mkdir()
    symbols = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({symbol: index for index, symbol in enumerate(symbols)}), encoding="utf-8")
    config = Wav2Vec2Config(
        vocab_size=len(symbols),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    Wav2Vec2CTCTokenizer(str(vocabulary)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def test_summaries_weigh_by_tokens() -> None:
    from chatterbox_vllm.evaluate.compare import Heard, OfText

    def one(nats: list[float], agreement: float, wrong: int, count: int, cosine: float | None) -> OfText:
        heard = Heard("", wrong, count)
        return OfText("x", len(nats), nats, agreement, 1.0, cosine, cosine, 0.5, heard, heard)

    found = summary([one([1.0] * 3, 1.0, 0, 9, None), one([5.0], 0.0, 1, 1, 0.25)])
    assert found.divergence[0] == 2.0
    assert found.agreement == 0.75
    assert found.wrong_a == 0.1
    assert found.a_to_b == 0.25
