"""A text as the model reads it: UTF-8 bytes, each of them some word's. No vocabulary has to be fitted or kept.

Shapes: B items, L bytes, W words, D width.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

BYTES = 257  # 0 is padding; byte b is b + 1


def spell(text: str) -> tuple[np.ndarray, np.ndarray]:
    """A normalised text -> its bytes, from 1, and the number of each one's word; both (L,) int64.

    Words stand between spaces; the space in front of a word is the word's.

    >>> [part.tolist() for part in spell("a bc")]
    [[98, 33, 99, 100], [0, 1, 1, 1]]
    """
    words = [(word if number == 0 else f" {word}").encode() for number, word in enumerate(text.split())]
    numbers = np.repeat(np.arange(len(words)), [len(word) for word in words])
    return np.frombuffer(b"".join(words), np.uint8).astype(np.int64) + 1, numbers.astype(np.int64)


def words_from_bytes(states: Tensor, word_of_byte: Tensor) -> tuple[Tensor, Tensor]:
    """Mean state of each word's bytes.

    Args:
        states: (B, L, D).
        word_of_byte: (B, L), -1 in padding.

    Returns:
        (B, W, D), and which of the W are words of the item: (B, W) bool.
    """
    n_words = int(word_of_byte.max()) + 1
    members = F.one_hot(word_of_byte.clamp_min(0), n_words) * (word_of_byte >= 0)[..., None]
    counts = members.sum(dim=1)
    sums = members.transpose(1, 2).to(states.dtype) @ states
    return sums / counts.clamp_min(1)[..., None], counts > 0


def bytes_from_words(vectors: Tensor, word_of_byte: Tensor) -> Tensor:
    """Each byte's word's vector (B, L, D) of vectors (B, W, D); in padding any."""
    return vectors.gather(1, word_of_byte.clamp_min(0)[..., None].expand(-1, -1, vectors.shape[-1]))
