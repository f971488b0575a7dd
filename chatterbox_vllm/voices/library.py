"""Voices by name and by recording.

A name is looked up among the files that are there, never made into a path. A recording is known by its content:
the same bytes are enrolled once, then come from memory, or from disk in the next process.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chatterbox_vllm.audio.decode import MAX_BYTES, decode, read_bounded
from chatterbox_vllm.checkpoint import cache_dir
from chatterbox_vllm.errors import ConfigurationError, InvalidAudio, TooLarge, UnknownVoice
from chatterbox_vllm.quantization.policy import Method
from chatterbox_vllm.voices.enrolment import Enroller, warm_up
from chatterbox_vllm.voices.features import SUFFIX, load_conds, load_features, save_features

if TYPE_CHECKING:
    from chatterbox_vllm.checkpoint import Checkpoint
    from chatterbox_vllm.types import VoiceFeatures

DEFAULT: Final = "default"
"""The checkpoint's built-in voice."""
OPENAI_VOICES: Final = (
    "alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer", "verse",
)  # fmt: skip
"""Names that clients of OpenAI's service send: the built-in voice, unless the folder has one of that name."""
_VOICE_ID: Final = re.compile(r"[a-z0-9_-]{1,64}", re.ASCII)
_AUDIO_SUFFIXES: Final = frozenset(
    {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".mp4", ".aac", ".webm", ".aiff", ".aif", ".wma", ".amr"}
)
_ENROLMENT_VERSION: Final = "1"
"""Part of the cache's key: raise it when the same recording is to give other features."""
_log: Final = logging.getLogger(__name__)


class VoiceLibrary:
    """The voices of one checkpoint. Thread-safe.

    Args:
        folder: holds voices, each a recording or a file of ``save_features``, named by its id (``[a-z0-9_-]{1,64}``)
            and a suffix. Files may come, go and change at any time.
        device: where the enrolment's networks run.
        voice_encoder: see ``Enroller``.
        cache: folder for the features of recordings; None is ``cache_dir()/voices``.

    Raises:
        ConfigurationError: ``folder`` is not a folder (``param="voices_dir"``).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        folder: str | Path | None = None,
        device: str = "cpu",
        voice_encoder: str = Method.NONE,
        cache: Path | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._enroller = Enroller(checkpoint, device=device, voice_encoder=voice_encoder)
        self._recordings = _Recordings(self._enroller, cache or cache_dir() / "voices")
        self._folder = _Folder(Path(folder)) if folder is not None else None
        self._builtin: VoiceFeatures | None = None
        self._lock = threading.Lock()
        # Of its own: in asyncio's pool, new recordings that wait for each other would take every thread from the
        # streams that sound.
        self._enrolling = ThreadPoolExecutor(1, thread_name_prefix="enrolment")

    def names(self) -> list[str]:
        """The ids of the folder's voices and, first, ``default`` if the checkpoint has a built-in voice."""
        builtin = [DEFAULT] if self._checkpoint.conds is not None else []
        return builtin + sorted(set(self._folder.files() if self._folder else ()) - {DEFAULT})

    def get(self, voice_id: str | None = None) -> VoiceFeatures:
        """The voice of that id; None is ``default``.

        Raises:
            UnknownVoice: there is none (``param="voice"``).
            InvalidAudio: its file is damaged (``param="voice"``).
        """
        found = self._found(voice_id)
        return self._recordings.get(found, "voice") if isinstance(found, bytes) else found

    async def named(self, voice_id: str | None = None) -> VoiceFeatures:
        """``get`` for an event loop, as ``enrolled`` is ``from_audio``."""
        found = await asyncio.to_thread(self._found, voice_id)
        return await self._enrolled(found, "voice") if isinstance(found, bytes) else found

    def from_audio(
        self, source: str | Path | bytes, *, param: str = "audio_prompt_path", max_bytes: int = MAX_BYTES
    ) -> VoiceFeatures:
        """The voice of a recording: a path, or a file's content. Blocks for 2 s or so when the recording is new.

        Args:
            max_bytes: the largest file.

        Raises:
            InvalidAudio, TooLarge: see ``audio.decode.decode``; ``param`` names the argument.
        """
        return self._recordings.get(read_bounded(source, param=param, max_bytes=max_bytes), param)

    async def enrolled(
        self, source: str | Path | bytes, *, param: str = "audio_prompt_path", max_bytes: int = MAX_BYTES
    ) -> VoiceFeatures:
        """``from_audio`` for an event loop: new recordings take turns, and none of asyncio's threads.

        Cancelling drops a recording whose turn has not come.
        """
        content = await asyncio.to_thread(read_bounded, source, param=param, max_bytes=max_bytes)
        return await self._enrolled(content, param)

    async def _enrolled(self, content: bytes, param: str) -> VoiceFeatures:
        if (features := await asyncio.to_thread(self._recordings.known, content)) is not None:
            return features
        return await asyncio.get_running_loop().run_in_executor(self._enrolling, self._recordings.get, content, param)

    def check(self) -> None:
        """Finds at the start what would else be found by the first request.

        Raises:
            CheckpointError: the built-in voice is damaged, or the files lack the enrolment's networks.
        """
        self._enroller.check()
        if self._checkpoint.conds is not None:
            self._default(self._checkpoint.conds)

    def warm_up(self) -> None:
        """Has behind it what the process's first recording would wait for, but the networks' loading."""
        warm_up()

    def unload(self) -> None:
        """Drops the enrolment's networks (530 MB) until the next new recording."""
        self._enroller.unload()

    def _default(self, conds: Path) -> VoiceFeatures:
        with self._lock:
            if self._builtin is None:
                self._builtin = load_conds(conds)
            return self._builtin

    def _found(self, voice_id: str | None) -> VoiceFeatures | bytes:
        """What is there under that id: features, or a recording's content."""
        name = DEFAULT if voice_id is None else voice_id
        if isinstance(name, str) and _VOICE_ID.fullmatch(name):
            if self._folder is not None and (path := self._folder.files().get(name)):
                return load_features(path) if _holds_features(path) else _recording(path)
            if (name == DEFAULT or name in OPENAI_VOICES) and self._checkpoint.conds is not None:
                return self._default(self._checkpoint.conds)
        raise self._unknown(voice_id)

    def _unknown(self, voice_id: object) -> UnknownVoice:
        names = self.names()
        if voice_id in (None, DEFAULT, *OPENAI_VOICES) and DEFAULT not in names:
            reason = "this checkpoint has no built-in voice (conds.pt); name another voice or give a recording"
            return UnknownVoice(reason, param="voice")
        known = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        return UnknownVoice(f"there is no voice {voice_id!r:.80}; there are: {known or 'none'}", param="voice")


