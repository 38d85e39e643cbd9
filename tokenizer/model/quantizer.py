"""Factorized vector quantization with cosine look-up, and the split semantic / acoustic quantizer.

Shapes: B items, F frames, D latent channels, E codebook dimension, N entries, K books (book 0 semantic).
Everything here runs in fp32 with autocast off. Masked frames take no part in losses, usage or revival.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.model.book import Book, BookOutput
from tokenizer.model.code_use import count_codes
from tokenizer.model.configuration import LMSPTConfig
from tokenizer.model.cpu_kernels import first_largest
from tokenizer.model.fsq import FiniteScalarQuantizer
from tokenizer.model.layers import apply_mask
from tokenizer.precision import full_precision


class VectorQuantizer(Book):
    """One book: project to `codebook_dim`, L2-normalised look-up, straight-through, project back.

    Follows the published configuration (factorized, dimension 8, cosine look-up; arXiv 2506.16738 v2), as in DAC: the
    look-up compares directions, the losses compare the projected latent and the entry themselves.
    """

    def __init__(self, latent_dim: int, size: int, codebook_dim: int) -> None:
        super().__init__()
        self.project_in = nn.Linear(latent_dim, codebook_dim)
        self.codebook = nn.Embedding(size, codebook_dim)
        self.project_out = nn.Linear(codebook_dim, latent_dim)
        self.register_buffer("usage", torch.ones(size))

    def forward(self, latents: Tensor, mask: Tensor | None) -> BookOutput:
        """Quantizes latents (B, F, D) under a mask (B, F)."""
        with full_precision(latents):
            projected = self.project(latents)
            entries = self.codebook.weight.float()
            with torch.no_grad():
                # the entry of the largest cosine; the latent's own norm does not change which that is
                codes = first_largest(projected @ F.normalize(entries, dim=-1).T)
            chosen = F.embedding(codes, entries)
            commitment = _mean_over_frames((projected - chosen.detach()).square().mean(dim=-1), mask)
            codebook = _mean_over_frames((chosen - projected.detach()).square().mean(dim=-1), mask)
            through = projected + (chosen - projected).detach()
            return BookOutput(self._out(through, mask), codes, projected.detach(), commitment, codebook)

    def project(self, latents: Tensor) -> Tensor:
        """What is looked up, (B, F, E) in fp32, of latents (B, F, D)."""
        with full_precision(latents):
            return F.linear(latents.float(), self.project_in.weight.float(), self.project_in.bias.float())

    def look_up(self, codes: Tensor, mask: Tensor | None) -> Tensor:
        """Quantized latents (B, F, D) of codes (B, F), zero past the mask."""
        with full_precision(self.codebook.weight):
            return self._out(F.embedding(codes, self.codebook.weight.float()), mask)

    def _out(self, entries: Tensor, mask: Tensor | None) -> Tensor:
        return apply_mask(F.linear(entries, self.project_out.weight.float(), self.project_out.bias.float()), mask)

    @torch.no_grad()
    def revive(self, candidates: Tensor, generator: torch.Generator, threshold: float, trial: float = 1.0) -> int:
        """Replaces the entries whose usage is below the threshold by random candidates.

        Args:
            candidates: projected latents (any, E) of valid frames.
            generator: CPU generator that draws which candidates are taken.
            threshold: usage, in units of even use, under which an entry is dead.
            trial: usage that a new entry begins with: how much time it gets to be used.

        Returns:
            How many entries were replaced. A frozen book is left as it is.
        """
        if not self.codebook.weight.requires_grad:
            return 0
        dead = (self.usage < threshold).nonzero().squeeze(-1)
        if not len(dead) or not len(candidates):
            return 0
        draws = torch.randint(len(candidates), (len(dead),), generator=generator)
        self.codebook.weight[dead] = candidates[draws.to(candidates.device)].to(self.codebook.weight)
        self.usage[dead] = trial
        return len(dead)


def _mean_over_frames(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (B, F) over each item's valid frames: (B,)."""
    if mask is None:
        return values.mean(dim=1)
    return values.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


@dataclass
class QuantizerOutput:
    """What the split quantizer makes of both latents. Losses are scalars."""

    semantic: Tensor  # (B, F, D)
    acoustic: Tensor  # (B, F, D), only the kept books of each item
    codes: Tensor  # (B, K, F)
    projected: list[Tensor]  # K of (B, F, E)
    semantic_commitment_loss: Tensor
    semantic_codebook_loss: Tensor
    acoustic_commitment_loss: Tensor
    acoustic_codebook_loss: Tensor


