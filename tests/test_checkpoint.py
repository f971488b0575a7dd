"""Checkpoints are found, read strictly and written in upstream's layout, and the demo's weights behave."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from chatterbox_vllm import checkpoint, upstream
from chatterbox_vllm.checkpoint import (
    DERIVED_KEYS,
    FILES,
    Checkpoint,
    Variant,
    load_pickle,
    load_strict,
    load_tensors,
    locate,
    resolve,
)
from chatterbox_vllm.demo_checkpoint import demo, networks, write_demo, writer
from chatterbox_vllm.demo_checkpoint.weights import draw
from chatterbox_vllm.errors import CheckpointError
from chatterbox_vllm.types import SPOKEN_TOKENS, START_TEXT, STOP_SPEECH, STOP_TEXT


@pytest.fixture(scope="module")
def english(tmp_path_factory) -> Checkpoint:
    return write_demo(tmp_path_factory.mktemp("demo") / "english")


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory) -> Checkpoint:
    return write_demo(tmp_path_factory.mktemp("demo") / "multilingual", variant=Variant.MULTILINGUAL)


@pytest.fixture(scope="module")
def speaker(english) -> nn.Module:
    """Upstream's T3."""
    network = networks.t3("tiny", multilingual=False)
    load_strict(network, load_tensors(english.t3), file=english.t3)
    return network


@pytest.fixture(scope="module")
def vocoder(english) -> nn.Module:
    """Upstream's S3Gen."""
    network = networks.s3gen("tiny")
    load_strict(network, load_tensors(english.s3gen), file=english.s3gen)
    return network


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


# --- locate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", list(Variant))
def test_detects_the_variant_of_a_folder(tmp_path, variant):
    found = locate(touch(tmp_path, *FILES[variant].all()))
    assert (found.variant, found.t3) == (variant, tmp_path / FILES[variant].t3)
    assert (found.conds, found.cangjie, found.is_demo) == (None, None, False)


def test_a_folder_of_all_prefers_english_then_v2(tmp_path):
    for variant in Variant:
        touch(tmp_path, *FILES[variant].all())
    assert locate(tmp_path).variant is Variant.ENGLISH
    assert locate(tmp_path, Variant.MULTILINGUAL_V3).t3.name == "t3_mtl23ls_v3.safetensors"
    (tmp_path / "tokenizer.json").unlink()
    assert locate(tmp_path).variant is Variant.MULTILINGUAL


def test_optional_files_are_found(tmp_path):
    touch(tmp_path, *FILES[Variant.MULTILINGUAL].all(), "conds.pt", "Cangjie5_TC.json")
    found = locate(tmp_path)
    assert (found.conds, found.cangjie) == (tmp_path / "conds.pt", tmp_path / "Cangjie5_TC.json")


