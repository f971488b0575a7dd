"""Voices by name are looked up, never joined to a path; a recording is enrolled once."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from chatterbox_vllm.audio.decode import Waveform
from chatterbox_vllm.checkpoint import Checkpoint
from chatterbox_vllm.demo_checkpoint import write_demo
from chatterbox_vllm.errors import CheckpointError, ConfigurationError, InvalidAudio, TooLarge, UnknownVoice
from chatterbox_vllm.types import VoiceFeatures
from chatterbox_vllm.voices.enrolment import Enroller
from chatterbox_vllm.voices.features import load_conds, load_features, save_features
from chatterbox_vllm.voices.library import OPENAI_VOICES, VoiceLibrary, _Recordings
from tests.audio_support import sound_file, voice_like
from tests.test_voices_features import some_voice

WAV = sound_file(voice_like(1.0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "voices"
    folder.mkdir()
    return folder


@pytest.fixture
def library(checkpoint: Checkpoint, folder: Path, tmp_path: Path) -> VoiceLibrary:
    return VoiceLibrary(checkpoint, folder=folder, cache=tmp_path / "cache")


@pytest.fixture
def enrolled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each recording that the networks saw; they are replaced by a slow nothing."""
    seen: list[int] = []

    def enrol(self: Enroller, waveform: Waveform, *, param: str) -> VoiceFeatures:
        seen.append(len(waveform.samples))
        threading.Event().wait(0.05)
        return some_voice(len(waveform.samples) % 200 + 1)

    monkeypatch.setattr(Enroller, "enrol", enrol)
    return seen


def test_the_built_in_voice_and_its_aliases(library: VoiceLibrary, checkpoint: Checkpoint) -> None:
    assert checkpoint.conds is not None
    expected = load_conds(checkpoint.conds).digest
    assert len(OPENAI_VOICES) == 13
    for name in (None, "default", *OPENAI_VOICES):
        assert library.get(name).digest == expected
    assert library.names() == ["default"]


def test_no_built_in_voice(checkpoint: Checkpoint, folder: Path) -> None:
    library = VoiceLibrary(replace(checkpoint, conds=None), folder=folder)
    save_features(some_voice(), folder / "eve.safetensors")
    assert library.names() == ["eve"]
    for name in (None, "default", "alloy"):
        with pytest.raises(UnknownVoice, match="no built-in voice"):
            library.get(name)


def test_files_of_the_folder(library: VoiceLibrary, folder: Path, enrolled: list[int]) -> None:
    save_features(some_voice(7), folder / "eve.safetensors")
    (folder / "bob-2.wav").write_bytes(WAV)
    (folder / "notes.txt").write_text("not a voice")
    (folder / "Not An Id.wav").write_bytes(WAV)
    (folder / ".eve-x.part").write_bytes(b"half")
    (folder / "dir.wav").mkdir()
    assert library.names() == ["default", "bob-2", "eve"]
    assert library.get("eve").digest == some_voice(7).digest
    library.get("bob-2")
    library.get("bob-2")
    assert enrolled == [24_000]


def test_the_folder_may_change(library: VoiceLibrary, folder: Path, enrolled: list[int]) -> None:
    with pytest.raises(UnknownVoice):
        library.get("eve")
    save_features(some_voice(7), folder / "eve.safetensors")
    assert library.get("eve").digest == some_voice(7).digest
    save_features(some_voice(8), folder / "eve.safetensors")
    assert library.get("eve").digest == some_voice(8).digest
    (folder / "eve.safetensors").unlink()
    with pytest.raises(UnknownVoice):
        library.get("eve")
    (folder / "eve.wav").write_bytes(WAV)
    library.get("eve")
    (folder / "eve.wav").write_bytes(sound_file(voice_like(2.0)))  # in place: the folder's own time stays
    library.get("eve")
    assert enrolled == [24_000, 48_000]


def test_a_file_goes_before_an_alias_and_features_before_a_recording(
    library: VoiceLibrary, folder: Path, enrolled: list[int]
) -> None:
    save_features(some_voice(3), folder / "alloy.safetensors")
    (folder / "alloy.wav").write_bytes(WAV)
    save_features(some_voice(4), folder / "default.safetensors")
    assert library.get("alloy").digest == some_voice(3).digest
    assert library.get(None).digest == some_voice(4).digest
    assert library.names() == ["default", "alloy"]
    assert enrolled == []


@pytest.mark.parametrize(
    "name", ["eve", "", "../eve", "/etc/passwd", "eve.wav", "EVE", "a" * 65, "é", "eve\n", "\0", 7]
)
def test_unknown_names(name: object, library: VoiceLibrary, folder: Path) -> None:
    save_features(some_voice(), folder.parent / "eve.safetensors")
    save_features(some_voice(), folder / "adam.safetensors")
    with pytest.raises(UnknownVoice, match="default, adam") as caught:
        library.get(name)  # type: ignore[arg-type]
    assert caught.value.param == "voice"
    assert len(str(caught.value)) < 300


def test_a_damaged_voice_harms_only_itself(library: VoiceLibrary, folder: Path) -> None:
    (folder / "eve.safetensors").write_bytes(b"damaged")
    (folder / "bob.wav").write_bytes(WAV[:1000])
    for name in ("eve", "bob"):
        with pytest.raises(InvalidAudio) as caught:
            library.get(name)
        assert caught.value.param == "voice"
    library.get("default")


def test_clients_are_not_told_where_voices_are(library: VoiceLibrary, folder: Path) -> None:
    (folder / "eve.safetensors").write_bytes(b"damaged")
    (folder / "bob.wav").touch()
    known = library.names()
    for name in ("eve.safetensors", "bob.wav", "gone"):
        if name == "gone":  # between the look at the folder and the look at the file
            known = ["default", "bob", "eve"]
            library._folder.files = lambda: {"bob": folder / "b.wav", "eve": folder / "e.safetensors"}
        for voice in known[1:]:
            with pytest.raises(InvalidAudio) as caught:
                library.get(voice)
            assert str(folder) not in str(caught.value)
            assert caught.value.param == "voice"


