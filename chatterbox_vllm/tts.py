"""The Python API: upstream's ``ChatterboxTTS``, batched, over one engine.

    with ChatterboxTTS.from_pretrained() as model:
        wav = model.generate("Hello.")                        # (1, samples) float32 at model.sr
        wavs = model.generate(["One.", "Two."], seed=[1, 2])  # a list, in order

The engine runs in an event loop on a thread of its own; every method here may be called from any thread.
"""

from __future__ import annotations

import asyncio
import atexit
import secrets
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from chatterbox_vllm.arguments import check_switch
from chatterbox_vllm.checkpoint import FILES, Checkpoint, Variant, as_variant
from chatterbox_vllm.engine import AsyncChatterbox, together
from chatterbox_vllm.errors import ConfigurationError, EngineDead, InvalidRequest
from chatterbox_vllm.loop_thread import LoopThread
from chatterbox_vllm.text.frontend import check_text
from chatterbox_vllm.text.languages import SUPPORTED_LANGUAGES
from chatterbox_vllm.types import SAMPLE_RATE, SpeechOptions, SpeechRequest, VoiceFeatures

T = TypeVar("T")
OPTION_NAMES = frozenset(field.name for field in fields(SpeechOptions))
PROGRESS_FROM = 8
"""Batches of at least so many texts show a progress bar."""
IN_FLIGHT = 1024
"""Texts handed to the engine at once; it batches as many of them as fit."""
MULTILINGUAL = (Variant.MULTILINGUAL, Variant.MULTILINGUAL_V3)


@dataclass(frozen=True)
class Conditionals:
    """A voice and how exaggerated it speaks: upstream's ``Conditionals``."""

    voice: VoiceFeatures
    exaggeration: float = 0.5


