"""Random weights under which the networks behave like speech networks, although they speak noise.

Plain initialisation would not do: activations would grow or vanish over 30 layers, T3 would never end an utterance,
the pitch would be zero and the waveform clipped. ``RULES`` gives each tensor, by name, a distribution that keeps
activations near unit variance; the few that shape the sound or the utterance's length say so.

A tensor's values depend on the seed, its file and its name alone, so files can be written tensor by tensor.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from typing import Final

import torch
from torch import Generator, Tensor

from chatterbox_vllm.types import SPOKEN_TOKENS, STOP_SPEECH

Shape = tuple[int, ...]
Fill = Callable[[Shape, Generator], Tensor]


def draw(file: str, name: str, like: Tensor, seed: int) -> Tensor:
    """The tensor ``name`` of ``file``: ``like``'s shape and dtype (``like`` may be on the meta device)."""
    digest = hashlib.sha256(f"{seed}/{file}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    fill = next(fill for pattern, fill in RULES if re.search(pattern, name))
    return fill(tuple(like.shape), generator).to(like.dtype).contiguous()


def _around(mean: float, deviation: float) -> Fill:
    return lambda shape, generator: torch.randn(shape, generator=generator).mul_(deviation).add_(mean)


def _between(low: float, high: float) -> Fill:
    return lambda shape, generator: torch.rand(shape, generator=generator).mul_(high - low).add_(low)


def _projection(gain: float) -> Fill:
    """Weights that turn inputs of unit variance into outputs of standard deviation ``gain``."""
    return lambda shape, generator: torch.randn(shape, generator=generator).mul_(gain / math.sqrt(math.prod(shape[1:])))


def _norm_or_projection(shape: Shape, generator: Generator) -> Tensor:
    return _around(1.0, 0.05)(shape, generator) if len(shape) == 1 else _projection(1.0)(shape, generator)


def _residual(gain: float) -> Fill:
    """A projection whose output is added to the residual stream: less of it where wider, that is deeper, networks."""
    return lambda shape, generator: _projection(gain * math.sqrt(_TINY_WIDTH / shape[0]))(shape, generator)


def _mel_filters(shape: Shape, _: Generator) -> Tensor:
    import librosa

    return torch.from_numpy(librosa.filters.mel(sr=16_000, n_fft=400, n_mels=shape[0]))


def _stop_direction(width: int) -> Tensor:
    """(width,) of +1 and -1: what the hidden state leans towards as an utterance grows long."""
    return 1.0 - 2.0 * (torch.arange(width) % 2)


def _speech_positions(shape: Shape, generator: Generator) -> Tensor:
    """Positions that say how long the utterance is, for ``_speech_head`` to end it."""
    late = ((torch.arange(shape[0]) - _SHORTEST_TOKENS) / _LATER_TOKENS).clamp(0.0, 2.0)
    lean = late * (_STOP_LEAN / math.sqrt(shape[1]))
    return torch.randn(shape, generator=generator).mul_(0.3) + lean[:, None] * _stop_direction(shape[1])


def _speech_head(shape: Shape, generator: Generator) -> Tensor:
    """Ids that stand for no sound are rare, and the stop token's chance grows with the utterance."""
    head = torch.randn(shape, generator=generator).mul_(_LOGIT_DEVIATION / math.sqrt(shape[1]))
    head[SPOKEN_TOKENS:] *= 0.5
    head[STOP_SPEECH] = _stop_direction(shape[1]) * (_STOP_DEVIATION / math.sqrt(shape[1]))
    return head


def _before_scaling(shape: Shape, generator: Generator) -> Tensor:
    """A norm's weights where the encoder then multiplies by the square root of its width."""
    return torch.randn(shape, generator=generator).mul_(0.05).add_(1.0) / math.sqrt(shape[0])


def _blind_to_level(shape: Shape, generator: Generator) -> Tensor:
    """Filters over log-mels that sum to zero: the level of about -4 would drown what changes."""
    filters = torch.randn(shape, generator=generator)
    return filters - filters.mean(dim=tuple(range(1, len(shape))), keepdim=True)


def _pitch_weights(shape: Shape, generator: Generator) -> Tensor:
    """Hertz around the classifier's bias: the weights sum to zero, since the features' mean is not zero."""
    weights = _projection(_PITCH_DEVIATION)(shape, generator)
    return weights - weights.mean()


def _spectrum_bias(shape: Shape, generator: Generator) -> Tensor:
    """HiFT's last bias: log-magnitudes of a quiet, falling spectrum, then phases."""
    bias = torch.randn(shape, generator=generator).mul_(0.1)
    bins = shape[0] // 2
    bias[:bins] += torch.linspace(_LOUDEST_BIN, _LOUDEST_BIN - 3.0, bins)
    return bias


_TINY_WIDTH: Final = 128
_SHORTEST_TOKENS: Final = 75
_LATER_TOKENS: Final = 100
_STOP_LEAN: Final = 9.0
_STOP_DEVIATION: Final = 1.5
_LOGIT_DEVIATION: Final = 2.0
_LOUDEST_BIN: Final = 0.8
_PITCH_DEVIATION: Final = 200.0

RULES: Final[list[tuple[str, Fill]]] = [
    # Buffers that are not learned.
    (r"num_batches_tracked$", lambda shape, _: torch.full(shape, 1000)),
    (r"^tokenizer\._mel_filters$", _mel_filters),
    (r"^tokenizer\.window$", lambda shape, _: torch.hann_window(shape[0])),
    # T3.
    (r"^speech_head\.weight$", _speech_head),
    (r"^speech_pos_emb\.", _speech_positions),
    (r"^text_pos_emb\.", _around(0.0, 0.3)),
    (r"^(text_emb|speech_emb|tfmr\.embed_tokens)\.", _around(0.0, 1.0)),
    (r"^cond_enc\.perceiver\.pre_attention_query$", _around(0.0, 1.0)),
    (r"^cond_enc\.(spkr_enc|emotion_adv_fc)\.weight$", _around(0.0, 1.0)),  # inputs of unit length, not unit variance
    (r"\.(q_proj|k_proj)\.weight$", _projection(1.5)),  # attention that prefers some positions
    (r"\.o_proj\.weight$", _residual(1.0)),
    (r"\.down_proj\.weight$", _residual(1.5)),
    # VoiceEncoder: its inputs are mel powers, mostly far below 1.
    (r"^similarity_weight$", _around(10.0, 0.0)),
    (r"^similarity_bias$", _around(-5.0, 0.0)),
    (r"^lstm\.weight_ih_l0$", _projection(4.0)),
    # S3Gen, enrolment.
    (r"^tokenizer\.quantizer\..*weight$", _projection(1.0)),
    (r"^speaker_encoder\..*running_mean$", _around(0.0, 0.1)),
    (r"^speaker_encoder\..*running_var$", _between(0.5, 1.5)),
    # S3Gen, flow: attention adds little, so that speech heard so far hardly changes as more of it becomes known.
    (r"^flow\.input_embedding\.", _around(0.0, 1.0)),
    (r"^flow\.spk_embed_affine_layer\.weight$", _around(0.0, 1.0)),  # its input has unit length
    (r"^flow\.encoder\.(up_)?embed\.out\.1\.weight$", _before_scaling),
    (r"\.pos_bias_[uv]$", _around(0.0, 0.1)),
    (r"^flow\..*\.(linear_out|to_out\.0)\.weight$", _projection(0.3)),
    (r"^flow\.decoder\.estimator\.final_proj\.weight$", _projection(2.5)),
    (r"^flow\.decoder\.estimator\.final_proj\.bias$", _around(-4.0, 0.3)),  # log-mel of speech lies about here
    # S3Gen, HiFT.
    (r"^mel2wav\.conv_post\.bias$", _spectrum_bias),
    (r"^mel2wav\.conv_post\..*original0$", _around(0.4, 0.02)),
    (r"^mel2wav\.(conv_pre|f0_predictor\.condnet\.0)\..*original0$", _around(0.45, 0.02)),
    (r"^mel2wav\.(conv_pre|f0_predictor\.condnet\.0)\..*original1$", _blind_to_level),
    (r"^mel2wav\.f0_predictor\.classifier\.bias$", _around(160.0, 0.0)),  # Hz
    (r"^mel2wav\.f0_predictor\.classifier\.weight$", _pitch_weights),
    (r"^mel2wav\.source_downs\..*weight$", _projection(3.0)),  # the source's amplitude is about 0.1
    (r"^mel2wav\.ups\..*original0$", _around(1.5, 0.05)),
    (r"^mel2wav\.(source_)?resblocks\..*original0$", _around(0.5, 0.02)),  # each adds to what it is given
    (r"^mel2wav\..*original0$", _around(1.0, 0.05)),
    (r"^mel2wav\..*original1$", _around(0.0, 1.0)),
    (r"\.alpha$", _between(0.5, 1.5)),
    # Everything else: norms near the identity, small biases, projections that keep the variance.
    (r"bias(_[ih]h_l\d)?$", _around(0.0, 0.05)),
    (r"weight(_[ih]h_l\d)?$", _norm_or_projection),
]
