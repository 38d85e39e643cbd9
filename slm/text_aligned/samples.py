"""What a text-aligned model is trained on: an utterance's semantic codes, its text, and where known its words' frames.

Shapes: B items, F frames, L bytes, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from slm.text_aligned.text import spell


@dataclass(frozen=True)
class Item:
    """One utterance.

    Args:
        codes: (F,) semantic codes.
        text: (L,) bytes of the text, from 1.
        word_of_byte: (L,) number of each one's word.
        spans: (W, 2) first frame of each word and the one behind its last; -1 where they are not known.
    """

    codes: np.ndarray
    text: np.ndarray
    word_of_byte: np.ndarray
    spans: np.ndarray


def make_item(codes: np.ndarray, text: str, word_frames: Sequence[int] | None = None) -> Item:
    """An utterance of semantic codes (F,) and a normalised text.

    Args:
        codes: Of the whole utterance.
        text: Words between spaces.
        word_frames: How many of the frames are each word's, all together F; None where that is not known.
    """
    spelled, word_of_byte = spell(text)
    spans = np.full((len(text.split()), 2), -1, dtype=np.int64)
    if word_frames is not None:
        ends = np.cumsum(word_frames)
        spans = np.stack([ends - np.asarray(word_frames), ends], axis=1)
    return Item(np.asarray(codes, dtype=np.int64), spelled, word_of_byte, spans)


class TextAlignedSamples(Dataset):
    """Sample n of a training without end, drawn from (seed, n) alone: each utterance once an epoch, in a new order.

    Args:
        items: What it draws from.
        length: Samples of the whole training.
        text_alone: Share of the samples whose speech is to be rebuilt from the text alone.
        seed: Decides order and which these are.
    """

    def __init__(self, items: Sequence[Item], length: int, text_alone: float, seed: int) -> None:
        self.items, self.length, self.text_alone, self.seed = items, length, text_alone, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=int))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> tuple[Item, bool]:
        """An item, and whether its word vectors are given."""
        epoch, place = divmod(position, len(self.items))
        if self._order[0] != epoch:
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.items))
            self._order = (epoch, order)
        with_speech = np.random.default_rng((self.seed, 1, position)).random() >= self.text_alone
        return self.items[self._order[1][place]], bool(with_speech)


def collate(samples: Sequence[tuple[Item, bool]]) -> dict[str, Tensor]:
    """Samples as one batch, padded to the longest: what :meth:`TextAlignedModel.forward` takes."""
    items = [item for item, _ in samples]
    return {
        "codes": _padded([item.codes for item in items], -1),
        "text": _padded([item.text for item in items], 0),
        "word_of_byte": _padded([item.word_of_byte for item in items], -1),
        "with_speech": torch.tensor([with_speech for _, with_speech in samples]),
        "spans": _padded([item.spans for item in items], -1),
    }


def _padded(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """Arrays (n, ...) as one (B, largest n, ...)."""
    longest = max(len(row) for row in rows)
    widths = [[(0, longest - len(row))] + [(0, 0)] * (row.ndim - 1) for row in rows]
    padded = [np.pad(row, width, constant_values=value) for row, width in zip(rows, widths, strict=True)]
    return torch.from_numpy(np.stack(padded).astype(np.int64))
