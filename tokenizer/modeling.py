"""LMSPTModel: encode, decode, resynthesize, and the forward pass that the training loop reads.

Shapes: B items, S samples, S' samples at the auxiliary rate, F code frames, D latent channels, E codebook dimension,
K books.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration import LMSPTConfig
from .decoder import Decoder
from .encoder import Encoder, receptive_field
from .layers import ConvNeXtBlock, ISTFTHead, LogMel
from .quantizer import SplitQuantizer, VectorQuantizer


@dataclass
class LMSPTEncoderOutput(ModelOutput):
    """Codes (B, K, F) int64 with -1 past an item's length, and their mask (B, F) bool."""

    audio_codes: Tensor | None = None
    audio_codes_mask: Tensor | None = None


@dataclass
class LMSPTDecoderOutput(ModelOutput):
    """Samples (B, 1, S) in fp32, zero past an item's length."""

    audio_values: Tensor | None = None


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
    _no_split_modules = ["ConvNeXtBlock", "AttentionLayer"]

    def __init__(self, config: LMSPTConfig) -> None:
        super().__init__(config)
        self.mel = LogMel(
            config.sampling_rate, config.n_fft, config.strides[0], config.n_mels, config.mel_mean, config.mel_std
        )
        self.semantic_encoder = Encoder(config, "semantic")
        self.acoustic_encoder = Encoder(config, "acoustic")
        self.quantizer = SplitQuantizer(config)
        self.decoder = Decoder(config, "decoder")
        self.auxiliary_decoder = Decoder(config, "auxiliary_decoder")
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ConvNeXtBlock):
            init.trunc_normal_(module.down.weight, std=std * module.scale)
        if isinstance(module, VectorQuantizer):
            # transposed orthonormal projections: each book starts by taking a subspace out of the residual, and
            # projections of normed latents spread like the entries
            init.orthogonal_(module.project_in.weight)
            init.copy_(module.project_out.weight, module.project_in.weight.T)
            init.normal_(module.codebook.weight)
            init.ones_(module.usage)
        elif isinstance(module, ISTFTHead):
            # start quiet and noise-like: equal phases would add up to one click per frame
            magnitude = torch.full_like(module.linear.bias, -2.0).chunk(2)[0]
            phase = (torch.rand_like(magnitude) * 2 - 1) * torch.pi
            init.copy_(module.linear.bias, torch.cat([magnitude, phase]))

    @property
    def trained(self) -> bool:
        """Whether these weights come from training (False for a preset's random weights)."""
        return self.config.trained

    @property
    def receptive_field_frames(self) -> int:
        """Frames on each side beyond which a change of the input cannot change a code."""
        return max(receptive_field(self.config, part) for part in ("semantic", "acoustic"))

    def encode(self, input_values: Tensor, padding_mask: Tensor | None = None) -> LMSPTEncoderOutput:
        """Turns waveforms into codes.

        Args:
            input_values: (B, 1, S) at `config.sampling_rate`, right-padded.
            padding_mask: (B, S), true (or 1) on each item's samples, which come first; None where all are.

        Returns:
            Codes (B, K, F) with F = ceil(S / hop) and -1 past an item's ceil(length / hop), and the mask (B, F).

        Raises:
            ValueError: a shape is wrong, there is no sample, or an item's mask is empty or has holes.
        """
        samples, mask, full = self._frames(input_values, padding_mask)
        semantic, acoustic = self._latents(samples, mask)
        codes = self.quantizer(semantic, acoustic, mask).codes
        return LMSPTEncoderOutput(audio_codes=codes, audio_codes_mask=full)

    def decode(self, audio_codes: Tensor, lengths: Tensor | None = None) -> LMSPTDecoderOutput:
        """Turns codes into waveforms with the main decoder.

        Args:
            audio_codes: (B, k, F) int64 with the first k <= K books, -1 past an item's length. k = 1 is the semantic
                reconstruction.
            lengths: (B,) samples to keep of each item; None keeps all frames.

        Returns:
            `audio_values` (B, 1, S): S = F * hop, or the largest of `lengths`; zero past each item's length.

        Raises:
            ValueError: a wrong shape, more books than K, a code out of its book's range, -1 before a valid frame, or a
                length that the codes do not reach.
        """
        mask = self._check_codes(audio_codes)
        samples = self.decoder(self.quantizer.look_up(audio_codes, mask), mask)
        return LMSPTDecoderOutput(audio_values=_trim(samples, mask, lengths, self.config.hop_length))

    def resynthesize(self, audio_codes: Tensor, lengths: Tensor | None = None) -> LMSPTDecoderOutput:
        """Turns book 0 alone into waveforms with the auxiliary decoder, at `config.auxiliary_sampling_rate`.

        Takes codes and raises errors as `decode` does; books after the first are not read. `lengths` count samples at
        the auxiliary rate.
        """
        mask = self._check_codes(audio_codes)
        samples = self.auxiliary_decoder(self.quantizer.look_up(audio_codes[:, :1], mask), mask)
        return LMSPTDecoderOutput(audio_values=_trim(samples, mask, lengths, self.config.auxiliary_hop_length))

    def forward(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        n_acoustic_books: Tensor | None = None,
        semantic_only: Tensor | None = None,
    ) -> LMSPTOutput:
        """Encodes, quantizes and decodes twice, for training.

        Args:
            input_values, padding_mask: as in `encode`.
            n_acoustic_books: (B,) integers in 1..K-1 that each item keeps: quantizer dropout, drawn by the caller
                (published: half of a batch keeps 1 to K-1 books, never none). None keeps all.
            semantic_only: (B,) bool; where true the main decoder reads the DETACHED quantized semantic latents alone.
                Ours, not published: book 0 alone then sounds well in the main decoder, while that path moves neither
                the encoders nor a book.

        Returns:
            An LMSPTOutput.

        Raises:
            ValueError: as `encode`, or a shape or count in the last two arguments is wrong.
        """
        config = self.config
        samples, mask, full = self._frames(input_values, padding_mask)
        semantic, acoustic = self._latents(samples, mask)
        books = self.quantizer(semantic, acoustic, mask, n_acoustic_books)
        quantized = books.semantic + books.acoustic
        if semantic_only is not None:
            if semantic_only.shape != samples.shape[:1] or semantic_only.dtype != torch.bool:
                raise ValueError(f"semantic_only must be bool of shape {(len(samples),)}, not {semantic_only}")
            quantized = torch.where(semantic_only[:, None, None], books.semantic.detach(), quantized)
        n_samples = input_values.shape[-1]
        n_auxiliary = -(-n_samples * config.auxiliary_sampling_rate // config.sampling_rate)
        return LMSPTOutput(
            audio_values=self.decoder(quantized, mask)[:, None, :n_samples],
            auxiliary_values=self.auxiliary_decoder(books.semantic, mask)[:, None, :n_auxiliary],
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

    def update_usage(self, output: LMSPTOutput, decay: float = 0.99) -> None:
        """Moves every book's running usage towards this batch's codes. Call once per training step."""
        self.quantizer.update_usage(output.audio_codes, output.audio_codes_mask, decay)

    def revive_dead_codes(self, output: LMSPTOutput, generator: torch.Generator, threshold: float = 0.05) -> list[int]:
        """Replaces entries used less than `threshold` of even use by latents of this batch; returns counts per book.

        Args:
            output: of `forward`; the caller decides on which steps to revive.
            generator: CPU generator, seeded by the caller from (seed, step).
            threshold: running usage under which an entry is dead; 1 is even use of all entries.
        """
        return self.quantizer.revive_dead_codes(
            list(output.projected_latents), output.audio_codes_mask, generator, threshold
        )

    def fingerprint(self, precision: str = "fp32") -> str:
        """SHA-256 of sizes, weights and precision: equal fingerprints mean that codes can be mixed."""
        from .checkpoints import fingerprint

        return fingerprint(self, precision)

    def _latents(self, samples: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Semantic and acoustic latents (B, F, D) of samples (B, F * hop)."""
        mel = self.mel(samples)
        return self.semantic_encoder(mel, mask), self.acoustic_encoder(mel, mask)

    def _frames(self, input_values: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Checks the input and pads it to whole frames.

        Returns:
            Samples (B, F * hop), zero past each item's length; the frame mask (B, F), None where all are valid; and the
            same mask spelled out.
        """
        if input_values.ndim != 3 or input_values.shape[1] != 1:
            raise ValueError(f"input_values must be of shape (B, 1, S), not {tuple(input_values.shape)}")
        batch, _, length = input_values.shape
        if not batch or not length:
            raise ValueError(f"input_values holds no samples: its shape is {tuple(input_values.shape)}")
        hop = self.config.hop_length
        n_frames = -(-length // hop)
        samples = nn.functional.pad(input_values[:, 0], (0, n_frames * hop - length))
        full = torch.ones(batch, n_frames, dtype=torch.bool, device=samples.device)
        if padding_mask is None:
            return samples, None, full
        if padding_mask.shape != (batch, length):
            raise ValueError(f"padding_mask must be of shape {(batch, length)}, not {tuple(padding_mask.shape)}")
        valid = padding_mask.bool()
        if bool(valid.all()):
            return samples, None, full
        lengths = valid.sum(dim=1)
        if not bool(lengths.all()):
            items = (lengths == 0).nonzero().flatten().tolist()
            raise ValueError(f"padding_mask marks no sample of item(s) {items}")
        positions = torch.arange(length, device=samples.device)
        if not bool((valid == (positions < lengths[:, None])).all()):
            raise ValueError("padding_mask must mark the first samples of each item (right padding, no holes)")
        samples = samples.masked_fill(~nn.functional.pad(valid, (0, n_frames * hop - length)), 0.0)
        full = torch.arange(n_frames, device=samples.device) * hop < lengths[:, None]
        return samples, (None if bool(full.all()) else full), full

    def _check_codes(self, codes: Tensor) -> Tensor | None:
        """Checks codes (B, k, F) and returns their frame mask (B, F), None where all are valid."""
        sizes = self.config.codebook_sizes
        if codes.ndim != 3 or 0 in codes.shape or codes.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"audio_codes must be integers of shape (B, k, F), none of them 0, not {codes.dtype} "
                f"{tuple(codes.shape)}"
            )
        if codes.shape[1] > len(sizes):
            raise ValueError(f"audio_codes has {codes.shape[1]} books, the tokenizer has {len(sizes)}")
        for book, size in zip(range(codes.shape[1]), sizes, strict=False):
            low, high = int(codes[:, book].min()), int(codes[:, book].max())
            if low < -1 or high >= size:
                raise ValueError(
                    f"book {book} holds code {high if high >= size else low}; its codes go from 0 to {size - 1}, with "
                    "-1 past an item's length"
                )
        mask = codes[:, 0] >= 0
        if bool(mask.all()) and bool((codes >= 0).all()):
            return None
        if bool(((codes >= 0) != mask[:, None]).any()):
            raise ValueError("audio_codes: the books of an item differ in where -1 begins")
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()) or not bool(mask[:, 0].all()):
            raise ValueError("audio_codes: -1 may stand only past an item's last code, and each item needs one code")
        return mask


def _trim(samples: Tensor, mask: Tensor | None, lengths: Tensor | None, hop: int) -> Tensor:
    """Cuts samples (B, F * hop) to `lengths`: (B, 1, largest length), zero past each."""
    if lengths is None:
        return samples[:, None]
    batch, total = samples.shape
    lengths = torch.as_tensor(lengths, device=samples.device)
    reach = torch.full((batch,), total, device=samples.device) if mask is None else mask.sum(dim=1) * hop
    if lengths.shape != (batch,) or bool(((lengths < 0) | (lengths > reach)).any()):
        raise ValueError(
            f"lengths must be {batch} numbers of samples within what the codes give ({reach.tolist()}), "
            f"not {lengths.tolist()}"
        )
    longest = int(lengths.max())
    positions = torch.arange(longest, device=samples.device)
    return samples[:, None, :longest].masked_fill((positions >= lengths[:, None])[:, None], 0.0)


AutoConfig.register("lmspt", LMSPTConfig)
AutoModel.register(LMSPTConfig, LMSPTModel)
