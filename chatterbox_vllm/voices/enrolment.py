"""From a recording to voice features: upstream's ``ChatterboxTTS.prepare_conditionals``, number for number.

Three networks serve nothing else (the speech tokenizer, CAMPPlus and the VoiceEncoder, 530 MB in all), so they are
loaded at the first recording, without the rest of S3Gen. On a GPU that is short of memory they wait for the next
recording in the machine's; and they can be dropped altogether.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import librosa
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chatterbox_vllm import upstream
from chatterbox_vllm.checkpoint import load_strict, load_tensors
from chatterbox_vllm.errors import CheckpointError, InvalidAudio
from chatterbox_vllm.quantization.matrices import quantize_linears
from chatterbox_vllm.quantization.policy import Method
from chatterbox_vllm.types import SAMPLE_RATE, VoiceFeatures
from chatterbox_vllm.voices.features import MAX_T3_PROMPT, checked, matched

if TYPE_CHECKING:
    from chatterbox_vllm.audio.decode import Samples, Waveform
    from chatterbox_vllm.checkpoint import Checkpoint

S3_RATE: Final = 16_000
SPARE_BYTES: Final = 4 * 2**30
"""A GPU with less free memory than this is short of it."""
PROMPT_SECONDS: Final = 10
T3_PROMPT_SECONDS: Final = 6
_VOCODER_PARTS: Final = ("flow.", "mel2wav.")
_HEAD_WIDTH: Final = 64
"""Of the speech tokenizer's attention, whatever its size: its rotary table is made for it."""
_DERIVED: Final = ("_mel_filters", "window")


@dataclass(frozen=True)
class _Networks:
    """Upstream's modules, in eval mode."""

    tokenizer: Any
    speaker_encoder: Any
    voice_encoder: Any

    def to(self, device: str) -> None:
        for module in (self.tokenizer, self.speaker_encoder, self.voice_encoder):
            module.to(device)


