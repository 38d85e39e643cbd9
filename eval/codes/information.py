"""Entropy of discrete labels, and what two of them tell of each other.

All figures are in bits and estimated from counts (the maximum-likelihood or "plug-in" estimate). A finite sample shows
too little entropy and too much mutual information: what labels in random order would show stands beside the latter.

Shapes: N pairs of labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Information", "entropy_bits", "mutual_information"]


@dataclass(frozen=True)
class Information:
    """What label x and label y tell of each other, in bits.

    Attributes:
        mutual_bits: I(x; y), by counts.
        chance_bits: the mean of I(x; y) over random orders of y, when neither tells anything of the other.
        entropy_x_bits: H(x).
        entropy_y_bits: H(y).
        n: pairs.
    """

    mutual_bits: float
    chance_bits: float
    entropy_x_bits: float
    entropy_y_bits: float
    n: int

    @property
    def share_of_y(self) -> float | None:
        """I(x; y) / H(y): the share of what y is that x tells. None where y never varies.

        With codes for x and phones for y it is the phone-normalised mutual information (PNMI) of HuBERT (Hsu et al.
        2021, section IV-D).
        """
        return self.mutual_bits / self.entropy_y_bits if self.entropy_y_bits > 0 else None

    @property
    def adjusted_share_of_y(self) -> float | None:
        """The same adjusted for chance: 0 for labels in random order, 1 where x says what y is.

        As Vinh, Epps and Bailey (2010, "Information theoretic measures for clusterings comparison", eq. 12) adjust it,
        against H(y). None where chance alone tells as much as there is: the sample is too small.
        """
        room = self.entropy_y_bits - self.chance_bits
        return (self.mutual_bits - self.chance_bits) / room if room > 1e-9 else None


def entropy_bits(counts: np.ndarray) -> float:
    """Entropy in bits of a distribution that counts (any shape) estimate; 0 where nothing was counted."""
    counts = np.asarray(counts, dtype=np.float64).ravel()
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(share * np.log2(share)).sum()) + 0.0


def mutual_information(x: np.ndarray, y: np.ndarray, orders: int = 10, seed: int = 0) -> Information:
    """What two labels of the same frames tell of each other.

    Args:
        x: integer labels (N,), such as codes.
        y: integer labels (N,), such as characters.
        orders: random orders of y for the level of chance.
        seed: of these orders.

    Raises:
        ValueError: the two differ in length, or there is no pair.
    """
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"labels must be pairs, at least one: shapes {x.shape} and {y.shape}")
    _, x_index, x_counts = np.unique(x, return_inverse=True, return_counts=True)
    _, y_index, y_counts = np.unique(y, return_inverse=True, return_counts=True)
    own_x, own_y = entropy_bits(x_counts), entropy_bits(y_counts)

    def mutual(second: np.ndarray) -> float:
        joint = np.unique(x_index.astype(np.int64) * len(y_counts) + second, return_counts=True)[1]
        return max(0.0, own_x + own_y - entropy_bits(joint))

    rng = np.random.default_rng(seed)
    chance = float(np.mean([mutual(rng.permutation(y_index)) for _ in range(orders)]))
    return Information(mutual(y_index), chance, own_x, own_y, len(x))
