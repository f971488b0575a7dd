"""T3 in plain torch: it tells what vLLM does not, which is what it would say next after each token.

``convert`` has it speak, too, and listens to its layers.

Mirrors the loop of ``chatterbox.models.t3.T3.inference``: transformers' Llama over two rows, with and without the text.
It computes in float32, so that of two methods nothing but the method differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from chatterbox_vllm.checkpoint import load_strict, load_tensors
from chatterbox_vllm.evaluate.methods import quantize
from chatterbox_vllm.quantization.packing import Stored
from chatterbox_vllm.t3.conditioning import VoiceConditioner
from chatterbox_vllm.t3.config import T3Config
from chatterbox_vllm.t3.conversion import linear_layers
from chatterbox_vllm.t3.folder import infer_config
from chatterbox_vllm.types import (
    SPEECH_VOCABULARY,
    SPOKEN_TOKENS,
    START_SPEECH,
    START_TEXT,
    STOP_SPEECH,
    STOP_TEXT,
    SpeechOptions,
    VoiceFeatures,
)

_BACKBONE: Final = "tfmr."
_SAYABLE: Final = [*range(SPOKEN_TOKENS), STOP_SPEECH]
"""What T3 may sample: the sounds, and the end."""


def read_t3(path: Path) -> dict[str, Tensor]:
    """A T3 checkpoint's tensors; what is quantised in the file is decoded.

    Raises:
        CheckpointError: it is none.
    """
    config, stored, tensors = infer_config(path), Stored.of(path), load_tensors(path)
    layers = linear_layers(config)
    decoded = {f"{stem}.weight": stored.decode(stem, tensors) for stem in layers}
    parts = {name for stem, size in layers.items() for name in stored.shapes(stem, *size)}
    return {name: tensor for name, tensor in tensors.items() if name not in parts} | decoded


class PlainT3:
    """T3 on one device.

    Args:
        tensors: ``read_t3``'s; those of layers that are not quantised are shared, not copied.
        path: where they come from; its header tells the sizes.
        method: of the Llama's linear layers.

    Attributes:
        llama: float32, on the device; its layers may be listened to.

    Raises:
        CheckpointError: a tensor of the Llama is missing, unexpected or misshapen.
        ConfigurationError, MissingDependency: see ``methods.quantize``.
    """

    def __init__(self, tensors: Mapping[str, Tensor], path: Path, method: str, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self._conditioner = VoiceConditioner(tensors)
        names = ("text_emb", "text_pos_emb.emb", "speech_emb", "speech_pos_emb.emb", "speech_head")
        self._tables = {name: tensors[f"{name}.weight"].to(self._device, torch.float32) for name in names}
        self._unsayable = torch.ones(SPEECH_VOCABULARY, dtype=torch.bool, device=self._device)
        self._unsayable[_SAYABLE] = False
        self.llama = _llama(tensors, path)
        quantize(self.llama.layers, method)
        self.llama.to(self._device)

    @torch.inference_mode()
    def speak(
        self, text: Sequence[int], voice: VoiceFeatures, options: SpeechOptions, *, can_end: bool = True
    ) -> list[int]:
        """Samples an utterance as upstream does, but for ids that are no sound, which are left out.

        Args:
            text: ids without start and stop.
            options: without a seed, the seed is 0.
            can_end: False never samples the stop token, so ``max_tokens`` sounds are spoken.

        Returns:
            Speech tokens; the last one is the stop token, unless ``max_tokens`` came first.
        """
        generator = torch.Generator().manual_seed(options.seed or 0)
        cache = DynamicCache(config=self.llama.config)
        rows, said = self._prompt(text, voice, options.exaggeration), [START_SPEECH]
        while len(said) <= options.max_tokens and said[-1] != STOP_SPEECH:
            logits = self._logits(rows, options.cfg_weight, 1, cache).cpu()
            if not can_end:
                logits[:, STOP_SPEECH] = -torch.inf
            said.append(_sampled(torch.tensor([said]), logits, options, generator))
            rows = self._speech(said[-1:], len(said) - 1)
        return said[1:]

    @torch.inference_mode()
    def log_probabilities(
        self, text: Sequence[int], voice: VoiceFeatures, options: SpeechOptions, tokens: Sequence[int]
    ) -> Tensor:
        """What it would have said in place of each of ``tokens``, after those before it.

        Args:
            text: ids without start and stop.
            options: its exaggeration and guidance weight count; temperature and penalties do not.
            tokens: n speech tokens.

        Returns:
            (n, 6562) float64 logarithms of the probabilities of each sound and, last, of the end; guided.
        """
        rows = torch.cat([self._prompt(text, voice, options.exaggeration), self._speech(tokens[:-1], 1)], dim=1)
        return self._logits(rows, options.cfg_weight, len(tokens))[:, _SAYABLE].double().log_softmax(-1)

    def _prompt(self, text: Sequence[int], voice: VoiceFeatures, exaggeration: float) -> Tensor:
        """(2, positions, H): the conditional row, and the one whose text tokens are zeros."""
        ids = torch.tensor([START_TEXT, *text, STOP_TEXT], device=self._device)
        positions = self._tables["text_pos_emb.emb"][: len(ids)]
        words = torch.stack([self._tables["text_emb"][ids] + positions, positions])
        prefix = self._conditioner.prefix(voice, exaggeration).to(self._device)
        # upstream embeds the start of speech twice, both times at speech position 0
        starts = torch.cat([self._speech([START_SPEECH], 0)] * 2, dim=1)
        return torch.cat([prefix.expand(2, -1, -1), words, starts], dim=1)

    def _speech(self, tokens: Sequence[int], first: int) -> Tensor:
        """(2, n, H) of tokens whose first one is at speech position ``first``."""
        ids = torch.tensor(tokens, dtype=torch.int64, device=self._device)
        positions = self._tables["speech_pos_emb.emb"][first : first + len(tokens)]
        return (self._tables["speech_emb"][ids] + positions).expand(2, -1, -1)

    def _logits(self, rows: Tensor, cfg_weight: float, last: int, cache: DynamicCache | None = None) -> Tensor:
        """(last, vocabulary) guided logits of the last positions; ids that are no sound are -inf."""
        hidden = self.llama(inputs_embeds=rows, past_key_values=cache, use_cache=cache is not None).last_hidden_state
        conditional, unconditional = hidden[:, -last:]
        guided = conditional + cfg_weight * (conditional - unconditional)
        return F.linear(guided, self._tables["speech_head"]).masked_fill(self._unsayable, float("-inf"))


def _sampled(said: Tensor, logits: Tensor, options: SpeechOptions, generator: torch.Generator) -> int:
    """One of (1, vocabulary) ``logits``, after (1, n) tokens: upstream's sampler, in its order."""
    penalised: Tensor = RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty))(said, logits)
    if options.temperature == 0.0:
        return int(penalised.argmax())
    narrowed: Tensor = TemperatureLogitsWarper(float(options.temperature))(said, penalised)
    narrowed = MinPLogitsWarper(options.min_p)(said, narrowed)
    if options.top_p < 1.0:  # 1 would sort them all and leave out none
        narrowed = TopPLogitsWarper(options.top_p)(said, narrowed)
    return int(torch.multinomial(narrowed.softmax(-1), 1, generator=generator))


def _llama(tensors: Mapping[str, Tensor], path: Path) -> LlamaModel:
    config = _llama_config(infer_config(path), vocabulary=len(tensors[f"{_BACKBONE}embed_tokens.weight"]))
    with torch.device("meta"):  # upstream's constructor would draw half a billion weights
        llama = LlamaModel(config).eval().requires_grad_(False)
    own = {key.removeprefix(_BACKBONE): tensor.float() for key, tensor in tensors.items() if key.startswith(_BACKBONE)}
    load_strict(llama, own, file=path)
    llama.rotary_emb = LlamaRotaryEmbedding(config)  # it has no weights to be loaded, but a table
    return llama


def _llama_config(config: T3Config, *, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=dict(config.rope_parameters),
        attn_implementation="sdpa",
    )
