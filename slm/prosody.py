"""Word prosody as tokens: measured values cut into bins, and what a user asks of them.

ProsodyLM (arXiv 2507.20091) gives an LLM the prosody of each word as tokens. Here they are three a word, in this order:
duration, F0, energy. The edges between bins are quantiles of the training split, so that all bins of a feature are
about equally frequent there; a word without F0 has a bin of its own.

Shapes: W words; values and bins (W, 3), a column for each of `FEATURES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

FEATURES = ("duration", "f0", "energy")
DURATION, F0, ENERGY = range(3)
SPEEDS = {"slow": -2, "normal": 0, "fast": 2}  # bins


class ProsodyError(ValueError):
    """Bins or a wish that cannot be; the message says which and the way out."""


@dataclass(frozen=True)
class ProsodyBins:
    """Where each feature is cut.

    Args:
        edges: Of each feature the values between its bins, in rising order: n - 1 of n bins.
    """

    edges: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", tuple(tuple(float(edge) for edge in own) for own in self.edges))
        lengths = {len(own) for own in self.edges}
        if len(self.edges) != len(FEATURES) or len(lengths) != 1 or lengths == {0}:
            raise ProsodyError(f"prosody: edges of {len(self.edges)} features; {', '.join(FEATURES)} need as many each")
        if any((np.diff(own) < 0).any() for own in self.edges):
            raise ProsodyError("prosody: the edges of a feature must rise")

    @classmethod
    def of(cls, values: np.ndarray, n_bins: int) -> ProsodyBins:
        """The quantiles of a training split's values (W, 3), NaN where a word has no F0.

        Raises:
            ProsodyError: Fewer than two bins, or a feature without values.
        """
        if n_bins < 2:
            raise ProsodyError(f"prosody_bins: {n_bins} must be at least 2")
        if values.ndim != 2 or not np.isfinite(values).any(axis=0).all():
            missing = [name for name, own in zip(FEATURES, values.T, strict=False) if not np.isfinite(own).any()]
            raise ProsodyError(f"no word of the train split has a value of {', '.join(missing) or 'anything'}")
        shares = np.arange(1, n_bins) / n_bins
        return cls(tuple(tuple(np.round(np.nanquantile(own, shares), 6)) for own in values.T))

    @property
    def n(self) -> int:
        """Bins of a feature, that of words without F0 aside."""
        return len(self.edges[0]) + 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each feature: F0 has one more, for words without it, behind its bins."""
        return self.n, self.n + 1, self.n

    def cut(self, values: np.ndarray) -> np.ndarray:
        """(W, 3) values, NaN where there is no F0 -> (W, 3) int64 bins.

        >>> ProsodyBins(((0.0,), (0.0,), (0.0,))).cut(np.array([[-1.0, np.nan, 0.5]])).tolist()
        [[0, 2, 1]]
        """
        features = zip(self.edges, values.T, strict=True)
        bins = np.stack([np.searchsorted(edges, own, "right") for edges, own in features], axis=1).astype(np.int64)
        bins[np.isnan(values[:, F0]), F0] = self.n
        return bins

    def token_names(self) -> list[str]:
        """Names of the tokens, feature by feature."""
        names = [f"<|{name}_{place}|>" for name in FEATURES for place in range(self.n)]
        names.insert(2 * self.n, "<|f0_none|>")
        return names


@dataclass
class ProsodyControl:
    """What is asked beside the prosody that the model writes by itself, which it is added to."""

    speed: int | Literal["slow", "normal", "fast"] = field(
        default=0,
        metadata={
            "help": "bins that every word's duration is lowered by: +2 is fast, -2 slow, which can be written so too"
        },
    )
    emphasis: list[str] = field(
        default_factory=list,
        metadata={"help": "words whose duration, F0 and energy are raised, wherever they stand in a text: [red]"},
    )
    emphasis_bins: int = field(default=2, metadata={"help": "bins that they are raised by"})

    def __post_init__(self) -> None:
        if self.emphasis_bins < 1:
            raise ProsodyError(f"prosody.emphasis_bins: {self.emphasis_bins} must be at least 1")

    @property
    def asks(self) -> bool:
        """Whether anything is asked."""
        return bool(self.emphasis or self.faster)

    @property
    def faster(self) -> int:
        """`speed` in bins."""
        return self.speed if isinstance(self.speed, int) else SPEEDS[self.speed]

    def apply(self, bins: np.ndarray, words: Sequence[str], n_bins: int, emphasised: Sequence[str]) -> np.ndarray:
        """The bins (W, 3) that are asked for; what would leave the range stays at its end.

        A word without F0 keeps none.

        Args:
            bins: What the model wrote.
            words: Of the text, as many.
            n_bins: Of a feature.
            emphasised: `emphasis`, written as `words` are.

        >>> control = ProsodyControl(speed=1, emphasis=["b"])
        >>> control.apply(np.array([[3, 3, 3], [3, 8, 7]]), ["a", "b"], 8, ["b"]).tolist()
        [[2, 3, 3], [4, 8, 7]]
        """
        asked = bins.astype(np.int64)
        asked[:, DURATION] -= self.faster
        asked[[word in emphasised for word in words]] += self.emphasis_bins
        asked = asked.clip(0, n_bins - 1)
        asked[bins[:, F0] == n_bins, F0] = n_bins
        return asked
