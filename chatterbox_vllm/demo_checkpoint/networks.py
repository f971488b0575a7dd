"""Upstream's own networks, at upstream's sizes or small ones.

Upstream fixes most of its sizes inside constructors, so the small networks are put together from the same classes
under the same attribute names: their keys are upstream's by construction. Built under ``torch.device("meta")`` a
network costs no memory and tells a checkpoint's keys, shapes and dtypes, but cannot run: what it computes for itself,
such as rotary frequencies, is not there. Built plainly and filled by ``checkpoint.load_strict`` it is the reference
that tests compare with.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from chatterbox_vllm import upstream
from chatterbox_vllm.types import SAMPLE_RATE

Size = Literal["tiny", "full"]

ENGLISH_VOCABULARY: Final = 704
MULTILINGUAL_VOCABULARY: Final = 2454
HEAD_DIM: Final = 64
"""Width of one attention head everywhere but in S3Gen's encoder, which always has eight heads."""

_LLAMA: Final = "Llama_520M"
_SMALL_LLAMA: Final = "chatterbox_vllm_demo"


@dataclass(frozen=True)
class Sizes:
    """What differs between the real networks and the small ones; everything else is the same."""

    t3_width: int
    t3_layers: int
    t3_feed_forward: int
    encoder_width: int
    encoder_feed_forward: int
    estimator_width: int
    estimator_heads: int
    estimator_blocks: int
    estimator_mid_stages: int
    vocoder_width: int
    tokenizer_width: int
    tokenizer_layers: int
    prompt_tokens: int
    """Speech tokens of the built-in voice's recording, for S3Gen."""


SIZES: Final[dict[Size, Sizes]] = {
    "tiny": Sizes(128, 2, 256, 64, 128, 64, 2, 1, 2, 32, 128, 2, 25),
    "full": Sizes(1024, 30, 4096, 512, 2048, 256, 8, 4, 12, 512, 1280, 6, 250),
}


