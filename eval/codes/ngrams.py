"""How predictable the codes of one book are: a small n-gram model, trained on one split and measured on another.

The probabilities are interpolated by Witten and Bell's rule (Chen and Goodman 1999, section 2.5), down to the uniform
distribution: nothing has to be tuned, and no code of the measured split is impossible. An utterance begins with a mark
of its own; its end is not predicted.

Shapes: F codes of one utterance, N codes of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["NGramModel", "held_out_bits"]


@dataclass(frozen=True)
class _Order:
    """Counts of one length of history; histories and n-grams are numbers, sorted."""

    grams: np.ndarray  # history * (size + 1) + code
    gram_counts: np.ndarray
    histories: np.ndarray
    history_counts: np.ndarray
    continuations: np.ndarray  # different codes seen after each history


class NGramModel:
    """A Witten-Bell interpolated n-gram model over the codes of one book.

    Args:
        utterances: codes (F,) of each, from 0 to `size` - 1.
        size: entries of the book.
        order: 1 for unigrams, 2 for bigrams and so on.

    Raises:
        ValueError: an n-gram does not fit 63 bits, or there is no code to learn from.
    """

    def __init__(self, utterances: Iterable[np.ndarray], size: int, order: int) -> None:
        if order < 1 or (size + 1) ** order >= 2**63:
            raise ValueError(f"order={order}: must be at least 1, and {size + 1} ** order below 2 ** 63")
        self.size, self.order = size, order
        histories, codes = self._events(list(utterances))
        if not len(codes):
            raise ValueError("no codes to learn a language model from")
        self._orders = [self._count(histories[length], codes) for length in range(order)]

    def _events(self, utterances: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
        """The history of each code as a number, for each length from 0, and the codes (N,)."""
        begin = np.full(self.order - 1, self.size, dtype=np.int64)
        parts: list[list[np.ndarray]] = [[] for _ in range(self.order)]
        for codes in utterances:
            padded = np.concatenate([begin, codes.astype(np.int64)])
            history = np.zeros(len(codes), dtype=np.int64)
            parts[0].append(history)
            for back in range(1, self.order):  # the code `back` places before is the history's higher digit
                at = self.order - 1 - back
                history = history + padded[at : at + len(codes)] * (self.size + 1) ** (back - 1)
                parts[back].append(history)
        codes = [codes.astype(np.int64) for codes in utterances]
        joined = [np.concatenate(part) if part else np.zeros(0, np.int64) for part in [*parts, codes]]
        return joined[:-1], joined[-1]

    def _count(self, histories: np.ndarray, codes: np.ndarray) -> _Order:
        grams, gram_counts = np.unique(histories * (self.size + 1) + codes, return_counts=True)
        found, first, continuations = np.unique(grams // (self.size + 1), return_index=True, return_counts=True)
        return _Order(grams, gram_counts, found, np.add.reduceat(gram_counts, first), continuations)

    def log2_probabilities(self, utterances: Iterable[np.ndarray]) -> np.ndarray:
        """The binary logarithm of each code's probability after those before it, (N,)."""
        histories, codes = self._events(list(utterances))
        probability = np.full(len(codes), 1 / self.size)
        for history, counts in zip(histories, self._orders, strict=True):
            seen = _looked_up(counts.histories, counts.history_counts, history)
            kinds = _looked_up(counts.histories, counts.continuations, history)
            times = _looked_up(counts.grams, counts.gram_counts, history * (self.size + 1) + codes)
            known = seen > 0
            total = np.where(known, seen + kinds, 1)
            probability = np.where(known, (times + kinds * probability) / total, probability)
        return np.log2(probability)


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[key] for each wanted key, 0 where it is not among the sorted keys."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def held_out_bits(
    train: Sequence[np.ndarray], held_out: Sequence[np.ndarray], size: int, orders: Sequence[int] = (1, 2, 3)
) -> dict[int, float]:
    """Order -> bits for each code of utterances that the model has not seen; perplexity is 2 ** bits.

    Args:
        train: codes (F,) of the utterances that are counted.
        held_out: codes (F,) of the utterances that are predicted.
        size: entries of the book.
        orders: lengths of n-grams; those that do not fit are left out.

    Raises:
        ValueError: nothing to learn from or to predict.
    """
    if not sum(map(len, held_out)):
        raise ValueError("no codes to predict")
    fitting = [order for order in orders if order * math.log2(size + 1) < 63]
    return {o: float(-NGramModel(train, size, o).log2_probabilities(held_out).mean()) for o in fitting}