def test_a_suffix_may_be_in_capitals(library: VoiceLibrary, folder: Path, enrolled: list[int]) -> None:
    save_features(some_voice(7), folder / "eve.SAFETENSORS")
    (folder / "bob.WAV").write_bytes(WAV)
    assert library.get("eve").digest == some_voice(7).digest
    library.get("bob")
    assert enrolled == [24_000]


def test_enrolment_takes_no_thread_from_others(
    library: VoiceLibrary, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as many new recordings as asyncio has threads; those whose clients leave are never enrolled."""
    begun, go_on, seen = threading.Event(), threading.Event(), list[int]()

    def enrol(self: Enroller, waveform: Waveform, *, param: str) -> VoiceFeatures:
        seen.append(len(waveform.samples))
        begun.set()
        assert go_on.wait(10)
        return some_voice()

    monkeypatch.setattr(Enroller, "enrol", enrol)
    (folder / "bob.wav").write_bytes(WAV)

    async def scenario() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4))
        first = asyncio.create_task(library.named("bob"))
        await asyncio.to_thread(begun.wait, 10)
        others = [asyncio.create_task(library.enrolled(WAV + bytes(count))) for count in range(1, 9)]
        await asyncio.sleep(0.1)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "here"), 5) == "here"
        assert (await asyncio.wait_for(library.named(), 5)).digest == library.get().digest
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        go_on.set()
        assert (await first).digest == some_voice().digest
        assert (await library.named("bob")).digest == (await library.enrolled(WAV)).digest

    asyncio.run(scenario())
    assert seen == [24_000]


def test_a_checkpoint_is_checked_at_the_start(library: VoiceLibrary, checkpoint: Checkpoint, tmp_path: Path) -> None:
    library.check()
    VoiceLibrary(replace(checkpoint, conds=None)).check()
    assert checkpoint.conds is not None
    (tmp_path / "conds.pt").write_bytes(checkpoint.conds.read_bytes()[:1000])
    for wrong, says in (
        ({"conds": tmp_path / "conds.pt"}, "conds.pt"),
        ({"s3gen": checkpoint.voice_encoder}, r"lacks tokenizer\.\*, speaker_encoder"),
        ({"voice_encoder": checkpoint.s3gen}, "lacks lstm"),
    ):
        with pytest.raises(CheckpointError, match=says):
            VoiceLibrary(replace(checkpoint, **wrong)).check()


def test_the_folder_must_be_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        VoiceLibrary(checkpoint, folder=tmp_path / "absent")
    assert caught.value.param == "voices_dir"


def test_equal_recordings_are_enrolled_once(library: VoiceLibrary, tmp_path: Path, enrolled: list[int]) -> None:
    (tmp_path / "a.wav").write_bytes(WAV)
    with ThreadPoolExecutor(8) as pool:
        voices = list(pool.map(library.from_audio, [WAV, tmp_path / "a.wav", str(tmp_path / "a.wav")] * 4))
    assert enrolled == [24_000]
    assert len({voice.digest for voice in voices}) == 1
    library.from_audio(sound_file(voice_like(2.0)))
    assert enrolled == [24_000, 48_000]


def test_the_next_process_finds_it_on_disk(
    library: VoiceLibrary, checkpoint: Checkpoint, tmp_path: Path, enrolled: list[int]
) -> None:
    first = library.from_audio(WAV)
    assert VoiceLibrary(checkpoint, cache=tmp_path / "cache").from_audio(WAV).digest == first.digest
    assert len(enrolled) == 1
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(b"damaged")
    assert VoiceLibrary(checkpoint, cache=tmp_path / "cache").from_audio(WAV).digest == first.digest
    assert len(enrolled) == 2


def test_another_checkpoint_enrols_anew(
    library: VoiceLibrary, checkpoint: Checkpoint, tmp_path: Path, enrolled: list[int]
) -> None:
    library.from_audio(WAV)
    other = write_demo(tmp_path / "other", seed=1)
    VoiceLibrary(other, cache=tmp_path / "cache").from_audio(WAV)
    assert len(enrolled) == 2


def test_caches_are_bounded(
    library: VoiceLibrary, tmp_path: Path, enrolled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Recordings, "_IN_MEMORY", 2)
    monkeypatch.setattr(_Recordings, "_ON_DISK", 3)
    for tenths in range(10, 15):
        library.from_audio(sound_file(voice_like(tenths / 10)))
    assert len(library._recordings._memory) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_done_without(
    checkpoint: Checkpoint, tmp_path: Path, enrolled: list[int]
) -> None:
    (tmp_path / "file").touch()
    library = VoiceLibrary(checkpoint, cache=tmp_path / "file" / "voices")
    library.from_audio(WAV)
    library.from_audio(WAV)
    assert len(enrolled) == 1


def test_unusable_recordings_name_the_argument(library: VoiceLibrary, tmp_path: Path) -> None:
    for source, kind in ((b"", InvalidAudio), (tmp_path, InvalidAudio), (bytes(11 * 2**20), TooLarge)):
        with pytest.raises(kind) as caught:
            library.from_audio(source, param="ref_audio")
        assert caught.value.param == "ref_audio"


def test_with_the_real_networks(library: VoiceLibrary, tmp_path: Path) -> None:
    voice = library.from_audio(WAV)
    library.unload()
    assert library.from_audio(WAV) is voice
    (cached,) = (tmp_path / "cache").iterdir()
    assert load_features(cached).digest == voice.digest