class Enroller:
    """Enrols voices with one checkpoint's networks. Thread-safe: one recording at a time.

    Args:
        device: where the networks run. 10 s of sound take about 1.6 s of one CPU core.
        voice_encoder: how the VoiceEncoder's projection is quantised, ``none``, ``bnb-4bit``, ``bnb-8bit`` or ``int8``.
            It is its only linear layer, 0.25 MB; the LSTM before it, 5.4 MB, stays as it is.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str = "cpu", voice_encoder: str = Method.NONE) -> None:
        self._checkpoint, self._device, self._voice_encoder = checkpoint, device, voice_encoder
        self._networks: _Networks | None = None
        self._lock = threading.Lock()

    def enrol(self, waveform: Waveform, *, param: str = "audio_prompt_path") -> VoiceFeatures:
        """The features of the voice in ``waveform``, which must hold half a second or more.

        Raises:
            InvalidAudio: the networks find no voice in it.
            CheckpointError: a file of the checkpoint does not fit the networks.
            MissingDependency: ``bnb-4bit`` without bitsandbytes.
        """
        with self._lock:
            networks = self._networks = self._networks or self._load()
            networks.to(self._device)
            try:
                with torch.inference_mode():
                    features = _enrol(networks, waveform, self._device)
            finally:
                if is_short_of_memory(self._device):
                    networks.to("cpu")
                    torch.cuda.empty_cache()
        try:
            return checked(features)
        except ValueError as error:
            raise InvalidAudio(f"{param}: no voice can be made of this recording: {error}", param=param) from error

    def unload(self) -> None:
        """Drops the networks; the next recording loads them again."""
        with self._lock:
            self._networks = None

    def identity(self) -> str:
        """A hash of the sizes and of the first and last MiB of the files: who shares it is taken to enrol alike."""
        sha = hashlib.sha256(b"" if self._voice_encoder == Method.NONE else self._voice_encoder.encode())
        for path in (self._checkpoint.s3gen, self._checkpoint.voice_encoder):
            size = path.stat().st_size
            with path.open("rb") as file:
                sha.update(f"{size}:".encode() + file.read(2**20))
                file.seek(max(0, size - 2**20))
                sha.update(file.read())
        return sha.hexdigest()

    def check(self) -> None:
        """Looks for the networks in the headers of the files, where they have one (safetensors).

        Raises:
            CheckpointError: one is not there, or the file is no safetensors.
        """
        _check_parts(self._checkpoint.s3gen, ("tokenizer.", "speaker_encoder."))
        _check_parts(self._checkpoint.voice_encoder, ("lstm.", "proj."))

    def _load(self) -> _Networks:
        tokenizer, speaker_encoder = load_enrolment_parts(self._checkpoint.s3gen)
        voice_encoder = load_voice_encoder(self._checkpoint.voice_encoder)
        networks = _Networks(*(module.float().eval() for module in (tokenizer, speaker_encoder, voice_encoder)))
        quantize_linears(networks.voice_encoder, self._voice_encoder)
        return networks


def is_short_of_memory(device: str) -> bool:
    """Whether ``device`` is a GPU whose free memory others may soon want: a batch of the vocoder takes gigabytes."""
    if torch.device(device).type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return free < SPARE_BYTES


def _check_parts(file: Path, prefixes: tuple[str, ...]) -> None:
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, framework="pt") as content:
            keys = list(content.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors ({error}); get it anew") from error
    if missing := [prefix for prefix in prefixes if not any(key.startswith(prefix) for key in keys)]:
        raise CheckpointError(f"{file} lacks {', '.join(f'{prefix}*' for prefix in missing)}, for enrolling voices")


def warm_up() -> None:
    """Has numba compile librosa's functions, which costs the first recording of a process 15 s otherwise."""
    hum = np.sin(np.arange(S3_RATE, dtype=np.float32) * 0.05)
    trimmed, _ = librosa.effects.trim(hum, top_db=20)
    melspec = upstream.load("voice_encoder.melspec")
    melspec.melspectrogram(trimmed, upstream.load("voice_encoder").VoiceEncConfig())
    librosa.resample(hum, orig_sr=SAMPLE_RATE, target_sr=S3_RATE)


def _enrol(networks: _Networks, waveform: Waveform, device: str) -> VoiceFeatures:
    sound = _resampled(waveform.samples, waveform.rate, SAMPLE_RATE)
    sound16 = _resampled(sound, SAMPLE_RATE, S3_RATE)
    tokens, mel, x_vector = _embed_reference(networks, sound[: PROMPT_SECONDS * SAMPLE_RATE], device)
    t3_tokens, _ = networks.tokenizer([sound16[: T3_PROMPT_SECONDS * S3_RATE]], max_len=MAX_T3_PROMPT)
    speaker = networks.voice_encoder.embeds_from_wavs([sound16], sample_rate=S3_RATE)
    prompt_tokens, prompt_mel = matched(tokens, mel)
    return VoiceFeatures(
        speaker_embedding=_kept(torch.from_numpy(speaker)[0]),
        t3_prompt_tokens=_kept(t3_tokens[0]),
        prompt_tokens=_kept(prompt_tokens),
        prompt_mel=_kept(prompt_mel),
        x_vector=_kept(x_vector),
    )


def _resampled(samples: Samples, rate: int, wanted: int) -> Samples:
    return samples if rate == wanted else librosa.resample(samples, orig_sr=rate, target_sr=wanted)


