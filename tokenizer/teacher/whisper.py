"""The frozen, LM-aligned speech encoder that listens during distillation, and its differentiable log-mel front end.

Shapes: B batch, S samples at 16 kHz, M mel channels, T mel frames (100 Hz), E encoder frames (50 Hz), D width.

Source: semantic speech-resynthesis distillation, arXiv 2506.16738, section 3. The published code's teacher is Whisper
large-v3 (v1 of the paper: small); it is handed 30 s windows, and gives the last hidden state after the final layer
norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import julius
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, WhisperConfig, WhisperModel
from transformers.audio_utils import mel_filter_bank
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tokenizer.embedded import embedded_folder
from tokenizer.hub import ask_hub
from tokenizer.model.cpu_kernels import attention_implementation
from tokenizer.precision import full_precision

WHISPER_RATE_HZ = 16000
N_FFT = 400
MEL_HOP = 160
SAMPLES_PER_ENCODER_FRAME = 2 * MEL_HOP


class WhisperLogMel(nn.Module):
    """WhisperFeatureExtractor's log-mel as a differentiable module; equal to it within 1e-4 in fp32.

    The maximum that floors the dynamic range is taken per utterance, as Whisper does: a property of the teacher only.
    """

    def __init__(self, n_mels: int = 80) -> None:
        super().__init__()
        filters = mel_filter_bank(
            num_frequency_bins=1 + N_FFT // 2,
            num_mel_filters=n_mels,
            min_frequency=0.0,
            max_frequency=WHISPER_RATE_HZ / 2,
            sampling_rate=WHISPER_RATE_HZ,
            norm="slaney",
            mel_scale="slaney",
        )
        self.register_buffer("filters", torch.tensor(filters.T, dtype=torch.float32), persistent=False)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Maps waveforms (B, S) at 16 kHz, S a multiple of 160, to log-mels (B, M, S / 160)."""
        with full_precision(waveform):
            spectrum = torch.stft(waveform.float(), N_FFT, MEL_HOP, window=self.window, return_complex=True)
            power = spectrum[..., :-1].abs().square()
            log_mel = torch.clamp(self.filters @ power, min=1e-10).log10()
            floor = log_mel.amax(dim=(1, 2), keepdim=True) - 8.0
            return (torch.maximum(log_mel, floor) + 4.0) / 4.0


@contextmanager
def encoder_window(encoder: WhisperEncoder, mel_frames: int) -> Iterator[None]:
    """Lets a Whisper encoder read `mel_frames` frames instead of its full window: same weights, positions cut to match.

    Raises:
        ValueError: if the frames are odd or more than the encoder has positions for.
    """
    table, limit = encoder.embed_positions, encoder.config.max_source_positions
    positions = mel_frames // 2
    if mel_frames % 2 or positions > len(table.weight):
        raise ValueError(
            f"{mel_frames} mel frames: an even number up to {2 * len(table.weight)} "
            f"({len(table.weight) / 50:g} s) is needed"
        )
    # A view of the one table: nothing is copied.
    encoder.embed_positions = nn.Embedding(
        positions, table.embedding_dim, _weight=table.weight.detach()[:positions], _freeze=True
    )
    encoder.config.max_source_positions = positions
    try:
        yield
    finally:
        encoder.embed_positions, encoder.config.max_source_positions = table, limit


@dataclass
class TeacherConfig:
    """Which speech encoder listens, and how long a window it gets."""

    name: str = field(
        default="",
        metadata={
            "help": "embedded-recogniser, or folder or hub name of a Whisper model (openai/whisper-small; published: "
            "openai/whisper-large-v3)"
        },
    )
    revision: str | None = field(default=None, metadata={"help": "hub revision of the teacher"})
    layer: int | None = field(
        default=None,
        metadata={
            "help": "the encoder layer that is heard, counted from 1, before the final norm; null (published): the "
            "last, after it"
        },
    )
    pad_to_seconds: float | None = field(
        default=None, metadata={"help": "pad crops to this before the teacher (published: 30); null: the crop alone"}
    )


@contextmanager
def _named_errors(config: TeacherConfig) -> Iterator[None]:
    if not config.name:
        raise ValueError(
            "teacher.name is empty: give embedded-recogniser, a folder made by `slm train-teacher`, or e.g. "
            "openai/whisper-small"
        )
    source = _source(config)
    if Path(source).is_file():
        raise ValueError(f"teacher {config.name!r}: a file; give the folder of a saved model (RUN_DIR/model)")
    if not Path(source).is_dir() and source.count("/") != 1:  # before a hub is asked, again and again
        raise ValueError(
            f"teacher {config.name!r}: no such folder, and a hub name is `owner/name`: give embedded-recogniser, a "
            "folder made by `slm train-teacher`, or e.g. openai/whisper-small"
        )
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"teacher {config.name!r} is neither a local Whisper folder nor a model that can be fetched here: "
            "train one with `slm train-teacher`, or download it where there is a network "
            f"({str(error).splitlines()[0]})"
        ) from None


def _source(config: TeacherConfig) -> str:
    """Where a teacher is loaded from: an embedded recogniser's folder, or the name as it is."""
    return str(embedded_folder(config.name) or config.name)