class SplitQuantizer(nn.Module):
    """One semantic book, and a residual quantizer of K-1 acoustic books (arXiv 2506.16738).

    The acoustic side quantizes `acoustic latents - quantized semantic latents`: `attached` as published, `detached`
    (reconstruction and acoustic losses then reach the semantic side only by the sum), or the latents alone (`none`).
    """

    def __init__(self, config: LMSPTConfig) -> None:
        super().__init__()
        self.subtraction = config.semantic_subtraction
        books: list[Book] = [
            VectorQuantizer(config.latent_dim, size, dim)
            for size, dim in zip(config.codebook_sizes, config.codebook_dims, strict=True)
        ]
        if config.semantic_quantizer == "fsq":
            books[0] = FiniteScalarQuantizer(config.latent_dim, config.fsq_levels)
        self.books = nn.ModuleList(books)

    def forward(
        self,
        semantic: Tensor,
        acoustic: Tensor,
        mask: Tensor | None,
        n_acoustic_books: Tensor | Sequence[int] | None = None,
    ) -> QuantizerOutput:
        """Quantizes.

        Args:
            semantic, acoustic: latents (B, F, D).
            mask: (B, F) bool or None.
            n_acoustic_books: (B,) integers in 1..K-1, the books each item keeps (quantizer dropout); None keeps all.
                Dropped books give neither a sum nor a loss; their codes are still returned. A list is checked without
                waiting for the device, as a tensor there cannot be.

        Returns:
            Losses are means over items, summed over the acoustic books.
        """
        if n_acoustic_books is not None:
            n_acoustic_books = self._kept(n_acoustic_books, semantic)
        with full_precision(semantic):
            first: BookOutput = self.books[0](semantic, mask)
            residual = acoustic.float()
            if self.subtraction != "none":
                residual = residual - (first.quantized if self.subtraction == "attached" else first.quantized.detach())
            total, outputs = torch.zeros_like(residual), [first]
            commitment = codebook = residual.new_zeros(())
            for index, book in enumerate(self.books[1:]):
                output: BookOutput = book(residual, mask)
                outputs.append(output)
                residual = residual - output.quantized
                if n_acoustic_books is None:
                    total = total + output.quantized
                    commitment = commitment + output.commitment_loss.mean()
                    codebook = codebook + output.codebook_loss.mean()
                else:
                    kept = (n_acoustic_books > index).to(total)
                    total = total + output.quantized * kept[:, None, None]
                    commitment = commitment + (output.commitment_loss * kept).mean()
                    codebook = codebook + (output.codebook_loss * kept).mean()
        codes = torch.stack([output.codes for output in outputs], dim=1)
        if mask is not None:
            codes = codes.masked_fill(~mask[:, None], -1)
        return QuantizerOutput(
            semantic=first.quantized,
            acoustic=total,
            codes=codes,
            projected=[output.projected for output in outputs],
            semantic_commitment_loss=first.commitment_loss.mean(),
            semantic_codebook_loss=first.codebook_loss.mean(),
            acoustic_commitment_loss=commitment,
            acoustic_codebook_loss=codebook,
        )

    def _kept(self, n_acoustic_books: Tensor | Sequence[int], latents: Tensor) -> Tensor:
        """The books that each item keeps (B,), checked, on the latents' device."""
        given, n_books = n_acoustic_books, len(self.books) - 1
        shape = tuple(given.shape) if isinstance(given, Tensor) else (len(given),)
        if shape != latents.shape[:1]:
            raise ValueError(f"n_acoustic_books must be of shape {(len(latents),)}, not {shape}")
        counts = given.tolist() if isinstance(given, Tensor) else given
        if not all(1 <= count <= n_books for count in counts):
            raise ValueError(f"n_acoustic_books must lie in 1..{n_books}, not {counts}")
        return torch.as_tensor(given).to(latents.device, non_blocking=True)

    def look_up(self, codes: Tensor, mask: Tensor | None) -> Tensor:
        """Sum of the quantized latents of codes (B, k, F), k <= K: (B, F, D)."""
        codes = codes.clamp(min=0)
        return sum(book.look_up(codes[:, i], mask) for i, book in zip(range(codes.shape[1]), self.books, strict=False))

    def entries(self, n_books: int) -> list[Tensor]:
        """What each entry of the first books adds to the latents: n_books of (N, D)."""
        books = [book for book, _ in zip(self.books, range(n_books), strict=False)]
        device = next(self.parameters()).device
        return [book.look_up(torch.arange(len(book.usage), device=device)[None], None)[0] for book in books]

    def update_usage(self, codes: Tensor, decay: float | Sequence[float] = 0.99) -> list[Tensor]:
        """Updates every book's `usage` from codes (B, K, F), -1 past an item's end, by one decay or by each book's own.

        Returns:
            How often each entry of each book occurred, K of (N,).
        """
        counts = count_codes(codes, [book.size for book in self.books])
        for book, own, rate in zip(self.books, counts, self._each(decay), strict=True):
            book.follow(own, rate)
        return counts

    def revive_dead_codes(
        self,
        projected: list[Tensor],
        mask: Tensor | None,
        generator: torch.Generator,
        threshold: float | Sequence[float],
        trial: float | Sequence[float] = 1.0,
    ) -> list[int]:
        """Revives dead entries of every book from the projected latents (B, F, E) of a batch; returns the counts."""
        counts = []
        rules = zip(self._each(threshold), self._each(trial), strict=True)
        for book, latents, rule in zip(self.books, projected, rules, strict=True):
            candidates = latents.flatten(0, 1) if mask is None else latents[mask]
            counts.append(book.revive(candidates, generator, *rule))
        return counts

    def _each(self, value: float | Sequence[float]) -> Sequence[float]:
        return [value] * len(self.books) if isinstance(value, int | float) else value