def test_every_missing_file_is_named(tmp_path):
    touch(tmp_path, "t3_cfg.safetensors", "ve.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks s3gen\.safetensors, tokenizer\.json of the english"):
        locate(tmp_path, Variant.ENGLISH)
    with pytest.raises(CheckpointError, match=r"english lacks s3gen\.safetensors.*multilingual lacks t3_mtl23ls_v2"):
        locate(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        locate(tmp_path / "nowhere")


@pytest.mark.parametrize("use", [locate, resolve, write_demo])
def test_an_unknown_variant_is_refused(tmp_path, use):
    with pytest.raises(CheckpointError, match="no variant 'klingon'; there are english, multilingual, multilingual-v3"):
        use(tmp_path, variant="klingon")


# --- download and resolve --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub: ``answer`` is raised, or is the folder of the snapshot."""
    state = SimpleNamespace(answer=tmp_path, asked=None)

    def snapshot_download(repo_id: str, **options):
        state.asked = {"repo_id": repo_id, **options}
        if isinstance(state.answer, Exception):
            raise state.answer
        return str(state.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_downloads_the_variants_files_only(hub, tmp_path):
    touch(tmp_path, *FILES[Variant.MULTILINGUAL_V3].all())
    found = checkpoint.download(Variant.MULTILINGUAL_V3, revision="abc", token="secret")
    assert found.variant is Variant.MULTILINGUAL_V3
    assert hub.asked == {
        "repo_id": "ResembleAI/chatterbox",
        "revision": "abc",
        "token": "secret",
        "allow_patterns": [
            "t3_mtl23ls_v3.safetensors",
            "s3gen.pt",
            "ve.pt",
            "grapheme_mtl_merged_expanded_v1.json",
            "conds.pt",
            "Cangjie5_TC.json",
        ],
    }


@pytest.mark.parametrize("fault", [LocalEntryNotFoundError("offline"), HTTPError("broke"), OSError("no space")])
def test_an_unreachable_hub_says_what_to_do(hub, fault):
    hub.answer = fault
    with pytest.raises(CheckpointError, match=r"HF_ENDPOINT.*HF_TOKEN.*folder.*CHATTERBOX_MODEL=demo"):
        checkpoint.download(Variant.ENGLISH)


def test_a_refusal_of_the_hub_says_so(hub):
    response = SimpleNamespace(headers={}, request=None)
    hub.answer = RepositoryNotFoundError("404", response=response)
    with pytest.raises(CheckpointError, match="the hub refused someone/else"):
        resolve("someone/else")


def test_a_snapshot_that_lacks_files(hub, tmp_path):
    with pytest.raises(CheckpointError, match=r"lacks t3_cfg\.safetensors"):
        checkpoint.download(Variant.ENGLISH)


def test_without_a_network_nothing_hangs(monkeypatch, tmp_path):
    code = "from chatterbox_vllm.checkpoint import resolve; resolve('english')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "CheckpointError: ResembleAI/chatterbox is not in the hub's cache" in ran.stderr


@pytest.mark.parametrize(
    ("model", "variant", "asked", "found"),
    [
        ("english", None, "ResembleAI/chatterbox", "english"),
        ("multilingual", None, "ResembleAI/chatterbox", "multilingual"),
        ("multilingual-v3", "multilingual-v3", "ResembleAI/chatterbox", "multilingual-v3"),
        ("someone/tuned", None, "someone/tuned", "english"),
        ("someone/tuned", "multilingual", "someone/tuned", "multilingual"),
    ],
)
def test_resolves_names_of_the_hub(hub, tmp_path, model, variant, asked, found):
    for each in Variant:
        touch(tmp_path, *FILES[each].all())
    assert resolve(model, variant).variant == found
    assert hub.asked["repo_id"] == asked


def test_resolves_a_folder(english):
    assert resolve(english.folder) == resolve(str(english.folder)) == english
    with pytest.raises(CheckpointError, match="multilingual"):
        resolve(english.folder, Variant.MULTILINGUAL)


@pytest.mark.parametrize("model", ["klingon", "./nowhere", "/nowhere", "a/b/c", Path("nowhere/at-all"), ""])
def test_an_unknown_model_names_the_choices(hub, model):
    with pytest.raises(CheckpointError):
        resolve(model)
    assert hub.asked is None


def test_a_contradiction_is_refused(hub):
    with pytest.raises(CheckpointError, match="'english' is not the multilingual one"):
        resolve("english", Variant.MULTILINGUAL)


# --- the demo: cached, atomic, deterministic -------------------------------------------------------------------------


def test_the_demo_is_written_once(monkeypatch, tmp_path):
    monkeypatch.setenv("CHATTERBOX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(touch(tmp_path / "work"))
    first = resolve("demo")
    assert first.is_demo
    assert first.variant is Variant.ENGLISH
    assert first.folder.is_relative_to(tmp_path / "cache")
    written = first.t3.stat()
    assert resolve("demo") == demo() == first
    assert first.t3.stat() == written
    assert resolve("demo-multilingual").variant is Variant.MULTILINGUAL
    assert resolve("demo", Variant.MULTILINGUAL) == resolve("demo-multilingual")
    assert not list((tmp_path / "work").iterdir())


def test_two_writers_at_once_do_not_disturb_each_other(monkeypatch, tmp_path):
    monkeypatch.setenv("CHATTERBOX_CACHE_DIR", str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(demo, [Variant.ENGLISH] * 2)
    assert first == second
    assert [entry.name for entry in first.folder.parent.iterdir()] == [first.folder.name]
    load_strict(networks.voice_encoder(), load_tensors(first.voice_encoder), file=first.voice_encoder)


def test_equal_seeds_give_equal_bytes(english, tmp_path):
    again, other = write_demo(tmp_path / "again"), write_demo(tmp_path / "other", seed=1)
    for name in (*FILES[Variant.ENGLISH].all(), "conds.pt", "DEMO.json"):
        assert (again.folder / name).read_bytes() == (english.folder / name).read_bytes()
    for name in ("t3_cfg.safetensors", "s3gen.safetensors", "ve.safetensors", "conds.pt"):
        assert (other.folder / name).read_bytes() != (english.folder / name).read_bytes()


def test_a_demo_is_replaced_and_anything_else_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    write_demo(tmp_path / "empty")
    write_demo(tmp_path / "empty", seed=7)
    assert json.loads((tmp_path / "empty" / "DEMO.json").read_text())["seed"] == 7
    touch(tmp_path / "letters", "love.txt")
    with pytest.raises(CheckpointError, match="something other than a demo"):
        write_demo(tmp_path / "letters")
    with pytest.raises(CheckpointError, match="is a file"):
        write_demo(tmp_path / "letters" / "love.txt")
    with pytest.raises(CheckpointError, match="no demo of size 'huge'; there are tiny, full"):
        write_demo(tmp_path / "huge", size="huge")
    assert {entry.name for entry in tmp_path.iterdir()} == {"empty", "letters"}


def test_a_failure_midway_leaves_nothing(monkeypatch, tmp_path):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "save_voice", full_disk)
    with pytest.raises(CheckpointError, match="No space"):
        write_demo(tmp_path / "demo")
    assert not list(tmp_path.iterdir())


def test_the_current_folder_can_be_meant(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert write_demo(".").folder == tmp_path / "here"
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"]


# --- the demo: upstream's layout -------------------------------------------------------------------------------------


def layout(network: nn.Module) -> dict:
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in network.state_dict().items()}


def layout_of(path: Path) -> dict:
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in load_tensors(path).items()}


@pytest.mark.parametrize("which", ["english", "multilingual"])
def test_every_file_fits_upstreams_networks(which, request):
    made: Checkpoint = request.getfixturevalue(which)
    assert layout_of(made.t3) == layout(networks.t3("tiny", multilingual=made.variant.is_multilingual))
    assert layout_of(made.s3gen) == layout(networks.s3gen("tiny"))
    assert layout_of(made.voice_encoder) == layout(networks.voice_encoder())
    assert made.conds is not None
    assert (made.cangjie is not None) == made.variant.is_multilingual
    marker = json.loads((made.folder / "DEMO.json").read_text())
    assert (marker["size"], marker["variant"], marker["seed"]) == ("tiny", which, 0)


def test_v3_differs_in_t3s_name_only(multilingual, tmp_path):
    v3 = write_demo(tmp_path / "v3", variant=Variant.MULTILINGUAL_V3)
    assert v3.t3.name == "t3_mtl23ls_v3.safetensors"
    names = {path.name for path in multilingual.folder.iterdir()}
    assert {path.name for path in v3.folder.iterdir()} == names - {multilingual.t3.name} | {v3.t3.name}


@pytest.fixture(scope="module")
def upstreams() -> dict[str, nn.Module]:
    """Upstream's networks from their own constructors, on the meta device."""
    config = upstream.load("t3.modules.t3_config").T3Config
    with torch.device("meta"):
        return {
            "english": upstream.load("t3").T3(),
            "multilingual": upstream.load("t3").T3(config.multilingual()),
            "s3gen": upstream.load("s3gen").S3Gen(),
            "voice_encoder": upstream.load("voice_encoder").VoiceEncoder(),
        }


def test_full_has_upstreams_keys_and_sizes(upstreams):
    with torch.device("meta"):
        ours = {
            "english": networks.t3("full", multilingual=False),
            "multilingual": networks.t3("full", multilingual=True),
            "s3gen": networks.s3gen("full"),
            "voice_encoder": networks.voice_encoder(),
        }
    for name, network in ours.items():
        assert layout(network) == layout(upstreams[name]), name
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in ours.items()}
    assert parameters == {
        "english": 532_405_248,
        "multilingual": 535_989_248,
        "s3gen": 263_933_767,
        "voice_encoder": 1_423_618,
    }


def test_tiny_has_only_keys_of_the_full_size(english, multilingual, upstreams):
    for path, name in ((english.t3, "english"), (multilingual.t3, "multilingual"), (english.s3gen, "s3gen")):
        full, tiny = layout(upstreams[name]), layout_of(path)
        assert set(tiny) <= set(full)
        for key, (shape, dtype) in tiny.items():
            assert (len(shape), dtype) == (len(full[key][0]), full[key][1]), key
            assert all(small <= large for small, large in zip(shape, full[key][0], strict=True)), key


def test_every_full_tensor_has_a_distribution(upstreams):
    """Those of moderate size are drawn: finite, of the right shape and dtype."""
    for network in upstreams.values():
        for key, tensor in network.state_dict().items():
            if tensor.numel() > 10_000 and key != "tokenizer._mel_filters":
                continue
            drawn = draw("file", key, tensor, 0)
            assert (drawn.shape, drawn.dtype) == (tensor.shape, tensor.dtype)
            assert drawn.isfinite().all()


def test_conds_is_upstreams_conditionals(english):
    conds = load_pickle(english.conds)
    t3 = upstream.load("t3.modules.cond_enc").T3Cond(**conds["t3"])
    assert (t3.clap_emb, t3.cond_prompt_speech_emb) == (None, None)
    assert t3.speaker_emb.norm().item() == pytest.approx(1.0)
    assert t3.cond_prompt_speech_tokens.shape == (1, 150)
    assert t3.emotion_adv.shape == (1, 1, 1)
    gen = conds["gen"]
    assert list(gen) == ["prompt_token", "prompt_token_len", "prompt_feat", "prompt_feat_len", "embedding"]
    assert {key: (tuple(value.shape), value.dtype) for key, value in gen.items() if value is not None} == {
        "prompt_token": ((1, 25), torch.int64),
        "prompt_token_len": ((1,), torch.int64),
        "prompt_feat": ((1, 50, 80), torch.float32),
        "embedding": ((1, 192), torch.float32),
    }
    assert gen["prompt_token"].max() < SPOKEN_TOKENS
    mel = gen["prompt_feat"]
    assert mel.diff(dim=1).std() < 0.5 * mel.std()  # smooth in time


def test_tokenizers_are_valid_and_merge(english, multilingual):
    small, large = (Tokenizer.from_file(str(made.tokenizer)) for made in (english, multilingual))
    for tokenizer, size in ((small, 704), (large, 2454)):
        assert sorted(tokenizer.get_vocab().values()) == list(range(size))
        special = [tokenizer.token_to_id(token) for token in ("[START]", "[STOP]", "[UNK]", "[SPACE]")]
        assert special == [START_TEXT, STOP_TEXT, 1, 2]
    encoded = small.encode("Hello[SPACE]the[SPACE]world,[SPACE]it's[SPACE]5!")
    assert "[UNK]" not in encoded.tokens
    assert encoded.tokens[:6] == ["H", "e", "l", "lo", "[SPACE]", "the"]


@pytest.mark.parametrize(
    "text",
    [
        "[de]straße,[SPACE]u\u0308ber[SPACE]23",
        "[ar]\u0645\u0631\u062d\u0628\u0627\u061f",
        "[he]\u05e9\u05dc\u05d5\u05dd",
        "[hi]\u0928\u092e\u0938\u094d\u0924\u0947",
        "[ja]こんにちはテレヒ\u3099。",
        "[ko]\u1112\u1161\u11ab\u1100\u1173\u11af",
        "[ru]привет",
        "[el]γεια",
        "[zh][cj_o][cj_n][cj_f][cj_.][cj_a][cj_1][cj_.]",
    ],
)
def test_the_multilingual_tokenizer_knows_every_script(multilingual, text):
    tokens = Tokenizer.from_file(str(multilingual.tokenizer)).encode(text).tokens
    assert "[UNK]" not in tokens
    assert tokens[0] == text[:4]


def test_the_cangjie_table_has_upstreams_format(multilingual):
    table = dict(entry.split("\t") for entry in json.loads(multilingual.cangjie.read_text("utf-8")))
    assert table["你"] == "onf"
    assert len(set(table.values())) < len(table)  # two characters share a code
    assert "Cangjie" in json.loads((multilingual.folder / "DEMO.json").read_text())["note"]


# --- the demo: it behaves like a speech model ------------------------------------------------------------------------


def speech_tokens(network: nn.Module, conds: dict, *, temperature: float, seed: int, count: int) -> list[int]:
    condition = upstream.load("t3.modules.cond_enc").T3Cond(**conds["t3"])
    text = torch.tensor([START_TEXT, *range(3, 40), STOP_TEXT])
    torch.manual_seed(seed)
    return network.inference(
        t3_cond=condition,
        text_tokens=text.repeat(2, 1),
        max_new_tokens=count,
        temperature=temperature,
        top_p=1.0,
    )[0].tolist()


def test_t3_varies_and_ends(speaker, english):
    conds = load_pickle(english.conds)
    greedy = speech_tokens(speaker, conds, temperature=1e-4, seed=0, count=40)
    assert len(set(greedy)) > 20
    lengths = []
    for seed in range(3):
        spoken = speech_tokens(speaker, conds, temperature=0.8, seed=seed, count=400)
        assert spoken[-1] == STOP_SPEECH
        assert max(spoken[:-1]) < SPOKEN_TOKENS
        lengths.append(len(spoken))
    assert min(lengths) > 75
    assert max(lengths) < 300


def test_s3gen_speaks_noise_with_a_pitch(vocoder, english):
    reference = load_pickle(english.conds)["gen"]
    torch.manual_seed(0)
    tokens = torch.randint(SPOKEN_TOKENS, (1, 40))
    mel = vocoder.flow_inference(tokens, ref_dict=reference, finalize=True)
    pitch = vocoder.mel2wav.f0_predictor(mel)
    samples, _ = vocoder.hift_inference(mel, None)
    assert samples.shape == (1, 40 * 960)
    assert samples.isfinite().all()
    assert 0.01 < samples.std() < 0.5
    assert (samples.abs() >= 0.99).float().mean() < 0.01
    assert ((pitch > 80) & (pitch < 300)).float().mean() > 0.5
    assert -8 < mel.mean() < 0


def test_recordings_enrol_as_different_voices(vocoder, english):
    encoder = networks.voice_encoder()
    load_strict(encoder, load_tensors(english.voice_encoder), file=english.voice_encoder)
    time = np.arange(2 * 24_000) / 24_000
    voices = []
    for pitch in (110, 210):
        wave = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 9)) * (1 + np.sin(8 * np.pi * time)) / 8
        features = vocoder.embed_ref(wave.astype(np.float32), 24_000, device="cpu")
        mels = upstream.load("voice_encoder.melspec").melspectrogram(wave[::2].astype(np.float32), encoder.hp)
        voices.append((features["prompt_token"], features["embedding"], encoder.embeds_from_mels([mels.T])))
    for tokens, x_vector, embedding in voices:
        assert len(tokens.unique()) > 5
        assert 0.05 < x_vector.std() < 5
        assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)
        assert (embedding > 0).sum() > 50
    (first_tokens, first_x, first), (second_tokens, second_x, second) = voices
    assert not torch.equal(first_tokens, second_tokens)
    assert (first_x - second_x).abs().max() > 0.01
    assert (first * second).sum() < 0.99


