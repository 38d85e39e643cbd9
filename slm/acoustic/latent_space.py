"""What codes of acoustic books add to a codec's latents, in a small space that is well conditioned.

A residual quantizer's books are look-ups in few dimensions each (8 in LM-SPT), so their sum fills a part of the latents
alone. Of it the mean over the training's frames of the same code of book 0 is known already: it is taken off, and added
again on the way back. The principal directions of the rest are kept that hold nearly all of its variance, and along
each it is brought to variance 1. Sums of entries stay sums of entries: what is needed of the codec is one small table a
book.

Shapes: B items, K books that are summed, T frames, V entries of book 0, N of another book, D latent channels of the
codec, d of the small space.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.acoustic.configuration import AcousticError

MOST_FRAMES = 200_000  # that the statistics are of: 4.4 h at 12.5 Hz
PRIOR_FRAMES = 5  # a code's mean is counted as if the mean of all frames had been seen so often with it


class LatentSpace(nn.Module):
    """Codes to points of the small space, and points to latents of the codec. Nothing of it is trained.

    Args:
        sizes: Entries of book 0, and of each of the K books.
        latent_dim: D.
        space_dim: d.
    """

    def __init__(self, sizes: Sequence[int], latent_dim: int, space_dim: int) -> None:
        super().__init__()
        self.n_books = len(sizes) - 1
        self.register_buffer("means", torch.zeros(sizes[0], latent_dim))  # of what is added to each code of book 0
        for book, size in enumerate(sizes):
            self.register_buffer(f"entries_{book}", torch.zeros(size, space_dim))  # of book 0: its mean, negative
        self.register_buffer("directions", torch.zeros(space_dim, latent_dim))  # each as long as its deviation

    def points(self, codes: Tensor) -> Tensor:
        """(B, T, d) in fp32 of codes (B, 1 + K, T), book 0 first; what is -1, in padding, is read as 0."""
        codes = codes.clamp_min(0)
        tables = [getattr(self, f"entries_{book}") for book in range(1 + self.n_books)]
        return sum(F.embedding(codes[:, book], table) for book, table in enumerate(tables))

    def latents(self, points: Tensor, codes: Tensor) -> Tensor:
        """(B, T, D) of points (B, T, d) at codes (B, T) of book 0."""
        return points @ self.directions + F.embedding(codes.clamp_min(0), self.means)


def fit_latent_space(
    n_codes: int, entries: Sequence[Tensor], utterances: Iterable[np.ndarray], share: float
) -> LatentSpace:
    """The means of what the K books add to each code of book 0, and the directions of the rest.

    Args:
        n_codes: V.
        entries: What each entry of each of the K books adds to the latents, (N, D) each.
        utterances: Codes (1 + K, F) to take the statistics from; the first `MOST_FRAMES` frames are read.
        share: Of the variance about the means that the directions hold, in (0, 1].

    Raises:
        AcousticError: The codes of book 0 tell all that the others add.
    """
    tables = [table.detach().double().cpu() for table in entries]
    latent_dim = tables[0].shape[1]
    codes = _first_frames(utterances)
    sums = [sum(table[row] for table, row in zip(tables, some[1:], strict=True)) for some in codes.split(4096, dim=1)]
    counts = torch.bincount(codes[0], minlength=n_codes).double()
    mean = sum(some.sum(dim=0) for some in sums) / codes.shape[1]
    means = PRIOR_FRAMES * mean.expand(n_codes, latent_dim)
    for book_0, some in zip(codes[0].split(4096), sums, strict=True):
        means = means.index_add(0, book_0, some)
    means = means / (counts + PRIOR_FRAMES)[:, None]
    squares = torch.zeros(latent_dim, latent_dim, dtype=torch.float64)
    for book_0, some in zip(codes[0].split(4096), sums, strict=True):
        squares += (some - means[book_0]).T @ (some - means[book_0])
    variances, vectors = torch.linalg.eigh(squares / codes.shape[1])
    variances, vectors = variances.flip(0).clamp_min(0), vectors.flip(1).T
    if not variances[0] > 1e-12:
        raise AcousticError(
            f"corpus: in {codes.shape[1]} frames the other codes add the same wherever book 0 is the same, so there is "
            "nothing to predict; is the tokenizer trained, and are there recordings enough?"
        )
    held = variances.cumsum(0) / variances.sum()
    n_directions = min(int((held < share).sum()) + 1, int((variances > 1e-9 * variances[0]).sum()))
    deviations, vectors = variances[:n_directions].sqrt(), vectors[:n_directions]
    space = LatentSpace([n_codes, *map(len, tables)], latent_dim, n_directions)
    for book, table in enumerate([-means, *tables]):
        getattr(space, f"entries_{book}").copy_(table @ vectors.T / deviations)
    space.directions.copy_(deviations[:, None] * vectors)
    space.means.copy_(means)
    return space


def _first_frames(utterances: Iterable[np.ndarray]) -> Tensor:
    """The first `MOST_FRAMES` frames, (1 + K, frames)."""
    found, n_frames = [], 0
    for codes in utterances:
        found.append(torch.from_numpy(codes.astype(np.int64)))
        n_frames += codes.shape[1]
        if n_frames >= MOST_FRAMES:
            break
    return torch.cat(found, dim=1)
