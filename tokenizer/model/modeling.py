"""LMSPTModel: encode, decode, resynthesize, and the forward pass that the training loop reads.

Shapes: B items, S samples, S' samples at the auxiliary rate, F code frames, D latent channels, E codebook dimension,
K books.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from tokenizer.fingerprint import fingerprint
from tokenizer.model import dac
from tokenizer.model.book import DEAD_USAGE
from tokenizer.model.configuration import LMSPTConfig
from tokenizer.model.decoder import Decoder, decoder_receptive_field
from tokenizer.model.encoder import Encoder, receptive_field
from tokenizer.model.first_weights import draw_weights
from tokenizer.model.layers import StreamCache, apply_mask
from tokenizer.model.quantizer import SplitQuantizer
from tokenizer.model.spectral import LogMel
from tokenizer.precision import exact_fp32
from tokenizer.protocol import (
    ALL_DECODE_PATHS,
    LMSPTDecoderOutput,
    LMSPTEncoderOutput,
    check_lengths,
    code_mask,
    item_lengths,
    refuse_reference,
    trim,
)


@dataclass
class LMSPTOutput(ModelOutput):
    """All that a training step needs. Losses are unweighted scalars (commitment 0.25 and codebook 1 as published).

    Attributes:
        audio_values: (B, 1, S), the main reconstruction, as long as the input.
        auxiliary_values: (B, 1, S'), the resynthesis from semantic codes alone, at `auxiliary_sampling_rate`.
        audio_codes, audio_codes_mask: as `encode` returns them (dropped books' codes included).
        semantic_latents, quantized_semantic, quantized: (B, D, F); `quantized` is what the main decoder read.
        projected_latents: K of (B, F, E), detached; what `revive_dead_codes` draws from.
    """

    audio_values: Tensor | None = None
    auxiliary_values: Tensor | None = None
    audio_codes: Tensor | None = None
    audio_codes_mask: Tensor | None = None
    semantic_latents: Tensor | None = None
    quantized_semantic: Tensor | None = None
    quantized: Tensor | None = None
    semantic_commitment_loss: Tensor | None = None
    semantic_codebook_loss: Tensor | None = None
    acoustic_commitment_loss: Tensor | None = None
    acoustic_codebook_loss: Tensor | None = None
    projected_latents: tuple[Tensor, ...] | None = None


class LMSPTModel(PreTrainedModel):
    """The LM-SPT speech tokenizer (arXiv 2506.16738).

    A batch equals its single items and a padded item equals the unpadded one (fp32 latents within 1e-4): everything
    past the mask is zeroed before each convolution and attention, and no statistic spans the utterance. Attention is
    local, so the receptive field is finite: `receptive_field_frames`.
    """

    config_class = LMSPTConfig
    base_model_prefix = "lmspt"
    main_input_name = "input_values"
    decode_paths = ALL_DECODE_PATHS
    supports_gradient_checkpointing = True
    _no_split_modules = ["ConvNeXtBlock", "AttentionLayer", "EncoderBlock", "DecoderBlock"]

    def __init__(self, config: LMSPTConfig) -> None:
        super().__init__(config)
        encoder = Encoder
        if config.encoder_architecture == "dac":
            self.mel, encoder = None, dac.DacEncoder
        else:
            sizes = (config.sampling_rate, config.n_fft, config.strides[0], config.n_mels)
            self.mel = LogMel(*sizes, config.mel_mean, config.mel_std, config.causal)
        self.semantic_encoder = encoder(config, "semantic")
        self.acoustic_encoder = None if config.shared_encoder else encoder(config, "acoustic")
        self.quantizer = SplitQuantizer(config)
        self.decoder = _decoder(config, "decoder", config.decoder_architecture)
        self.auxiliary_decoder = None
        if config.auxiliary_decoder == "decoupled":
            self.auxiliary_decoder = _decoder(config, "auxiliary_decoder", config.auxiliary_decoder_architecture)
        if config.encoder_architecture == "dac":
            if config.weight_norm:
                dac.add_weight_norm(self.quantizer)
            # Statistics of the published training. Nothing reads them; they let a published file be written back whole.
            sizes = config.codebook_sizes
            self.register_buffer("semantic_vocab_usage", torch.zeros(1, sizes[0]))
            self.register_buffer("acoustic_vocab_usage", torch.zeros(len(sizes) - 1, max(sizes[1:])))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        draw_weights(module, self.config)
        if isinstance(module, LMSPTModel) and module.config.encoder_architecture == "dac":
            init.zeros_(module.semantic_vocab_usage)
            init.zeros_(module.acoustic_vocab_usage)

    @property
    def trained(self) -> bool:
        """Whether these weights come from training (False for a preset's random weights)."""
        return self.config.trained

    @property
    def receptive_field_frames(self) -> int:
        """Frames on each side beyond which a change of the input cannot change a code."""
        reach = receptive_field if self.config.encoder_architecture == "mel" else dac.encoder_receptive_field
        parts = ("semantic",) if self.config.shared_encoder else ("semantic", "acoustic")
        return max(reach(self.config, part) for part in parts)

    @property
    def min_samples(self) -> int:
        """The fewest samples that `encode` takes: one, or without `config.exact_lengths` those that give a frame."""
        return 1 if self.config.exact_lengths else self.semantic_encoder.min_length

    @property
    def decoder_receptive_field_frames(self) -> int:
        """Frames on each side beyond which a change of a code cannot change a frame's samples, in either decoder."""
        parts = {"decoder": self.decoder, "auxiliary_decoder": self.auxiliary_decoder}
        return max(
            (dac.decoder_receptive_field if isinstance(module, dac.DacDecoder) else decoder_receptive_field)(
                self.config, part
            )
            for part, module in parts.items()
            if module is not None
        )

    @exact_fp32()
    def encode(self, input_values: Tensor, padding_mask: Tensor | None = None) -> LMSPTEncoderOutput:
        """Turns waveforms into codes.

        Args:
            input_values: (B, 1, S) at `config.sampling_rate`, right-padded.
            padding_mask: (B, S), true (or 1) on each item's samples, which come first; None where all are.

        Returns:
            Codes (B, K, F) with F = ceil(S / hop) and -1 past an item's ceil(length / hop), and the mask (B, F).
            Without `config.exact_lengths`, F is what the convolutions make of the input as it is.

        Raises:
            ValueError: a shape is wrong, there is no sample (or no frame, without `exact_lengths`), or an item's mask
                is empty or has holes.
        """
        samples, lengths, mask, full = self._frames(input_values, padding_mask)
        semantic, acoustic = self._latents(samples, mask, lengths=lengths)
        codes = self.quantizer(semantic, acoustic, mask).codes
        return LMSPTEncoderOutput(audio_codes=codes, audio_codes_mask=full)

    @exact_fp32()
    def decode(
        self, audio_codes: Tensor, lengths: Tensor | None = None, reference: Tensor | None = None
    ) -> LMSPTDecoderOutput:
        """Turns codes into waveforms with the main decoder.

        Args:
            audio_codes: (B, k, F) int64 with the first k <= K books, -1 past an item's length. k = 1 is the semantic
                reconstruction.
            lengths: (B,) samples to keep of each item; None keeps all frames.
            reference: for codecs with a second stage behind them; refused here.

        Returns:
            `audio_values` (B, 1, S): S = F * hop, or the largest of `lengths`; zero past each item's length. Without
            `config.exact_lengths` and `lengths`, odd strides of a DAC decoder leave S a few samples short.

        Raises:
            ValueError: a wrong shape, more books than K, a code out of its book's range, -1 before a valid frame, or a
                length that the codes do not reach.
        """
        refuse_reference(reference)
        mask = self._check_codes(audio_codes)
        return self._decoded(self.quantizer.look_up(audio_codes, mask), mask, lengths)

    def latents_of(self, audio_codes: Tensor) -> Tensor:
        """What the main decoder reads of codes (B, k, F), k <= K: the sum (B, D, F) of what each book adds.

        Zero past an item's length. Raises errors as `decode` does.
        """
        return self.quantizer.look_up(audio_codes, self._check_codes(audio_codes)).transpose(1, 2)

    @exact_fp32()
    def decode_latents(
        self, latents: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> LMSPTDecoderOutput:
        """Turns latents into waveforms with the main decoder, such as those that a model predicts in place of codes.

        Args:
            latents: (B, D, F) with D = `config.latent_dim`. Those of `latents_of` give what `decode` gives.
            mask: (B, F) bool, true on each item's frames, which come first; None where all are.
            lengths: as in `decode`.

        Returns:
            As `decode`.

        Raises:
            ValueError: latents of another shape.
        """
        if latents.ndim != 3 or latents.shape[1] != self.config.latent_dim:
            raise ValueError(f"latents must be of shape (B, {self.config.latent_dim}, F), not {tuple(latents.shape)}")
        return self._decoded(apply_mask(latents.float().transpose(1, 2), mask), mask, lengths)

    @exact_fp32()
    def resynthesize(self, audio_codes: Tensor, lengths: Tensor | None = None) -> LMSPTDecoderOutput:
        """Turns book 0 alone into waveforms with the auxiliary decoder, at `config.auxiliary_sampling_rate`.

        Takes codes and raises errors as `decode` does; books after the first are not read. `lengths` count samples at
        the auxiliary rate.
        """
        mask = self._check_codes(audio_codes)
        samples = self.resynthesizer(self.quantizer.look_up(audio_codes[:, :1], mask), mask)
        if lengths is not None:
            samples = _fit(samples, audio_codes.shape[-1] * self.config.auxiliary_hop_length)
        return LMSPTDecoderOutput(audio_values=trim(samples, mask, lengths, self.config.auxiliary_hop_length))

    def forward(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        n_acoustic_books: Tensor | Sequence[int] | None = None,
        semantic_only: Tensor | None = None,
        auxiliary: Literal["attached", "detached", "skipped"] = "attached",
        lengths: Sequence[int] | None = None,
    ) -> LMSPTOutput:
        """Encodes, quantizes and decodes twice, for training.

        Args:
            input_values, padding_mask: as in `encode`.
            n_acoustic_books: (B,) integers in 1..K-1 that each item keeps: quantizer dropout, drawn by the caller
                (published: half of a batch keeps 1 to K-1 books, never none). None keeps all. A list is checked
                without waiting for the device.
            semantic_only: (B,) bool; where true the main decoder reads the DETACHED quantized semantic latents alone.
                Ours, not published: book 0 alone then sounds well in the main decoder, while that path moves neither
                the encoders nor a book.
            auxiliary: what the auxiliary decoder reads: the quantized semantic latents (`attached`), the same cut from
                the graph (`detached`: only that decoder learns from it), or nothing (`skipped`: `auxiliary_values` is
                None).
            lengths: samples of each item, in place of a `padding_mask`: a GPU's mask can only be checked by waiting
                for it.

        Returns:
            An LMSPTOutput.

        Raises:
            ValueError: as `encode`, or a shape or count in the other arguments is wrong.
        """
        config = self.config
        samples, lengths, mask, full = self._frames(input_values, padding_mask, lengths)
        semantic, acoustic = self._latents(samples, mask, lengths=lengths)
        books = self.quantizer(semantic, acoustic, mask, n_acoustic_books)
        quantized = books.semantic + books.acoustic
        if semantic_only is not None:
            if semantic_only.shape != samples.shape[:1] or semantic_only.dtype != torch.bool:
                raise ValueError(f"semantic_only must be bool of shape {(len(samples),)}, not {semantic_only}")
            quantized = torch.where(semantic_only[:, None, None], books.semantic.detach(), quantized)
        n_samples = input_values.shape[-1]
        n_auxiliary = -(-n_samples * config.auxiliary_sampling_rate // config.sampling_rate)
        resynthesis = None
        if auxiliary != "skipped":
            read = books.semantic if auxiliary == "attached" else books.semantic.detach()
            resynthesis = _fit(self.resynthesizer(read, mask), n_auxiliary)[:, None]
        return LMSPTOutput(
            audio_values=_fit(self.decoder(quantized, mask), n_samples)[:, None],
            auxiliary_values=resynthesis,
            audio_codes=books.codes,
            audio_codes_mask=full,
            semantic_latents=semantic.transpose(1, 2),
            quantized_semantic=books.semantic.transpose(1, 2),
            quantized=quantized.transpose(1, 2),
            semantic_commitment_loss=books.semantic_commitment_loss,
            semantic_codebook_loss=books.semantic_codebook_loss,
            acoustic_commitment_loss=books.acoustic_commitment_loss,
            acoustic_codebook_loss=books.acoustic_codebook_loss,
            projected_latents=tuple(books.projected),
        )

    def semantic_projection(
        self, input_values: Tensor, padding_mask: Tensor | None = None, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """What the semantic book looks up, (B, F, E), by the semantic encoder alone; arguments as `forward`'s.

        Raises:
            ValueError: as `encode`.
        """
        samples, lengths, mask, _ = self._frames(input_values, padding_mask, lengths)
        latents = self.semantic_encoder(*self._encoder_inputs(samples, mask, None, lengths))
        return self.quantizer.books[0].project(latents)

    def update_usage(self, output: LMSPTOutput, decay: float | Sequence[float] = 0.99) -> list[Tensor]:
        """Moves every book's running usage towards this batch's codes. Call once per training step.

        Returns:
            How often each entry of each book occurred, K of (N,).
        """
        return self.quantizer.update_usage(output.audio_codes, decay)

    def revive_dead_codes(
        self,
        output: LMSPTOutput,
        generator: torch.Generator,
        threshold: float | Sequence[float] = DEAD_USAGE,
        trial: float | Sequence[float] = 1.0,
    ) -> list[int]:
        """Replaces entries used less than `threshold` of even use by latents of this batch; returns counts per book.

        Args:
            output: of `forward`; the caller decides on which steps to revive.
            generator: CPU generator, seeded by the caller from (seed, step).
            threshold: running usage under which an entry is dead, of all books or each; 1 is even use of all entries.
            trial: running usage that a new entry begins with, likewise.
        """
        return self.quantizer.revive_dead_codes(
            list(output.projected_latents), output.audio_codes_mask, generator, threshold, trial
        )

    def fingerprint(self, precision: str = "fp32", sound: bool = False) -> str:
        """SHA-256 of the sizes, weights and precision that make the codes: equal ones mean that codes can be mixed.

        Decoders are no part of it: one that is trained further, or replaced, speaks the same codes.

        Args:
            precision: in which the codes are computed.
            sound: with the decoders: equal ones mean that the sound is the same too.
        """
        weights = self.state_dict()
        if not sound:
            decoders = ("decoder.", "auxiliary_decoder.")
            weights = {name: value for name, value in weights.items() if not name.startswith(decoders)}
        return fingerprint(self.config.identity(sound), weights, precision)

    @property
    def resynthesizer(self) -> nn.Module:
        """The decoder of the semantic codes alone: the auxiliary one, or the main one where it is shared."""
        return self.decoder if self.auxiliary_decoder is None else self.auxiliary_decoder

    @torch.no_grad()
    def fold_weight_norm(self) -> LMSPTModel:
        """Multiplies weight norm out, for faster inference with the same outputs; the folded model saves and loads.

        Returns:
            The model itself; `config.weight_norm` is False from here on.
        """
        for module in self.modules():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        self.config.weight_norm = False
        return self

    def _latents(
        self,
        samples: Tensor,
        mask: Tensor | None,
        cache: StreamCache | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Semantic and acoustic latents (B, F, D) of samples (B, S), the next ones of a stream with a cache.

        `lengths` (B,) are each item's samples where they are not those of the mask's whole frames.
        """
        inputs = self._encoder_inputs(samples, mask, cache, lengths)
        semantic = self.semantic_encoder(*inputs)
        return semantic, semantic if self.acoustic_encoder is None else self.acoustic_encoder(*inputs)

    def _encoder_inputs(
        self, samples: Tensor, mask: Tensor | None, cache: StreamCache | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None, StreamCache | None]:
        """What an encoder is called with; arguments as `_latents`'."""
        if self.mel is not None:
            return self.mel(samples, cache), mask, cache
        if lengths is None and mask is not None:
            lengths = mask.sum(dim=1) * self.config.hop_length
        return samples, lengths, cache

    def _decoded(self, latents: Tensor, mask: Tensor | None, lengths: Tensor | None) -> LMSPTDecoderOutput:
        """The main decoder's waveforms of latents (B, F, D)."""
        samples = self.decoder(latents, mask)
        if lengths is not None:
            samples = _fit(samples, latents.shape[1] * self.config.hop_length)
        return LMSPTDecoderOutput(audio_values=trim(samples, mask, lengths, self.config.hop_length))

    def _frames(
        self, input_values: Tensor, padding_mask: Tensor | None, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Checks the input and, with `exact_lengths`, pads it to whole frames.

        What depends on lengths is decided on the host, so that the device is asked once for them, or not at all where
        they are given.

        Returns:
            Samples (B, S) for the encoders, zero past each item's length; how many of them each item has (B,), None
            where that follows from the next; the frame mask (B, F), None where all are valid; and the same mask spelled
            out.
        """
        if lengths is None:
            lengths = item_lengths(input_values, padding_mask).tolist()
        else:
            check_lengths(input_values, padding_mask, lengths)
        batch, _, length = input_values.shape
        hop, exact = self.config.hop_length, self.config.exact_lengths
        count = (lambda n: -(-n // hop)) if exact else self.semantic_encoder.out_length
        n_frames, frames = count(length), [count(n) for n in lengths]
        if n_frames < 1 or min(frames) < 1:
            raise ValueError(
                f"input_values: {min(lengths)} samples are too few for one frame of {hop} where exact_lengths is "
                "false; pad them, or set exact_lengths to true"
            )
        samples = _fit(input_values[:, 0], n_frames * hop) if exact else input_values[:, 0]
        full = torch.ones(batch, n_frames, dtype=torch.bool, device=samples.device)
        if min(lengths) == length:
            return samples, None, None, full
        ends, last = (torch.tensor(n).to(samples.device, non_blocking=True)[:, None] for n in (lengths, frames))
        samples = samples.masked_fill(torch.arange(samples.shape[1], device=samples.device) >= ends, 0.0)
        if min(frames) < n_frames:
            full = torch.arange(n_frames, device=samples.device) < last
        return samples, (None if exact else ends[:, 0]), (None if min(frames) == n_frames else full), full

    def _check_codes(self, codes: Tensor) -> Tensor | None:
        """Checks codes (B, k, F) and returns their frame mask (B, F), None where all are valid."""
        return code_mask(codes, self.config.codebook_sizes)


def _decoder(config: LMSPTConfig, part: str, architecture: str) -> Decoder | dac.DacDecoder:
    return (dac.DacDecoder if architecture == "dac" else Decoder)(config, part)


def _fit(samples: Tensor, n_samples: int) -> Tensor:
    """Samples (B, S) cut or padded with zeros to (B, n_samples)."""
    return nn.functional.pad(samples[:, :n_samples], (0, max(n_samples - samples.shape[1], 0)))


AutoConfig.register("lmspt", LMSPTConfig)
AutoModel.register(LMSPTConfig, LMSPTModel)
