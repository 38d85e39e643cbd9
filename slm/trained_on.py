"""What a model's training was like, kept with the model: what lies far from it, the model has never met.

Whoever generates reads from it how long a piece the model knows, how long a text takes to say, and which characters it
has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class TrainedOn:
    """Facts of the utterances that a model was trained on, texts as they were after the normaliser.

    Args:
        characters: Every character of the texts, in order, the space too.
        longest_text: 99 % of the texts have at most so many characters.
        longest_s: 99 % of the utterances last at most so many seconds.
        characters_per_s: The rate of speech: 1 % of the utterances are slower than the first, half are slower than the
            second, 1 % are faster than the third.
    """

    characters: str
    longest_text: int
    longest_s: float
    characters_per_s: tuple[float, float, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "characters_per_s", tuple(float(rate) for rate in self.characters_per_s))

    @classmethod
    def of(cls, texts: Sequence[str], seconds: Sequence[float]) -> TrainedOn:
        """The facts of utterances with these texts and durations.

        Args:
            texts: What is said, normalised; at least one, none empty.
            seconds: How long each lasts, above 0.
        """
        lengths, durations = np.array([len(text) for text in texts]), np.asarray(seconds, dtype=float)
        rates = np.quantile(lengths / durations, [0.01, 0.5, 0.99])
        return cls(
            characters="".join(sorted(set().union(*texts))),
            longest_text=int(np.ceil(np.quantile(lengths, 0.99))),
            longest_s=round(float(np.quantile(durations, 0.99)), 3),
            characters_per_s=tuple(round(float(rate), 3) for rate in rates),
        )

    def after(self, before: TrainedOn | None) -> TrainedOn:
        """The same for a model that had been trained on `before`: the characters of both, the rest of the latter."""
        if before is None:
            return self
        return replace(self, characters="".join(sorted({*self.characters, *before.characters})))

    def unmet(self, text: str) -> list[str]:
        """The characters of a normalised text that the training never had, each once, in their order."""
        return [character for character in dict.fromkeys(text) if character not in self.characters]