def _embed_reference(networks: _Networks, sound: Samples, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Speech tokens (n,), log-mel (frames, 80) and x-vector (192,) of 24 kHz sound: ``S3Token2Mel.embed_ref``.

    The sound goes to 16 kHz by torchaudio's resampler here and by librosa's in ``_enrol``, as upstream has it.
    """
    sound24 = torch.from_numpy(sound).float().to(device)[None]
    sound16 = upstream.load("s3gen.s3gen").get_resampler(SAMPLE_RATE, S3_RATE, device)(sound24)
    mel = upstream.load("s3gen.utils.mel").mel_spectrogram(sound24)[0].T
    tokens, _ = networks.tokenizer(sound16)
    return tokens[0], mel, networks.speaker_encoder.inference(sound16)[0]


def _kept(tensor: Tensor) -> Tensor:
    """A copy on the CPU that, unlike a tensor of inference mode, may be used anywhere."""
    with torch.inference_mode(False):
        return tensor.detach().cpu().contiguous().clone()


def load_enrolment_parts(file: Path) -> tuple[Any, Any]:
    """Upstream's speech tokenizer and CAMPPlus, filled from an S3Gen checkpoint and of the sizes found there.

    Raises:
        CheckpointError: a key is missing, misshapen, or belongs to no part of S3Gen.
    """
    tensors = load_tensors(file)
    tokenizer, speaker = _below(tensors, "tokenizer."), _below(tensors, "speaker_encoder.")
    known = ("tokenizer.", "speaker_encoder.", *_VOCODER_PARTS)
    if strange := [key for key in tensors if not key.startswith(known)]:
        raise CheckpointError(f"{file} has the unexpected {', '.join(strange)}")
    return _speech_tokenizer(tokenizer, file), _speaker_encoder(speaker, file)


def load_voice_encoder(file: Path) -> Any:
    """Upstream's VoiceEncoder, filled from its checkpoint and of the sizes found there.

    Raises:
        CheckpointError: a key is missing, unexpected or misshapen.
    """
    tensors = load_tensors(file)
    package = upstream.load("voice_encoder")
    config = package.VoiceEncConfig()
    config.ve_hidden_size = _size(tensors, "lstm.weight_hh_l0", 1, file)
    config.speaker_embed_size = _size(tensors, "proj.weight", 0, file)
    module = package.VoiceEncoder(config)
    load_strict(module, tensors, file=file)
    return module


def _speech_tokenizer(tensors: Mapping[str, Tensor], file: Path) -> Any:
    package = upstream.load("s3tokenizer.s3tokenizer")
    width = _size(tensors, "encoder.conv1.weight", 0, file, prefix="tokenizer.")
    config = package.ModelConfig(
        n_audio_state=width,
        n_audio_head=width // _HEAD_WIDTH,
        n_audio_layer=len({key.split(".")[2] for key in tensors if key.startswith("encoder.blocks.")}),
    )

    class Sized(package.S3Tokenizer):  # type: ignore[name-defined]
        """Upstream's constructor hands its ``config`` on to nobody."""

        def __init__(self) -> None:
            package.S3TokenizerV2.__init__(self, "speech_tokenizer_v2_25hz", config)
            self.n_fft = 400
            filters = librosa.filters.mel(sr=S3_RATE, n_fft=self.n_fft, n_mels=config.n_mels)
            self.register_buffer("_mel_filters", torch.FloatTensor(filters))
            self.register_buffer("window", torch.hann_window(self.n_fft))

    module = Sized()
    load_strict(module, tensors, file=file, optional=_DERIVED)
    return module


def _speaker_encoder(tensors: Mapping[str, Tensor], file: Path) -> Any:
    def size(key: str) -> int:
        return _size(tensors, key, 0, file, prefix="speaker_encoder.")

    growth = size("xvector.block1.tdnnd1.cam_layer.linear_local.weight")
    module = upstream.load("s3gen.xvector").CAMPPlus(
        embedding_size=size("xvector.dense.linear.weight"),
        growth_rate=growth,
        bn_size=size("xvector.block1.tdnnd1.linear1.weight") // growth,
        init_channels=size("xvector.tdnn.linear.weight"),
        memory_efficient=False,
    )
    load_strict(module, tensors, file=file)
    return module


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _size(tensors: Mapping[str, Tensor], key: str, dimension: int, file: Path, prefix: str = "") -> int:
    if key not in tensors or tensors[key].dim() <= dimension:
        raise CheckpointError(f"{file} lacks {prefix}{key}, or it is misshapen")
    return int(tensors[key].shape[dimension])