def _holds_features(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX


def _recording(path: Path) -> bytes:
    """A voice's recording; its errors, which go to clients, do not tell where this server keeps it."""
    try:
        return read_bounded(path, param="voice")
    except TooLarge:
        raise
    except InvalidAudio as error:
        _log.warning("%s", error)
        raise InvalidAudio(f"voice: the recording of {path.stem!r} is empty or unreadable", param="voice") from error


class _Folder:
    """Which file each voice id of a folder has, kept up to date."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigurationError(f"voices_dir: {str(folder)!r} is not a folder", param="voices_dir")
        self._folder = folder
        self._seen: int | None = None
        self._files: dict[str, Path] = {}
        self._lock = threading.Lock()

    def files(self) -> dict[str, Path]:
        """Voice id -> file. Not to be changed."""
        with self._lock:
            try:
                changed = self._folder.stat().st_mtime_ns
                if changed != self._seen:
                    self._files, self._seen = self._scan(), changed
            except OSError as error:
                _log.warning(
                    "the folder of voices %s cannot be read (%s); going on with what is known", self._folder, error
                )
            return self._files

    def _scan(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        # Reversed, so that of two files of one voice the features win, then the first suffix.
        entries = sorted(self._folder.iterdir(), key=lambda path: (not _holds_features(path), path.name), reverse=True)
        for path in entries:
            if path.suffix.lower() not in _AUDIO_SUFFIXES | {SUFFIX} or path.name.startswith(".") or not path.is_file():
                continue
            if not _VOICE_ID.fullmatch(path.stem):
                _log.warning("%s is ignored: a voice's id has 1 to 64 of a-z, 0-9, _ and -", path)
                continue
            if path.stem in files:
                _log.warning("%s is ignored: %s is the same voice", files[path.stem], path.name)
            files[path.stem] = path
        return files


class _Recordings:
    """Features by the recording's content: in memory, then on disk, then by enrolling."""

    _IN_MEMORY = 256
    _ON_DISK = 1000
    """Files of 170 KB; the least recently made goes first."""

    def __init__(self, enroller: Enroller, folder: Path) -> None:
        self._enroller, self._folder = enroller, folder
        self._identity: str | None = None
        self._memory: OrderedDict[str, VoiceFeatures] = OrderedDict()
        self._lock = threading.Lock()
        self._enrolling = threading.Lock()

    def get(self, content: bytes, param: str) -> VoiceFeatures:
        key = self._key(content)
        if (features := self._known(key)) is not None:
            return features
        waveform = decode(content, param=param, max_bytes=len(content))
        with self._enrolling:  # whoever waited here for the same recording finds it known
            if (features := self._known(key)) is not None:
                return features
            features = self._enroller.enrol(waveform, param=param)
            self._store(key, features)
            return features

    def known(self, content: bytes) -> VoiceFeatures | None:
        """The features, if no enrolment is needed for them."""
        return self._known(self._key(content))

    def _key(self, content: bytes) -> str:
        with self._lock:
            if self._identity is None:
                self._identity = f"{_ENROLMENT_VERSION}:{self._enroller.identity()}:"
        return hashlib.sha256(self._identity.encode() + hashlib.sha256(content).digest()).hexdigest()

    def _known(self, key: str) -> VoiceFeatures | None:
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
                return self._memory[key]
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            features = load_features(path)
        except InvalidAudio as error:
            _log.warning("%s will be made anew: %s", path, error)
            return None
        self._remember(key, features)
        return features

    def _remember(self, key: str, features: VoiceFeatures) -> None:
        with self._lock:
            self._memory[key] = features
            while len(self._memory) > self._IN_MEMORY:
                self._memory.popitem(last=False)

    def _store(self, key: str, features: VoiceFeatures) -> None:
        self._remember(key, features)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            save_features(features, self._path(key), private=True)
            self._prune()
        except OSError as error:
            _log.warning("the voice is not kept on disk: %s", error)

    def _prune(self) -> None:
        files = list(self._folder.glob(f"*{SUFFIX}"))
        if len(files) > self._ON_DISK:
            for path in sorted(files, key=lambda path: path.stat().st_mtime)[: len(files) - self._ON_DISK]:
                path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{SUFFIX}"