class ChatterboxTTS:
    """Text to speech with the English or the multilingual checkpoint. Build it with a ``from_...`` method.

    Keyword arguments of the builders are ``AsyncChatterbox.start``'s: ``max_batch_size``, ``max_model_len``,
    ``gpu_memory_utilization``, ``vram_budget``, ..., any spelling of quantisation
    (``quantization.spellings.claims``: ``quantization="bnb-4bit"``, ``use_bnb_quantization=True``,
    ``quantization_strategy="mixed"``, ...), and any argument of ``vllm.AsyncEngineArgs``. Other projects' names work,
    too: ``compile`` (compile T3 and capture graphs) and ``s3gen_use_fp16``.
    """

    variant = Variant.ENGLISH
    sr = SAMPLE_RATE

    def __init__(self, model: str | Path | Checkpoint, **engine: Any) -> None:
        self._streams: set[AsyncGenerator[Any, None]] = set()
        self._loop = LoopThread("chatterbox")
        try:
            self._engine = self._loop.run(AsyncChatterbox.start(model, **_own_names(engine)))
        except BaseException:
            self._loop.end()
            raise
        self._default_voice: VoiceFeatures | None = None
        atexit.register(_leave, weakref.ref(self))

    @classmethod
    def from_pretrained(cls, device: str | None = None, **engine: Any) -> Self:
        """Downloads the checkpoint when it is not in the hub's cache, and loads it.

        Args:
            engine: ``variant="multilingual-v3"`` and the like choose another checkpoint than the class's own.
        """
        return cls(_model(cls.variant, engine), device=device, **engine)

    @classmethod
    def from_pretrained_multilingual(cls, device: str | None = None, **engine: Any) -> Self:
        """As ``from_pretrained``, the multilingual checkpoint."""
        return cls(_model(Variant.MULTILINGUAL, engine), device=device, **engine)

    @classmethod
    def from_pretrained_quantized(
        cls, device: str | None = None, quantization_strategy: str = "mixed", **engine: Any
    ) -> Self:
        """As ``from_pretrained``, with a strategy: conservative, mixed, aggressive, or auto, by free memory.

        Where one does not work, the next that quantises less is tried, with a warning, unless
        ``strict_quantization=True``.
        """
        return cls.from_pretrained(device, quantization_strategy=quantization_strategy, **engine)

    @classmethod
    def from_local(cls, ckpt_dir: str | Path | Checkpoint, device: str | None = None, **engine: Any) -> Self:
        """Loads a folder of upstream's layout, or what ``checkpoint.resolve`` knows by name ("demo")."""
        return cls(ckpt_dir, device=device, **engine)

    def generate(
        self,
        text: str | Sequence[str],
        audio_prompt_path: Any = None,
        language_id: str | Sequence[str] | None = None,
        *,
        progress: bool | None = None,
        **options: Any,
    ) -> Any:
        """Speaks a text, or a batch of texts.

        Args:
            text: one text, or several. Long ones are split at sentence ends, spoken together and joined.
            audio_prompt_path: reference recording: a path, the file's bytes, or ``VoiceFeatures``; default: the
                built-in voice.
            language_id: "en", "fr", ...; the English checkpoint speaks English only.
            progress: show a progress bar; default: for batches of 8 and more.
            options: ``SpeechOptions``' fields: exaggeration=0.5, cfg_weight=0.5, temperature=0.8, top_p=1.0,
                min_p=0.05, repetition_penalty=1.2, seed=None, max_tokens=1000, diffusion_steps=10.

        With several texts, each argument but ``progress`` may be a list of as many values.

        Returns:
            (1, samples) float32 on the CPU at ``sr`` Hz for a string, a list of such for a list.

        Raises:
            InvalidRequest: an argument is unusable; ``param`` names it.
            EngineError: speech could not be made.
        """
        requests = self._requests(text, audio_prompt_path, language_id, options)
        shown = len(requests) >= PROGRESS_FROM if progress is None else progress
        spoken = self._loop.run(_in_order(self._engine.speak, requests, shown))
        return _unbatched(text, [_as_tensor(samples) for samples in spoken])

    def generate_stream(
        self, text: str, audio_prompt_path: Any = None, language_id: str | None = None, **options: Any
    ) -> Generator[Tensor, None, None]:
        """Speaks one text, piece by piece: (1, n) float32 tensors as they are ready. Leaving the loop aborts it.

        The first comes once a player that starts with it would not run dry: on a slow machine, late.

        Raises:
            InvalidRequest, EngineError: as ``generate``; what can be told beforehand is raised at once.
        """
        check_text(text)
        (request,) = self._requests(text, audio_prompt_path, language_id, options)
        return self._pieces(request)

    def speech_tokens(
        self,
        text: str | Sequence[str],
        audio_prompt_path: Any = None,
        language_id: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """T3's half of ``generate``: (n,) int64 speech tokens, without start and stop. Texts are not split."""
        requests = self._requests(text, audio_prompt_path, language_id, options)
        spoken = self._loop.run(_in_order(self._engine.speech_tokens, requests, False))
        return _unbatched(text, [torch.tensor(tokens, dtype=torch.int64) for tokens in spoken])

    def synthesize(
        self, tokens: Tensor, voice: Any = None, *, seed: int | None = 0, diffusion_steps: int = 10
    ) -> Tensor:
        """The vocoder's half of ``generate``, without watermark.

        Args:
            tokens: (n,) or (1, n) int64 speech tokens below 6561.
            voice: ``VoiceFeatures`` or a recording, as ``generate``'s; default: the built-in voice.
            seed: names the noise; None is another one each time.

        Returns:
            (1, 960 n) float32.

        Raises:
            InvalidRequest: an argument is unusable; ``param`` names it.
        """
        ids, features = _checked_tokens(tokens), self._voice(voice, param="voice")
        seed = secrets.randbits(62) if seed is None else seed
        return _as_tensor(
            self._loop.run(self._engine.synthesize(ids, features, seed=seed, diffusion_steps=diffusion_steps))
        )

    def prepare_conditionals(self, wav_fpath: Any, exaggeration: float = 0.5) -> None:
        """Makes a recording the voice of every ``generate`` that names none.

        As upstream, where ``generate``'s own ``exaggeration`` then overrides this one.
        """
        SpeechOptions(exaggeration=exaggeration)
        self._default_voice = self._voice(wav_fpath, param="wav_fpath")

    def get_audio_conditionals(self, wav_fpath: Any = None) -> tuple[VoiceFeatures, Conditionals]:
        """A recording's features for the vocoder and for T3, for ``generate_with_conds``."""
        voice = self._voice(wav_fpath, param="wav_fpath")
        return voice, Conditionals(voice)

    def update_exaggeration(self, cond_emb: Conditionals, exaggeration: float) -> Conditionals:
        """The same voice, speaking with another ``exaggeration``."""
        conditionals = _of_kind("cond_emb", cond_emb, Conditionals)
        return replace(conditionals, exaggeration=SpeechOptions(exaggeration=exaggeration).exaggeration)

    def generate_with_conds(
        self, text: str | Sequence[str], s3gen_ref: VoiceFeatures, cond_emb: Conditionals, **options: Any
    ) -> Any:
        """``generate`` with the timbre of ``s3gen_ref`` and the delivery of ``cond_emb``, which may be two voices'."""
        cond_emb = _of_kind("cond_emb", cond_emb, Conditionals)
        s3gen_ref = _of_kind("s3gen_ref", s3gen_ref, VoiceFeatures)
        voice = replace(
            cond_emb.voice,
            prompt_tokens=s3gen_ref.prompt_tokens,
            prompt_mel=s3gen_ref.prompt_mel,
            x_vector=s3gen_ref.x_vector,
        )
        options.setdefault("exaggeration", cond_emb.exaggeration)
        return self.generate(text, audio_prompt_path=voice, **options)

    def get_quantization_info(self) -> dict[str, Any]:
        """What is quantised, how, and what it saves: see ``AsyncChatterbox.quantization_info``."""
        return self._engine.quantization_info()

    def get_supported_languages(self) -> dict[str, str]:
        """Code to name of the languages the loaded checkpoint speaks."""
        return self._engine.languages

    def shutdown(self) -> None:
        """Ends the engine and its processes; what is being spoken raises ``EngineDead``. Safe to call twice."""
        self._loop.end(self._finish())

    async def _finish(self) -> None:
        for stream in tuple(self._streams):
            await _closed(stream)
        await self._engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _requests(self, text: Any, voices: Any, languages: Any, options: dict[str, Any]) -> list[SpeechRequest]:
        texts = _texts(text)
        if unknown := options.keys() - OPTION_NAMES:
            name = min(unknown)
            raise InvalidRequest(f"{name} is no option; there are {', '.join(sorted(OPTION_NAMES))}", param=name)
        columns = {name: _spread(name, value, texts) for name, value in options.items()}
        voice_column = _spread("audio_prompt_path", voices, texts)
        language_column = _spread("language_id", languages, texts)
        return [
            SpeechRequest(
                text=item,
                voice=self._voice(voice_column[i]),
                language=language_column[i],
                options=SpeechOptions(**{name: column[i] for name, column in columns.items()}),
            )
            for i, item in enumerate(texts)
        ]

    def _pieces(self, request: SpeechRequest) -> Generator[Tensor, None, None]:
        stream = self._engine.stream(request)
        self._streams.add(stream)
        try:
            while (samples := self._loop.run(_next(stream))) is not None:
                yield _as_tensor(samples)
        finally:
            if stream in self._streams:  # not so at the program's end, when there are no functions left to call
                self._streams.remove(stream)
                self._loop.run_soon(_closed(stream))  # without waiting: the garbage collector may be the caller

    def _voice(self, source: Any, *, param: str = "audio_prompt_path") -> VoiceFeatures:
        if isinstance(source, VoiceFeatures):
            return source
        if source is None:
            return self._default_voice or self._engine.voices.get(None)
        if not isinstance(source, str | bytes | Path):
            kinds = "a path, a file's bytes or VoiceFeatures"
            raise InvalidRequest(f"{param} must be {kinds}, not {type(source).__name__}", param=param)
        return self._engine.voices.from_audio(source, param=param)


class ChatterboxMultilingualTTS(ChatterboxTTS):
    """``ChatterboxTTS`` with the multilingual checkpoint, and upstream's order of arguments."""

    variant = Variant.MULTILINGUAL

    @classmethod
    def from_local(cls, ckpt_dir: str | Path | Checkpoint, device: str | None = None, **engine: Any) -> Self:
        """As ``ChatterboxTTS.from_local``; of a folder that holds both, the multilingual checkpoint, v2 before v3."""
        if not isinstance(ckpt_dir, Checkpoint) and str(ckpt_dir).removeprefix("demo-") not in list(Variant):
            folder = Path(ckpt_dir).expanduser()
            held = [variant for variant in MULTILINGUAL if (folder / FILES[variant].t3).exists()]
            engine.setdefault("variant", held[0] if held else MULTILINGUAL[0])
        return super().from_local(ckpt_dir, device, **engine)

    @classmethod
    def get_supported_languages(cls) -> dict[str, str]:
        """Code to name of the 23 languages."""
        return dict(SUPPORTED_LANGUAGES)

    def generate(  # type: ignore[override]
        self,
        text: str | Sequence[str],
        language_id: str | Sequence[str] | None = None,
        audio_prompt_path: Any = None,
        **options: Any,
    ) -> Any:
        """``ChatterboxTTS.generate`` with the language in second place."""
        return super().generate(text, audio_prompt_path, language_id, **options)

    def generate_stream(  # type: ignore[override]
        self, text: str, language_id: str | None = None, audio_prompt_path: Any = None, **options: Any
    ) -> Generator[Tensor, None, None]:
        """``ChatterboxTTS.generate_stream`` with the language in second place."""
        return super().generate_stream(text, audio_prompt_path, language_id, **options)

    def speech_tokens(  # type: ignore[override]
        self,
        text: str | Sequence[str],
        language_id: str | Sequence[str] | None = None,
        audio_prompt_path: Any = None,
        **options: Any,
    ) -> Any:
        """``ChatterboxTTS.speech_tokens`` with the language in second place."""
        return super().speech_tokens(text, audio_prompt_path, language_id, **options)


def _own_names(engine: dict[str, Any]) -> dict[str, Any]:
    """``engine`` with our names for what another project calls otherwise.

    Raises:
        ConfigurationError: one is neither True nor False, or is given by both names.
    """
    named = dict(engine)
    if (compiled := _switch(named, "compile", "enforce_eager")) is not None:
        named["enforce_eager"] = not compiled
    if _switch(named, "s3gen_use_fp16", "vocoder_dtype"):
        named["vocoder_dtype"] = "float16"
    return named


def _switch(named: dict[str, Any], other: str, own: str) -> bool | None:
    """Takes another project's switch out of ``named``; None where it is not given."""
    wanted: bool | None = named.pop(other, None)
    if wanted is not None:
        check_switch(other, wanted)
        if own in named:
            raise ConfigurationError(f"{other} and {own} say the same; give one", param=other)
    return wanted


def _of_kind(name: str, value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        told = f"{name} must be what get_audio_conditionals returns, a {kind.__name__}, not {type(value).__name__}"
        raise InvalidRequest(told, param=name)
    return value


def _model(variant: Variant, engine: dict[str, Any]) -> str:
    """The name of the checkpoint that ``engine``'s variant asks for; English does not stand in for multilingual."""
    wanted = as_variant(engine.get("variant") or variant)
    return (wanted if wanted.is_multilingual or not variant.is_multilingual else variant).value


def _texts(text: Any) -> list[str]:
    if not isinstance(text, str | list | tuple):
        raise InvalidRequest(f"text must be a string or a list of strings, not {type(text).__name__}", param="text")
    texts = [text] if isinstance(text, str) else list(text)
    for item in texts:
        check_text(item)
    return texts


def _spread(name: str, value: Any, texts: list[str]) -> list[Any]:
    """One value for each text."""
    if not isinstance(value, list | tuple | range):
        return [value] * len(texts)
    if len(value) != len(texts):
        raise InvalidRequest(f"{name} has {len(value)} values for {len(texts)} texts", param=name)
    return list(value)


def _checked_tokens(tokens: Any) -> Tensor:
    integers = isinstance(tokens, Tensor) and not tokens.dtype.is_floating_point and tokens.dtype != torch.bool
    if not integers or not (tokens.dim() == 1 or (tokens.dim() == 2 and len(tokens) == 1)):
        given = f"{tuple(tokens.shape)} {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InvalidRequest(f"tokens must be a tensor of (n,) or (1, n) integers, not {given}", param="tokens")
    flat: Tensor = tokens.flatten().long().cpu()
    return flat


async def _in_order(
    speak: Callable[[SpeechRequest], Coroutine[Any, Any, T]], requests: list[SpeechRequest], progress: bool
) -> list[T]:
    """All requests together; the first failure cancels the rest."""
    slots = asyncio.Semaphore(IN_FLIGHT)
    with tqdm(total=len(requests), desc="Speaking", unit="text", disable=not progress) as bar:

        async def one(request: SpeechRequest) -> T:
            async with slots:
                spoken = await speak(request)
            bar.update()
            return spoken

        return await together(one(request) for request in requests)


async def _closed(stream: AsyncGenerator[Any, None]) -> None:
    with suppress(RuntimeError):  # another thread is reading it, and will be told that the engine is dead
        await stream.aclose()


def _leave(model: weakref.ref[ChatterboxTTS]) -> None:
    """At the program's end, before the modules go that closing a stream needs. T3's processes end by themselves.

    The whole ``shutdown`` cannot be had here: the interpreter starts no more threads for it.
    """
    while (alive := model()) is not None and alive._streams:
        with suppress(EngineDead):
            alive._loop.run(_closed(alive._streams.pop()))


async def _next(stream: AsyncGenerator[T, None]) -> T | None:
    return await anext(stream, None)


def _as_tensor(samples: np.ndarray[Any, np.dtype[np.float32]]) -> Tensor:
    return torch.from_numpy(samples).unsqueeze(0)


def _unbatched(text: Any, results: list[T]) -> T | list[T]:
    return results[0] if isinstance(text, str) else results
