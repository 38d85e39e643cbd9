"""Which codes of a training item the stage may read, and which it is to predict (SoundStorm, section 3.3).

Shapes: K books, T frames; `visible`, `targets` (K, T) bool, `prompt` (T,) bool.
"""

from __future__ import annotations

import math

import numpy as np

from slm.acoustic.configuration import AcousticConfig
from slm.acoustic.samples import Item


def masked_share(progress: float) -> float:
    """MaskGIT's cosine schedule (Chang et al. 2022, section 3.3): the share that is masked at `progress` in [0, 1]."""
    return math.cos(0.5 * math.pi * progress)


def draw_mask(prompt: np.ndarray, n_books: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws one book q of 1..K-1 and what of it is masked.

    The prompt is visible whole. Of the target's frames, books below q are visible, of q a share drawn by the cosine
    schedule is masked and predicted, books above q are masked and not predicted.

    Args:
        prompt: (T,) bool, true on the voice's frames.
        n_books: K.
        rng: Decides the book, the share and the frames.

    Returns:
        `visible` and `targets`, (K, T) bool each; at least one code is a target.
    """
    book = int(rng.integers(1, n_books))
    candidates = np.flatnonzero(~prompt)
    masked = candidates[rng.random(len(candidates)) < masked_share(rng.random())]
    if not len(masked):
        masked = candidates[[rng.integers(len(candidates))]]
    visible, targets = mask_book(prompt, n_books, book)
    targets[book] = False
    targets[book, masked] = True
    visible[book] = ~targets[book]
    return visible, targets


def mask_book(prompt: np.ndarray, n_books: int, book: int) -> tuple[np.ndarray, np.ndarray]:
    """`visible` and `targets` (K, T) where all of the target's codes of `book` are predicted from those below it."""
    visible = np.ones((n_books, len(prompt)), dtype=bool)
    visible[book:, ~prompt] = False
    targets = np.zeros_like(visible)
    targets[book, ~prompt] = True
    return visible, targets


def draw_masked_sample(item: Item, config: AcousticConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """An item with a mask drawn from `rng`."""
    return masked_sample(item, draw_mask(item.is_prompt, config.n_codebooks, rng))


def masked_sample(item: Item, mask: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    """An item with its `visible` and `targets`."""
    visible, targets = mask
    return {"audio_codes": item.codes, "visible": visible, "targets": targets, "prompt": item.is_prompt}
