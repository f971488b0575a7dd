"""One server's engine: text in, sound out, for many requests at once.

A request goes: prepare the text -> T3 tokens (vLLM) -> vocoder (batched) -> watermark; ``parts`` has the two in the
middle. Every way out of ``stream`` passes one ``finally`` that aborts T3, drops the vocoder's state and counts the
request out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform

from chatterbox_vllm.arguments import check, check_switch, device_of, policy_of, vocoder_devices, vocoder_dtype_of
from chatterbox_vllm.audio.watermark import Watermarker, WatermarkStream
from chatterbox_vllm.checkpoint import Checkpoint, Variant, resolve
from chatterbox_vllm.errors import ConfigurationError, EngineDead, EngineError
from chatterbox_vllm.loading import Setup, Stages, check_for_cpu, components_of, load, log_applied, settled
from chatterbox_vllm.memory import parse_bytes
from chatterbox_vllm.parts import speaking, together, vocoded_whole
from chatterbox_vllm.quantization.policy import Policy
from chatterbox_vllm.streaming import vocoded
from chatterbox_vllm.t3.generator import STALLED_SECONDS
from chatterbox_vllm.t3.prompt import LEAST_MODEL_LEN, STREAM_INTERVAL
from chatterbox_vllm.text.frontend import TextFrontend
from chatterbox_vllm.text.languages import SUPPORTED_LANGUAGES
from chatterbox_vllm.text.tokenise import load_tokenizer
from chatterbox_vllm.types import (
    AT_ONCE,
    CHUNK_LENGTHS,
    MAX_MODEL_LEN,
    MAX_TEXT_TOKENS,
    SAMPLE_RATE,
    Listening,
    SpeechRequest,
    VoiceFeatures,
)
from chatterbox_vllm.vocoder.footprint import VocoderFootprint
from chatterbox_vllm.vocoder.guest import GuestHost
from chatterbox_vllm.vocoder.schedule import ChunkSchedule, Playback, due_of_file
from chatterbox_vllm.vocoder.utterance import Chunk, open_utterance
from chatterbox_vllm.vocoder.worker import VocoderStats
from chatterbox_vllm.voices.library import VoiceLibrary

logger = logging.getLogger(__name__)
SILENCE = "T3 ended before it said anything; try another seed, or another text"
Samples = np.ndarray[tuple[int], np.dtype[np.float32]]


@dataclass(frozen=True)
class Health:
    """``live``: the process answers. ``ready``: it can speak now; otherwise ``reason`` says why not."""

    live: bool
    ready: bool
    reason: str | None
    active: int


class AsyncChatterbox:
    """The engine. Build it with ``start``; all methods belong to the event loop that runs them."""

    sample_rate = SAMPLE_RATE

    def __init__(
        self,
        setup: Setup,
        *,
        components: dict[str, dict[str, Any]],
        stages: Stages,
        voices: VoiceLibrary,
        frontend: TextFrontend,
        watermarker: Watermarker | None,
        schedule: ChunkSchedule,
        max_chunk_length: int,
    ) -> None:
        self.checkpoint = setup.checkpoint
        self.voices = voices
        self._setup, self._components = setup, components
        self._stages, self._t3, self._worker = stages, stages.t3, stages.vocoder
        self._frontend = frontend
        self._watermarker = watermarker
        self._schedule = schedule
        self._max_chunk_length = max_chunk_length
        self._active = 0
        self._streams = 0
        self._stopping = False
        self._ending: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        model: str | Path | Checkpoint = "english",
        *,
        variant: Variant | None = None,
        max_batch_size: int | None = None,
        max_model_len: int = 2048,
        gpu_memory_utilization: float = 0.5,
        quantization: Policy | str | None = None,
        strict_quantization: bool = False,
        vram_budget: str | int | None = None,
        device: str | None = None,
        vocoder_device: str | None = None,
        vocoder_process: bool | None = None,
        vocoder_dtype: str = "auto",
        mps: bool = False,
        mask_invalid_tokens: bool = True,
        watermark: bool = True,
        voices_dir: Path | None = None,
        max_chunk_length: int = 300,
        schedule: ChunkSchedule | None = None,
        **engine_args: Any,
    ) -> AsyncChatterbox:
        """Loads everything and returns when the engine can speak.

        Args:
            model: "english", "multilingual", "demo", a folder, or a hub repository (``checkpoint.resolve``).
            variant: which of a folder's checkpoints, when it holds several.
            max_batch_size: requests T3 runs at once; default 256 on a GPU, 32 on a CPU.
            max_model_len: positions of one utterance: 38 + text tokens + speech tokens.
            gpu_memory_utilization: share of the card that T3 may take, weights and KV cache together.
            quantization: a policy for all networks, or T3's method, as "bnb-4bit" or "int8".
            strict_quantization: raise where a strategy does not work, rather than fall back to a weaker one.
            vram_budget: bytes of the card, or text such as "2GiB": everything together must fit in so much, which is
                checked before anything is loaded. It takes the place of ``gpu_memory_utilization``.
            device: where vocoder and enrolment run; default: vLLM's device.
            vocoder_device: another one for the vocoder, or several with commas between them, a worker for each.
            vocoder_process: whether each worker is a process of its own; default: on a GPU. There, False puts it into
                T3's, which takes less memory.
            vocoder_dtype: "float32", "bfloat16" or "float16" for the vocoder's estimator; "auto" is the half precision
                that a GPU has, and on a CPU float32 with faster products than upstream's: samples differ by some
                ten-thousandths, where "float32" has upstream's very bits.
            mps: run NVIDIA's Multi-Process Service, so that T3 and the vocoder use one GPU at the same time.
            mask_invalid_tokens: never sample ids that are no sound; False is upstream's distribution, exactly.
            watermark: put Perth's inaudible watermark into every answer.
            voices_dir: recordings or features of more voices, by file name.
            max_chunk_length: characters of one utterance; a longer text is split at sentence ends.
            engine_args: other spellings of quantisation (``quantization.spellings.claims``), and any other
                ``vllm.AsyncEngineArgs``.

        Raises:
            CheckpointError, ConfigurationError, MissingDependency: named and with their remedy.
        """
        check("max_batch_size", 1 if max_batch_size is None else max_batch_size, 1, 4096, int)
        check("max_model_len", max_model_len, LEAST_MODEL_LEN, MAX_MODEL_LEN, int)
        check("gpu_memory_utilization", gpu_memory_utilization, 0.01, 1.0, float)
        check("max_chunk_length", max_chunk_length, *CHUNK_LENGTHS, int)
        check_switch("strict_quantization", strict_quantization)
        check_switch("mps", mps)
        check_switch("mask_invalid_tokens", mask_invalid_tokens)
        check_switch("watermark", watermark)
        if vocoder_process is not None:
            check_switch("vocoder_process", vocoder_process)
        if "max_num_seqs" in engine_args:
            raise ConfigurationError("max_num_seqs is called max_batch_size here", param="max_num_seqs")
        on_gpu = not current_platform.is_cpu()
        if str(device) == "cpu" and on_gpu:
            raise ConfigurationError(
                "device='cpu' needs vLLM's CPU build: CHATTERBOX_DEVICE=cpu ./start-api-server.sh installs it",
                param="device",
            )
        policy = policy_of(quantization, engine_args)
        where = device_of("device", device) or ("cuda" if on_gpu else "cpu")
        devices = vocoder_devices(where if vocoder_device is None else vocoder_device, vocoder_process)
        vocoder_type = vocoder_dtype_of(vocoder_dtype)
        budget = None if vram_budget is None else parse_bytes(vram_budget)
        if not on_gpu:
            check_for_cpu(policy, budget, strict=strict_quantization)
        checkpoint = model if isinstance(model, Checkpoint) else await asyncio.to_thread(resolve, model, variant)
        if checkpoint.is_demo:
            logger.warning("%s holds random weights: it speaks noise", checkpoint.folder)
        setup = Setup(
            checkpoint,
            policy,
            on_gpu=on_gpu,
            device=where,
            vocoder_devices=devices,
            vocoder_process=vocoder_process,
            vocoder_dtype=vocoder_type,
            t3={
                "mask_invalid_tokens": mask_invalid_tokens,
                **({} if max_batch_size is None else {"max_num_seqs": max_batch_size}),
                "max_model_len": max_model_len,
                "gpu_memory_utilization": gpu_memory_utilization,
                **engine_args,
            },
            mps=mps,
            budget=budget,
        )
        setup = await asyncio.to_thread(settled, setup, strict=strict_quantization)
        # What takes no time comes first, so that its errors do, too.
        voices = _voices(setup, voices_dir)
        await asyncio.to_thread(voices.check)
        tokenizer = await asyncio.to_thread(load_tokenizer, checkpoint)
        watermarker = await asyncio.to_thread(Watermarker) if watermark else None
        # Beside T3's loading, which leaves this process idle.
        warming = asyncio.ensure_future(asyncio.to_thread(_warm_up, watermarker, voices))
        try:
            loaded, stages = await load(setup, strict=strict_quantization)
        except BaseException:
            warming.cancel()
            await asyncio.gather(warming, return_exceptions=True)
            raise
        try:
            await warming
            if loaded.policy != setup.policy:
                voices = _voices(loaded, voices_dir)
            setup = loaded
            # A checkpoint that is quantised already says by which method.
            setup = replace(setup, policy=replace(setup.policy, t3=stages.t3.method))
            components = components_of(setup, await stages.t3.footprint(), stages.vocoder.footprints)
        except BaseException:
            await stages.end()
            raise
        log_applied(components)
        return cls(
            setup,
            components=components,
            stages=stages,
            voices=voices,
            frontend=TextFrontend(tokenizer, multilingual=checkpoint.variant.is_multilingual),
            watermarker=watermarker,
            schedule=schedule or ChunkSchedule(),
            max_chunk_length=max_chunk_length,
        )

    @property
    def languages(self) -> dict[str, str]:
        """Code to name of the languages this checkpoint speaks."""
        return dict(SUPPORTED_LANGUAGES) if self.checkpoint.variant.is_multilingual else {"en": "English"}

    @property
    def vocoder_stats(self) -> VocoderStats:
        """What the vocoder did so far."""
        return self._worker.stats

    @property
    def policy(self) -> Policy:
        """How the networks are quantised."""
        return self._setup.policy

    def quantization_info(self) -> dict[str, Any]:
        """What is quantised, and what that saves, in bytes, as measured when it was loaded.

        Returns:
            ``quantized``; ``strategy``, if it came by a name; ``method``, or ``mixed``; and ``components``: for each
            its ``method``, how many ``layers`` are quantised, ``bytes`` and ``bytes_before``.
        """
        policy = self.policy
        return {
            "quantized": policy.is_quantized,
            "strategy": policy.strategy,
            "method": policy.method,
            "components": self._components,
        }

    async def memory(self) -> dict[str, Any]:
        """Bytes: ``processes``, as each one's torch counts them on its device; ``components``; the ``budget``."""
        t3, vocoders = await self._t3.footprint(), self._worker.footprints
        processes = [{"name": "t3", **_kept(t3, "weights", "allocated", "peak", "reserved")}]
        if self._setup.host is GuestHost:  # torch counts for both
            processes[0] |= {"name": "t3 and vocoder", "weights": t3.weights + sum(_weights(each) for each in vocoders)}
        else:
            processes += [
                {"name": "vocoder", "weights": _weights(each), **_kept(each, "allocated", "peak", "reserved")}
                for each in vocoders
            ]
        plan = self._setup.plan
        components = {"t3": t3.linear, "t3_embeddings": t3.embeddings + t3.rest}
        for each in vocoders:
            components |= {name: components.get(name, 0) + size for name, size in each.weights.items()}
        return {
            "processes": processes,
            "components": components,
            "budget": plan.budget if plan else None,
            "items": {item.name: item.bytes for item in plan.items} if plan else {},
        }

    def health(self) -> Health:
        """The engine's state, without waiting for anything."""
        reason = self._worker.trouble
        if self._stopping:
            reason = "shutting down"
        elif self._t3.dead:
            reason = "the T3 engine has died"
        elif self._t3.stalled:
            reason = f"the T3 engine has made no step for {STALLED_SECONDS:g} s"
        dead = self._t3.dead or not self._worker.is_alive
        return Health(live=not dead, ready=reason is None, reason=reason, active=self._active)

    async def stream(self, request: SpeechRequest, listening: Listening = AT_ONCE) -> AsyncGenerator[Samples, None]:
        """Sound as it is made, the first once it will last: float32 arrays (n,) at 24 kHz.

        Closing the generator aborts the request everywhere.

        Args:
            listening: what becomes of the sound afterwards.
        """
        mark = WatermarkStream(self._watermarker) if self._watermarker else None
        if mark:
            listening = replace(listening, behind=listening.behind + mark.behind / listening.speed)
        spoken, playback = False, Playback(listening)
        with self._admitted(), self._streaming():
            texts = await self._prepared(request)
            # Who gives a seed wants the same sound in any company.
            alone = self._streams == 1 and request.options.seed is None
            async with (
                speaking(self._t3, texts, request, interval=STREAM_INTERVAL, alone=alone) as parts,
                aclosing(vocoded(self._worker, parts, self._schedule, playback, alone=alone)) as pieces,
            ):
                async for piece in pieces:
                    samples = await asyncio.to_thread(mark.feed, piece.numpy()) if mark else piece.numpy()
                    if len(samples):
                        spoken = True
                        yield samples
            if mark and len(samples := await asyncio.to_thread(mark.finish)):
                spoken = True
                yield samples
            if not spoken:
                raise EngineError(SILENCE)

    async def speak(self, request: SpeechRequest) -> Samples:
        """The whole sound: float32 (n,) at 24 kHz."""
        with self._admitted():
            texts = await self._prepared(request)
            async with speaking(self._t3, texts, request, interval=None) as parts:
                spoken = await together([vocoded_whole(self._worker, part) for part in parts])
            samples = np.concatenate([each.numpy() for each in spoken])
            if not len(samples):
                raise EngineError(SILENCE)
            return await asyncio.to_thread(self._watermarker, samples) if self._watermarker else samples

    async def speech_tokens(self, request: SpeechRequest, *, min_tokens: int = 0) -> list[int]:
        """T3's tokens for ``text`` as one utterance, without start and stop; ids that are no sound are kept.

        Args:
            min_tokens: do not stop before so many, as benchmarks want.
        """
        with self._admitted():
            text = await asyncio.to_thread(self._frontend.one, request.text, request.language)
            tokens = self._t3.tokens(text, request.voice, request.options, interval=None, min_tokens=min_tokens)
            async with aclosing(tokens):
                return [i async for new in tokens for i in new]

    async def synthesize(
        self, tokens: torch.Tensor, voice: VoiceFeatures, *, seed: int, diffusion_steps: int = 10
    ) -> Samples:
        """The vocoder alone: speech tokens (T,) int64 to sound (n,), without watermark. ``seed`` names its noise."""
        with self._admitted():
            state = open_utterance(voice, seed=seed, diffusion_steps=diffusion_steps)
            return (await self._worker.submit(Chunk(state, tokens, final=True, due=due_of_file()))).numpy()

    async def shutdown(self) -> None:
        """Refuses new requests, fails those under way, ends the processes. Safe to call twice."""
        if self._ending is None:
            self._stopping = True
            self._ending = asyncio.create_task(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        try:
            await self._t3.abort()
        finally:
            await self._stages.end()

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        state = self.health()
        if not state.ready:
            raise EngineDead(f"no new requests: {state.reason}")
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    @contextmanager
    def _streaming(self) -> Iterator[None]:
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    async def _prepared(self, request: SpeechRequest) -> list[list[int]]:
        """The text's parts, as T3's tokens."""
        return await asyncio.to_thread(
            self._frontend.prepare,
            request.text,
            request.language,
            max_characters=self._max_chunk_length,
            max_tokens=min(self._t3.max_text_tokens, MAX_TEXT_TOKENS),
        )


def _weights(vocoder: VocoderFootprint) -> int:
    return sum(vocoder.weights.values())


def _kept(footprint: Any, *names: str) -> dict[str, int]:
    return {name: getattr(footprint, name) for name in names}


def _voices(setup: Setup, folder: Path | None) -> VoiceLibrary:
    method = setup.policy.voice_encoder
    return VoiceLibrary(setup.checkpoint, folder=folder, device=setup.device, voice_encoder=method)


def _warm_up(watermarker: Watermarker | None, voices: VoiceLibrary) -> None:
    """Has behind it what the first requests would wait for: seconds of compiling and loading."""
    if watermarker is not None:
        watermarker.warm_up()
    voices.warm_up()
