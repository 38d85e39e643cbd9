"""Supervised semantic tokens: a quantizer inside a recogniser's encoder, trained by the recognition loss.

Shapes: B items, G items of one length, S samples at 16 kHz, M mel channels, T mel frames (100 Hz), E = T / 2 encoder
frames (50 Hz), F = E / stride code frames, C channels of the encoder.

As in CosyVoice (arXiv 2407.05407, section 2.1): the encoder is cut after some layer, its output is quantized, positions
are added anew and the rest of the encoder and the decoder read nothing else. What the recogniser needs to write the
text must then pass through the codes. With `kind: fsq` it is the quantizer of CosyVoice 2 (arXiv 2412.10117). Ours: the
frame rate is free, a linear layer joins the frames of a code and another one takes them apart again, so that CTC keeps
its 50 Hz.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tokenizer.codecs.base import Codec
from tokenizer.codecs.registry import register_codec
from tokenizer.model.book import BookOutput
from tokenizer.model.fsq import FiniteScalarQuantizer
from tokenizer.model.layers import apply_mask
from tokenizer.model.quantizer import VectorQuantizer
from tokenizer.protocol import CodecConfig, LMSPTDecoderOutput
from tokenizer.teacher.whisper import SAMPLES_PER_ENCODER_FRAME, WHISPER_RATE_HZ, WhisperLogMel

ENCODER_HZ = 50


@dataclass
class SemanticQuantizerConfig:
    """Where the quantizer sits in the recogniser's encoder and how it is made."""

    layer: int = field(default=2, metadata={"help": "encoder layers before the quantizer; the rest come after it"})
    frame_rate_hz: float = field(default=25.0, metadata={"help": "codes per second: 50 divided by a whole number"})
    kind: str = field(default="vq", metadata={"help": "vq (a learnt book, CosyVoice) or fsq (CosyVoice 2)"})
    codebook_size: int = field(default=1024, metadata={"help": "entries of a vq book"})
    codebook_dim: int = field(default=8, metadata={"help": "dimension of the vq look-up"})
    fsq_levels: list[int] = field(
        default_factory=lambda: [8, 5, 5, 5], metadata={"help": "levels of each fsq dimension; their product entries"}
    )
    warmup_batches: int = field(
        default=200, metadata={"help": "first batches that pass unquantized: without them a new encoder says nothing"}
    )
    commitment_weight: float = field(default=0.25, metadata={"help": "weight of the commitment loss"})
    codebook_weight: float = field(default=1.0, metadata={"help": "weight of the codebook loss"})
    revive_steps: int = field(default=20, metadata={"help": "batches between two looks for dead entries"})
    revive_threshold: float = field(default=0.05, metadata={"help": "use, relative to even use, of a dead entry"})

    def __post_init__(self) -> None:
        least = {"layer": 1, "codebook_size": 2, "codebook_dim": 1, "revive_steps": 1, "warmup_batches": 0}
        problems = [
            f"{name}={getattr(self, name)}: must be at least {low}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if not 0 < self.frame_rate_hz <= ENCODER_HZ or ENCODER_HZ % self.frame_rate_hz:
            problems.append(f"frame_rate_hz={self.frame_rate_hz:g}: must be 50 divided by a whole number")
        if self.kind not in ("vq", "fsq"):
            problems.append(f"kind={self.kind}: must be vq or fsq")
        if not self.fsq_levels or min(self.fsq_levels) < 2:
            problems.append(f"fsq_levels={self.fsq_levels}: must be numbers of at least 2")
        if problems:
            raise ValueError("quantizer: " + "; ".join(problems))

    @property
    def entries(self) -> int:
        """N, the codes that there are."""
        return self.codebook_size if self.kind == "vq" else math.prod(self.fsq_levels)

    @property
    def stride(self) -> int:
        """Encoder frames per code."""
        return round(ENCODER_HZ / self.frame_rate_hz)

    @property
    def hop_length(self) -> int:
        """Samples per code at 16 kHz."""
        return self.stride * SAMPLES_PER_ENCODER_FRAME


class SemanticQuantizer(nn.Module):
    """Norm, `stride` frames joined to one, one book, and the way back to 50 Hz."""

    batches: Tensor

    def __init__(self, width: int, config: SemanticQuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(width)
        self.join = nn.Linear(config.stride * width, width)
        if config.kind == "fsq":
            self.book = FiniteScalarQuantizer(width, config.fsq_levels)
        else:
            self.book = VectorQuantizer(width, config.codebook_size, config.codebook_dim)
        self.part = nn.Linear(width, config.stride * width)
        # counted in the state, so that a resumed training revives at the same batches with the same draws
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def initialise(self) -> None:
        """First weights of the book, as in LM-SPT: transposed orthonormal projections, normal entries."""
        nn.init.orthogonal_(self.book.project_in.weight)
        self.book.project_out.weight.copy_(self.book.project_in.weight.T)
        if isinstance(self.book, VectorQuantizer):
            nn.init.normal_(self.book.codebook.weight)

    def quantize(self, hidden: Tensor, mask: Tensor | None) -> BookOutput:
        """Codes and more of hidden states (B, E, C), E a multiple of the stride, under a mask (B, F)."""
        joined = self.join(self.norm(hidden).unflatten(1, (-1, self.config.stride)).flatten(2))
        output = self.book(joined, mask)
        if self.training and int(self.batches) < self.config.warmup_batches:
            # New layers hardly differ between sounds, positions outshine them: all frames would share a few codes and
            # the decoder would learn to do without. Nothing pulls the encoder to the book's first, random entries.
            output.commitment_loss = torch.zeros_like(output.commitment_loss)
            output.quantized = apply_mask(self.book.project_out(self.book.project_in(joined)), mask)
        return output

    def spread(self, quantized: Tensor) -> Tensor:
        """Quantized (B, F, C) at 50 Hz again: (B, E, C)."""
        return self.part(quantized).unflatten(2, (self.config.stride, -1)).flatten(1, 2)

    @torch.no_grad()
    def maintain(self, output: BookOutput, mask: Tensor) -> int:
        """Follows the entries' use and now and then revives dead ones from this batch; once per training batch.

        When the warm-up ends a vq book is laid into the batch: the frames' mean is moved to the origin (project_out
        gives it back) and all entries are drawn from them. Look-up goes by direction, and frames that share most of
        theirs would share an entry. With several processes all follow the first one's book.

        Returns:
            How many entries were revived.
        """
        self.book.update_usage(output.codes, mask)
        self.batches += 1
        revived, count = 0, int(self.batches)
        first = count == max(1, self.config.warmup_batches) and isinstance(self.book, VectorQuantizer)
        revives = first or count % self.config.revive_steps == 0
        candidates = output.projected[mask] if revives else None  # picking frames waits for the device
        if first:
            mean = candidates.mean(dim=0)
            candidates = candidates - mean
            self.book.project_in.bias -= mean
            self.book.project_out.bias += self.book.project_out.weight @ mean
            self.book.usage.zero_()
        if revives:
            generator = torch.Generator().manual_seed(count)
            revived = self.book.revive(candidates, generator, self.config.revive_threshold)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # buffers and what revival changes; gradients keep the rest equal
            for tensor in (self.book.usage, *(p.data for p in self.book.parameters())):
                torch.distributed.broadcast(tensor, src=0)
        return revived


def first_layers(
    encoder: WhisperEncoder, features: Tensor, layers: int, frames: int, mask: Tensor | None = None
) -> Tensor:
    """The front end, positions and first layers of a Whisper encoder over log-mels (B, M, T): (B, frames, C).

    Under a mask (B, frames) no position attends to one past its item's end.
    """
    hidden = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features)))).transpose(1, 2)[:, :frames]
    return _through(encoder, hidden, encoder.layers[:layers], mask)