# --- reading and loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
@pytest.mark.parametrize("name", ["ve.safetensors", "ve.pt"])
def test_a_truncated_file_is_named(english, multilingual, tmp_path, name, keep):
    source = english if name.endswith("safetensors") else multilingual
    (tmp_path / name).write_bytes(source.voice_encoder.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read"):
        load_tensors(tmp_path / name)


@pytest.mark.parametrize("name", ["t3.safetensors", "t3.pt"])
def test_another_format_is_named(tmp_path, name):
    for content in (b"<!DOCTYPE html><html>Not found</html>" * 9, bytes(range(256)) * 9, b"\x80\x04K\x05."):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            load_tensors(tmp_path / name)
    with pytest.raises(CheckpointError, match="nothing"):
        load_tensors(tmp_path / ("nothing" + Path(name).suffix))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "ran", "boom"))

    torch.save({"weight": Bomb()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"weight": Bomb()}))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_tensors(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_damage_anywhere_in_a_pickle_is_named(english, tmp_path):
    """One byte of the pickle inside is changed at a time, and the sums that zip keeps of it are made to fit."""
    with zipfile.ZipFile(english.conds) as whole:
        members = {entry.filename: whole.read(entry) for entry in whole.infolist()}
    (name,) = (each for each in members if each.endswith("data.pkl"))
    failed = 0
    for place in range(0, len(members[name]), 3):
        damaged = bytearray(members[name])
        damaged[place] ^= 0x15
        with zipfile.ZipFile(tmp_path / "conds.pt", "w") as file:
            for member, content in (members | {name: bytes(damaged)}).items():
                file.writestr(member, content)
        try:
            load_pickle(tmp_path / "conds.pt")
        except CheckpointError:
            failed += 1
    assert failed > 100


def test_the_model_wrapper_is_unwrapped(tmp_path):
    tensors = {"weight": torch.ones(2)}
    for number, wrapped in enumerate(({"model": [tensors]}, {"model": tensors}, tensors)):
        torch.save(wrapped, tmp_path / f"{number}.pt")
        assert torch.equal(load_tensors(tmp_path / f"{number}.pt")["weight"], torch.ones(2))


@pytest.mark.parametrize("content", [[torch.ones(1)], {"weight": "heavy"}, {"model": []}, {"model": [7]}])
def test_things_that_are_not_tensors_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"odd\.pt"):
        load_tensors(tmp_path / "odd.pt")