def t3(size: Size, *, multilingual: bool) -> nn.Module:
    """``chatterbox.models.t3.T3`` in evaluation mode, its weights as its constructor leaves them."""
    sizes = SIZES[size]
    hp = upstream.load("t3.modules.t3_config").T3Config(MULTILINGUAL_VOCABULARY if multilingual else ENGLISH_VOCABULARY)
    if size == "full":
        return _evaluated(upstream.load("t3").T3(hp))
    # T3 looks its backbone up by name, so the small one gets a name of its own beside upstream's.
    configs = upstream.load("t3.llama_configs").LLAMA_CONFIGS
    heads = sizes.t3_width // HEAD_DIM
    configs[_SMALL_LLAMA] = configs[_LLAMA] | {
        "hidden_size": sizes.t3_width,
        "num_hidden_layers": sizes.t3_layers,
        "intermediate_size": sizes.t3_feed_forward,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    hp.llama_config_name = _SMALL_LLAMA
    network = upstream.load("t3").T3(hp)
    network.cond_enc.perceiver = upstream.load("t3.modules.perceiver").Perceiver(
        pre_attention_query_size=sizes.t3_width, embedding_dim=sizes.t3_width
    )
    return _evaluated(network)


def voice_encoder() -> nn.Module:
    """``chatterbox.models.voice_encoder.VoiceEncoder``, which has one size."""
    return _evaluated(upstream.load("voice_encoder").VoiceEncoder())


def s3gen(size: Size) -> nn.Module:
    """``chatterbox.models.s3gen.S3Gen`` in evaluation mode, its weights as its constructor leaves them."""
    with warnings.catch_warnings():
        # diffusers announces the end of a class that upstream's layers are made of
        warnings.filterwarnings("ignore", ".*LoRACompatibleLinear", FutureWarning)
        return _evaluated(upstream.load("s3gen").S3Gen() if size == "full" else _small_s3gen(SIZES[size]))


def _small_s3gen(sizes: Sizes) -> Any:
    kind = upstream.load("s3gen").S3Gen
    network = kind.__new__(kind)  # its constructor would make the large parts
    nn.Module.__init__(network)
    network.tokenizer = _speech_tokenizer(sizes)
    network.mel_extractor = upstream.load("s3gen.utils.mel").mel_spectrogram
    network.speaker_encoder = upstream.load("s3gen.xvector").CAMPPlus(memory_efficient=False)
    network.meanflow = False
    network.flow = upstream.load("s3gen.flow").CausalMaskedDiffWithXvec(
        input_size=sizes.encoder_width, encoder=_encoder(sizes), decoder=_decoder(sizes)
    )
    network.resamplers = {}
    network.mel2wav = _vocoder(sizes)
    network.register_buffer("trim_fade", _trim_fade(), persistent=False)
    network.estimator_dtype = "fp32"
    return network


def _evaluated(network: Any) -> nn.Module:
    evaluated: nn.Module = network.eval().requires_grad_(False)
    return evaluated


def _speech_tokenizer(sizes: Sizes) -> nn.Module:
    model = upstream.import_module("s3tokenizer.model_v2")
    with torch.device("meta"):  # the constructor ignores the sizes it is given
        tokenizer = upstream.load("s3tokenizer").S3Tokenizer()
    tokenizer.encoder = model.AudioEncoderV2(
        n_mels=128,
        n_state=sizes.tokenizer_width,
        n_head=sizes.tokenizer_width // HEAD_DIM,
        n_layer=sizes.tokenizer_layers,
        stride=2,
        use_sdpa=False,
    )
    tokenizer.quantizer = model.FSQVectorQuantization(sizes.tokenizer_width, 3**8)
    tokenizer.window = torch.hann_window(tokenizer.n_fft)
    checked: nn.Module = tokenizer
    return checked


def _encoder(sizes: Sizes) -> nn.Module:
    module = upstream.load("s3gen.transformer.upsample_encoder")
    encoder: Any = module.UpsampleConformerEncoder(
        input_size=sizes.encoder_width,
        output_size=sizes.encoder_width,
        attention_heads=8,
        linear_units=sizes.encoder_feed_forward,
        num_blocks=6,
        input_layer="linear",
        pos_enc_layer_type="rel_pos_espnet",
        selfattention_layer_type="rel_selfattn",
        use_cnn_module=False,
        macaron_style=False,
    )
    # The constructor makes these two 512 wide whatever it is told.
    encoder.pre_lookahead_layer = module.PreLookaheadLayer(sizes.encoder_width, pre_lookahead_len=3)
    encoder.up_layer = module.Upsample1D(sizes.encoder_width, sizes.encoder_width, stride=2)
    checked: nn.Module = encoder
    return checked


def _decoder(sizes: Sizes) -> nn.Module:
    estimator = upstream.load("s3gen.decoder").ConditionalDecoder(
        channels=[sizes.estimator_width],
        num_heads=sizes.estimator_heads,
        attention_head_dim=HEAD_DIM,
        n_blocks=sizes.estimator_blocks,
        num_mid_blocks=sizes.estimator_mid_stages,
    )
    decoder: nn.Module = upstream.load("s3gen.flow_matching").CausalConditionalCFM(estimator=estimator)
    return decoder


def _vocoder(sizes: Sizes) -> nn.Module:
    f0_predictor = upstream.load("s3gen.f0_predictor").ConvRNNF0Predictor(cond_channels=sizes.vocoder_width)
    vocoder: nn.Module = upstream.load("s3gen.hifigan").HiFTGenerator(
        base_channels=sizes.vocoder_width,
        sampling_rate=SAMPLE_RATE,
        upsample_rates=[8, 5, 3],
        upsample_kernel_sizes=[16, 11, 7],
        source_resblock_kernel_sizes=[7, 7, 11],
        source_resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5], [1, 3, 5]],
        f0_predictor=f0_predictor,
    )
    return vocoder


def _trim_fade() -> Tensor:
    """20 ms of silence, then 20 ms of a rising cosine, as in ``S3Token2Wav``."""
    length = SAMPLE_RATE // 50
    fade = torch.zeros(2 * length)
    fade[length:] = (torch.cos(torch.linspace(torch.pi, 0, length)) + 1) / 2
    return fade