def last_layers(encoder: WhisperEncoder, hidden: Tensor, layers: int) -> Tensor:
    """Positions anew, the layers after the first `layers`, and the final norm: (B, E, C) -> (B, E, C)."""
    return encoder.layer_norm(_through(encoder, hidden, encoder.layers[layers:], None))


def _through(encoder: WhisperEncoder, hidden: Tensor, layers: nn.ModuleList, mask: Tensor | None) -> Tensor:
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    hidden = F.dropout(hidden, encoder.dropout, encoder.training)
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device)
        bias = bias.masked_fill(~mask, torch.finfo(hidden.dtype).min)[:, None, None]
        bias = bias.expand(-1, 1, hidden.shape[1], -1)
    for layer in layers:
        hidden = layer(hidden, bias)
    return hidden


class SupervisedTokenizerConfig(PreTrainedConfig):
    """Sizes of the part of the recogniser that makes the codes.

    Args:
        n_mels, hidden_size, attention_heads: of the recogniser's encoder.
        window_codes: most codes from one window; longer audio is read window after window.
        quantizer: the fields of `SemanticQuantizerConfig`.
    """

    model_type = "supervised_speech_tokenizer"

    n_mels: int = 80
    hidden_size: int = 192
    attention_heads: int = 3
    window_codes: int = 250
    quantizer: dict[str, Any] | None = None