def _whisper_config(config: TeacherConfig) -> WhisperConfig:
    """A teacher's sizes. Of another kind of model transformers would make a Whisper of random weights."""
    with _named_errors(config):
        if not Path(_source(config)).is_dir():
            ask_hub(config.name, revision=config.revision)
        settings, _ = PreTrainedConfig.get_config_dict(_source(config), revision=config.revision)
        if settings.get("model_type") != WhisperConfig.model_type:
            raise ValueError(
                f"teacher {config.name!r} holds a model of type {settings.get('model_type')!r}, not a Whisper: give a "
                "folder made by `slm train-teacher` (without model.quantizer), or e.g. openai/whisper-small"
            )
        return WhisperConfig.from_pretrained(_source(config), revision=config.revision)


def teacher_width(config: TeacherConfig) -> int:
    """Channels of a teacher's hidden states, from its configuration alone. Raises ValueError as loading it does."""
    return _whisper_config(config).d_model


class SpeechTeacher(nn.Module):
    """A frozen Whisper encoder: waveforms at 16 kHz to hidden states, differentiable in the waveform.

    It stays in eval mode whatever `train()` is called with, and no parameter of it takes a gradient.

    Args:
        encoder: taken over: layers after `layer` and the final norm are removed.
        pad_to_seconds: window that crops are padded to.
        layer: 1 to the encoder's layers: its output before the final norm. None: the last, after it.

    Raises:
        ValueError: if the window or the layer is more than the encoder has.
    """

    def __init__(self, encoder: WhisperEncoder, pad_to_seconds: float | None = None, layer: int | None = None) -> None:
        super().__init__()
        if layer is not None:
            if not 1 <= layer <= len(encoder.layers):
                raise ValueError(f"teacher.layer={layer}: this teacher has layers 1 to {len(encoder.layers)}")
            encoder.layers, encoder.layer_norm = encoder.layers[:layer], nn.Identity()
        self.encoder = encoder
        self.log_mel = WhisperLogMel(encoder.config.num_mel_bins)
        self.attention = encoder.config._attn_implementation
        self.pad_to_seconds = pad_to_seconds
        self.window_s = encoder.config.max_source_positions / 50
        if pad_to_seconds is not None and pad_to_seconds > self.window_s:
            raise ValueError(f"pad_to_seconds={pad_to_seconds:g}: this teacher's window is {self.window_s:g} s")
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(cls, config: TeacherConfig) -> SpeechTeacher:
        """Loads the encoder of a Whisper model by folder or hub name.

        Raises:
            ValueError: if it cannot be loaded here, or is no whole Whisper encoder, naming it and the way out.
        """
        sizes = _whisper_config(config)
        with _named_errors(config):
            try:
                model, report = WhisperModel.from_pretrained(
                    _source(config),
                    revision=config.revision,
                    config=sizes,
                    output_loading_info=True,
                    dtype=torch.float32,
                )
            except RuntimeError as error:  # how transformers reports tensors of another size
                raise ValueError(
                    f"teacher {config.name!r}: its weights do not fit config.json ({str(error).splitlines()[0]})"
                ) from error
        if absent := sorted(name for name in report["missing_keys"] if name.startswith("encoder.")):
            raise ValueError(
                f"teacher {config.name!r}: the weights of its encoder are not all there ({len(absent)} missing, such "
                f"as {absent[0]}), and a teacher of random weights teaches nothing: make or download it again"
            )
        return cls(model.encoder, config.pad_to_seconds, config.layer)

    def train(self, mode: bool = True) -> SpeechTeacher:
        return super().train(False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Maps waveforms (B, S) at 16 kHz to hidden states (B, E, D), E = 50 frames a second.

        S is padded with zeros to whole encoder frames, or to `pad_to_seconds`.

        Raises:
            ValueError: if S is longer than the teacher's window.
        """
        samples = waveform.shape[-1]
        wanted = -(-samples // SAMPLES_PER_ENCODER_FRAME) * SAMPLES_PER_ENCODER_FRAME
        if self.pad_to_seconds is not None:
            wanted = max(wanted, round(self.pad_to_seconds * WHISPER_RATE_HZ))
        if wanted > self.window_s * WHISPER_RATE_HZ:
            raise ValueError(
                f"{samples / WHISPER_RATE_HZ:.2f} s of audio: the teacher's window is {self.window_s:g} s; "
                "take shorter crops"
            )
        log_mel = self.log_mel(nn.functional.pad(waveform, (0, wanted - samples)))
        implementation = attention_implementation(log_mel.device, log_mel.shape[-1] // 2, self.attention)
        self.encoder.config._attn_implementation = implementation
        with encoder_window(self.encoder, log_mel.shape[-1]):
            return self.encoder(log_mel).last_hidden_state


def at_teacher_rate(waveform: Tensor, sampling_rate: int) -> Tensor:
    """Waveforms (B, 1, S) as the teacher takes them: (B, S') at 16 kHz, resampled in fp32 inside the graph."""
    if sampling_rate == WHISPER_RATE_HZ:
        return waveform[:, 0]
    with full_precision(waveform):  # it is a convolution, and bf16 or TF32 would add noise to sound
        return _resampler(sampling_rate, waveform.device)(waveform[:, 0].float())


@lru_cache(maxsize=8)
def _resampler(sampling_rate: int, device: torch.device) -> julius.ResampleFrac:
    """To the teacher's rate. Its kernel is made once: at 44.1 kHz that takes longer than the resampling itself."""
    with torch.inference_mode(False):  # kept for a later backward pass too
        return julius.ResampleFrac(sampling_rate, WHISPER_RATE_HZ).to(device)