def test_loading_is_strict_and_names_everything():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    tensors = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(4), "1.bias": torch.ones(1), "2.extra": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        load_strict(module, tensors, file=Path("t3.safetensors"))
    message = str(caught.value)
    assert "t3.safetensors" in message
    assert "lacks 1.weight" in message
    assert "unexpected 2.extra" in message
    assert "0.bias is (4,) instead of (3,)" in message
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())


def test_optional_keys_may_be_missing_and_keep_their_values(english):
    network = networks.s3gen("tiny")
    tensors = {key: value for key, value in load_tensors(english.s3gen).items() if key not in DERIVED_KEYS}
    with pytest.raises(CheckpointError, match=r"lacks tokenizer\._mel_filters, tokenizer\.window"):
        load_strict(network, tensors, file=english.s3gen)
    load_strict(network, tensors, file=english.s3gen, optional=DERIVED_KEYS)
    written = load_tensors(english.s3gen)
    assert all(torch.equal(value, written[key]) for key, value in network.state_dict().items())


def test_a_module_on_the_meta_device_takes_the_tensors_over(tmp_path):
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    tensors = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    save_file(tensors, tmp_path / "linear.safetensors")
    load_strict(module, load_tensors(tmp_path / "linear.safetensors"), file=tmp_path / "linear.safetensors")
    assert torch.equal(module(torch.ones(1, 2)), torch.full((1, 3), 2.0))


def test_importing_the_module_is_light():
    code = (
        "import sys, chatterbox_vllm.checkpoint, chatterbox_vllm.demo_checkpoint;"
        "sys.exit(bool({'torch', 'huggingface_hub', 'chatterbox'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