class SupervisedTokenizerModel(PreTrainedModel):
    """The first layers of a recogniser's encoder and its quantizer: speech to codes, and no way back."""

    config_class = SupervisedTokenizerConfig
    base_model_prefix = "supervised"
    main_input_name = "input_values"

    def __init__(self, config: SupervisedTokenizerConfig) -> None:
        super().__init__(config)
        settings = SemanticQuantizerConfig(**(config.quantizer or {}))
        self.encoder = WhisperEncoder(
            WhisperConfig(
                num_mel_bins=config.n_mels,
                d_model=config.hidden_size,
                encoder_layers=settings.layer,
                encoder_attention_heads=config.attention_heads,
                encoder_ffn_dim=4 * config.hidden_size,
                max_source_positions=config.window_codes * settings.stride,
            )
        )
        self.encoder.layer_norm = nn.Identity()  # it belongs to the encoder's last layers, which are left out
        self.quantizer = SemanticQuantizer(config.hidden_size, settings)
        self.quantizer.part = nn.Identity()
        self.post_init()

    @classmethod
    def from_recogniser(cls, encoder: WhisperEncoder, quantizer: SemanticQuantizer) -> SupervisedTokenizerModel:
        """Takes the trained weights out of a recogniser."""
        whole, settings = encoder.config, quantizer.config
        config = SupervisedTokenizerConfig(
            n_mels=whole.num_mel_bins,
            hidden_size=whole.d_model,
            attention_heads=whole.encoder_attention_heads,
            window_codes=whole.max_source_positions // settings.stride,
            quantizer=asdict(settings),
        )
        model = cls(config)
        given = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
        given |= {f"quantizer.{name}": value for name, value in quantizer.state_dict().items()}
        model.load_state_dict({name: given[name] for name in model.state_dict()})
        return model.eval()

    def codes(self, samples: Tensor, log_mel: WhisperLogMel) -> Tensor:
        """Codes (G, F) of samples (G, F * hop) at 16 kHz, read window after window."""
        settings = self.quantizer.config
        found = []
        for piece in samples.split(self.config.window_codes * settings.hop_length, dim=1):
            frames = piece.shape[1] // SAMPLES_PER_ENCODER_FRAME
            # the STFT mirrors what lies at the very end, and training saw silence there: give it some
            features = log_mel(F.pad(piece, (0, 2 * SAMPLES_PER_ENCODER_FRAME)))
            hidden = first_layers(self.encoder, features, settings.layer, frames)
            found.append(self.quantizer.quantize(hidden, None).codes)
        return torch.cat(found, dim=1)


class SupervisedCodec(Codec):
    """A supervised tokenizer behind the codec protocol: one book, encode only."""

    decode_paths = ()

    def __init__(self, model: SupervisedTokenizerModel, num_codebooks: int | None = None) -> None:
        settings = model.quantizer.config
        sizes = [settings.entries]
        config = CodecConfig(model.config.model_type, WHISPER_RATE_HZ, settings.hop_length, sizes)
        super().__init__(model, config, num_codebooks)
        self.log_mel = WhisperLogMel(model.config.n_mels)  # not in the model: from_pretrained leaves such buffers blank

    def encode_frames(self, samples: Tensor) -> Tensor:
        return self.model.codes(samples[:, 0], self.log_mel)[:, None]

    def decode(
        self, audio_codes: Tensor, lengths: Tensor | None = None, reference: Tensor | None = None
    ) -> LMSPTDecoderOutput:
        """Raises ValueError: there is no decoder."""
        raise ValueError(
            "supervised semantic tokens have no decoder: they hold what was said, not how it sounded. Use them for "
            "recognition (slm encode, finetune, transcribe); to make speech take a tokenizer with a decoder, such as "
            "one of `slm train-tokenizer`, or lend them its decoder by a second stage (`slm train-acoustic "
            "decoder_corpus=...`), which recipes.inference.voiced_codec loads as a codec"
        )


AutoConfig.register(SupervisedTokenizerConfig.model_type, SupervisedTokenizerConfig)
AutoModel.register(SupervisedTokenizerConfig, SupervisedTokenizerModel)
register_codec(SupervisedTokenizerConfig.model_type, SupervisedCodec)
