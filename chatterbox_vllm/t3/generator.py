"""Text ids in, speech tokens out: T3 behind vLLM's asynchronous engine."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import logging
import time
import weakref
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from chatterbox_vllm.errors import EngineDead, EngineError, InvalidRequest, TooLarge
from chatterbox_vllm.t3.conditioning import VoiceConditioner
from chatterbox_vllm.t3.config import T3Config
from chatterbox_vllm.t3.footprint import T3Footprint
from chatterbox_vllm.t3.positions import OVERHEAD, weight_steps
from chatterbox_vllm.t3.processor import engine_input
from chatterbox_vllm.t3.prompt import prompt_tokens, sampling_params
from chatterbox_vllm.types import STOP_SPEECH, SpeechOptions, VoiceFeatures

logger = logging.getLogger(__name__)
SHUTDOWN_SECONDS = 10.0
STALLED_SECONDS = 120.0 if current_platform.is_cpu() else 10.0
"""Without a step, though there is work, after which T3 counts as stalled. On a CPU, one step may take long."""
_ANSWER_SECONDS = 30.0
"""In which a worker answers; it does so between two steps."""


class T3Generator:
    """Speaks T3's tokens for many requests at once; vLLM batches them.

    Args:
        llm: an engine of ``ChatterboxT3``.
        config: the sizes it was built with.
        conditioner: computes the voice prefixes.
        method: by which the linear layers are quantised.
    """

    def __init__(self, llm: AsyncLLM, config: T3Config, conditioner: VoiceConditioner, *, method: str) -> None:
        self.method = method
        self._llm = llm
        self._config = config
        self._conditioner = conditioner
        self._closed = False
        self._names = (f"t3-{i}" for i in itertools.count())
        self._stepped = time.monotonic()
        self._processed = llm.output_processor.process_outputs
        llm.output_processor.process_outputs = self._step
        self.max_model_len: int = llm.vllm_config.model_config.max_model_len
        atexit.register(_end, weakref.ref(self))

    @property
    def max_text_tokens(self) -> int:
        """Text ids of one utterance for which there is room to be spoken: speech takes about three tokens an id."""
        return (self.max_model_len - OVERHEAD) // 4

    @property
    def text_vocabulary(self) -> int:
        return self._config.text_vocabulary

    @property
    def dead(self) -> bool:
        return self._closed or self._llm.errored

    def _step(self, *outputs: Any, **more: Any) -> Any:
        """What vLLM does with each step's outputs. Whole files come with the last one, so they tell of no progress."""
        self._stepped = time.monotonic()
        return self._processed(*outputs, **more)

    def _expect_steps(self) -> None:
        """Notes when work begins after a time without."""
        if not self.unfinished:
            self._stepped = time.monotonic()

    @property
    def stalled(self) -> bool:
        """There is work, and for ``STALLED_SECONDS`` there was no step."""
        if not self.unfinished:
            return False
        return time.monotonic() - self._stepped > STALLED_SECONDS

    @property
    def unfinished(self) -> int:
        """Requests vLLM still works on; 0 when nothing leaked."""
        return 0 if self._closed else self._llm.output_processor.get_num_unfinished_requests()

    async def leaked(self) -> bool:
        """Whether vLLM holds KV blocks though no request is under way; only meaningful while none is."""
        return not await self._llm.reset_prefix_cache()

    async def call(self, method: str, *arguments: str) -> list[Any]:
        """What a method of the worker extension answers, in each of the engine's processes.

        Raises:
            EngineDead: the engine has died.
            EngineError: it does not answer.
        """
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await self._llm.collective_rpc(method, args=arguments)
        except EngineDeadError as error:
            raise EngineDead("the T3 engine has died") from error
        except TimeoutError as error:
            raise EngineError(f"the T3 engine has not answered for {_ANSWER_SECONDS:g} s") from error

    async def footprint(self) -> T3Footprint:
        """What T3 takes at this moment, measured in the engine's processes.

        Raises:
            EngineDead, EngineError: see ``call``.
        """
        ranks = await self.call("t3_footprint")
        first, *others = (T3Footprint(**rank) for rank in ranks)
        return sum(others, first)

    async def connect(self) -> None:
        """To be awaited before the first request, which else waits for ever for an engine that dies meanwhile."""
        await self._llm.get_supported_tasks()
        await self.call("leave_signals")

    async def tokens(
        self,
        text: Sequence[int],
        voice: VoiceFeatures,
        options: SpeechOptions,
        *,
        interval: int | None,
        min_tokens: int = 0,
    ) -> AsyncGenerator[list[int], None]:
        """Speech tokens, without start and stop. Closing or cancelling the generator aborts the request in vLLM.

        Args:
            text: ids without start and stop.
            interval: tokens between deliveries, of which the first one is a single token; None: all at the end.
            min_tokens: do not stop before so many tokens.

        Raises:
            TooLarge: ``text`` leaves no room to speak in ``max_model_len``.
            EngineDead, EngineError: the engine failed.
        """
        tokens = prompt_tokens(text, self._config.placeholder_id)
        room = self.max_model_len - len(tokens)
        if room < 1:
            raise TooLarge(
                f"text of {len(text)} tokens leaves no room for speech in max_model_len={self.max_model_len}; "
                f"shorten it to {self.max_text_tokens} tokens or raise max_model_len",
                param="text",
            )
        prefix = await asyncio.to_thread(self._conditioner.prefix, voice, options.exaggeration)
        if self._closed:
            raise EngineDead("the T3 engine was shut down")
        key = f"{voice.digest}:{options.exaggeration!r}"
        prompt = engine_input(tokens, prefix, weight_steps(options.cfg_weight), key)
        params = sampling_params(options, max_tokens=min(options.max_tokens, room), interval=interval)
        params.min_tokens = min(min_tokens, params.max_tokens)
        self._expect_steps()
        outputs = self._llm.generate(prompt, params, next(self._names))
        try:
            async for output in outputs:
                spoken = list(output.outputs[0].token_ids)
                if spoken and spoken[-1] == STOP_SPEECH:
                    spoken.pop()
                if spoken:
                    yield spoken
                if output.finished:
                    self._check_end(output.outputs[0].finish_reason, room, options)
        except EngineDeadError as error:
            raise EngineDead("the T3 engine has died") from error
        except EngineGenerateError as error:
            raise EngineError(f"the T3 engine failed on this request: {error.__cause__}") from error
        except VLLMClientError as error:
            raise InvalidRequest(str(error), param="text") from error
        finally:
            await outputs.aclose()

    def _check_end(self, reason: str | None, room: int, options: SpeechOptions) -> None:
        """Speech that vLLM broke off must not pass for whole."""
        if reason == "length":
            if room < options.max_tokens:
                logger.warning("speech was cut after %d tokens: max_model_len=%d", room, self.max_model_len)
        elif reason != "stop":
            raise EngineDead(f"the T3 engine broke off ({reason}); it is shutting down or has failed")

    async def abort(self) -> None:
        """Breaks off what is under way, which fails; else the engine's processes would finish it before they end."""
        with suppress(EngineDeadError):
            await self._llm.abort(list(self._llm.output_processor.request_states), internal=True)

    def shutdown(self, *, at_exit: bool = False) -> None:
        """Ends the engine's processes, which get some seconds to do so by themselves. Safe to call twice.

        Args:
            at_exit: nobody waits any more for requests that are under way.
        """
        if self._closed:
            return
        self._closed = True
        handler = self._llm.output_handler
        idle = at_exit or not self._llm.output_processor.has_unfinished_requests()
        if handler is not None and idle and not handler.done():
            # It would report the end as an engine's death. With requests under way it has to: they wait for it.
            handler.get_loop().call_soon_threadsafe(handler.cancel)
        self._llm.shutdown(timeout=SHUTDOWN_SECONDS)
        del self._llm  # at the interpreter's exit its __del__ fails


def _end(generator: weakref.ref[T3Generator]) -> None:
    """vLLM's processes outlive a program that forgot them, and complain."""
    if (alive := generator()) is not None:
        alive.shutdown(at_exit=True)
