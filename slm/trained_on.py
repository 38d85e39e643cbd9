"""What a model's training was like, kept with the model: what lies far from it, the model has never met.

Whoever generates reads from it how long a piece the model knows, how long a text takes to say, and which characters it
has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from slm.decoding.loops import longest_loop

LOOPS_IN = 2000  # utterances


@dataclass(frozen=True)
class TrainedOn:
    """Facts of the utterances that a model was trained on, texts as they were after the normaliser.

    Args:
        characters: Every character of the texts, in order, the space too.
        longest_text: 99 % of the texts have at most so many characters.
        longest_s: 99 % of the utterances last at most so many seconds.
        characters_per_s: The rate of speech: 1 % of the utterances are slower than the first, half are slower than the
            second, 1 % are faster than the third.
        shortest_text: 99 % of the texts have at least so many characters. Of a shorter one the rate says little: there
            is silence around it. None where the model was saved without, as are the next two.
        longest_loop_s: The longest stretch of codes that repeats itself, in seconds: silence, above all.
        longest_text_loop: The longest stretch of text tokens that repeats itself.
        bare_prompts: Share of the answers in speech that were learnt without their prompt.
        wordings: The wordings of each task that has some, (task, wordings); the first is what the model is asked in
            where nobody says another.
        languages: The column that named the language of a task's answers, (task, column).
        tasks: The tasks that it learnt; none where the model was saved without.
    """

    characters: str
    longest_text: int
    longest_s: float
    characters_per_s: tuple[float, float, float]
    shortest_text: int | None = None
    longest_loop_s: float | None = None
    longest_text_loop: int | None = None
    bare_prompts: float = 0.0
    wordings: tuple[tuple[str, tuple[str, ...]], ...] = ()
    languages: tuple[tuple[str, str], ...] = ()
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # As JSON gives them back, these are lists.
        object.__setattr__(self, "wordings", tuple((task, tuple(wordings)) for task, wordings in self.wordings))
        object.__setattr__(self, "languages", tuple((task, column) for task, column in self.languages))
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "characters_per_s", tuple(float(rate) for rate in self.characters_per_s))

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        seconds: Sequence[float],
        codes: Sequence[np.ndarray] = (),
        text_ids: Sequence[np.ndarray] = (),
        frame_rate: float = 0.0,
    ) -> TrainedOn:
        """The facts of utterances with these texts and durations.

        Args:
            texts: What is said, normalised; at least one, none empty.
            seconds: How long each lasts, above 0.
            codes: (n, F) each, of the n codebooks that the model uses. Loops are looked for in `LOOPS_IN` of them,
                spread over all: a long one takes milliseconds.
            text_ids: (T,) text tokens of each.
            frame_rate: Frames per second.
        """
        lengths, durations = np.array([len(text) for text in texts]), np.asarray(seconds, dtype=float)
        rates = np.quantile(lengths / durations, [0.01, 0.5, 0.99])
        return cls(
            characters="".join(sorted(set().union(*texts))),
            longest_text=int(np.ceil(np.quantile(lengths, 0.99))),
            shortest_text=int(np.quantile(lengths, 0.01)),
            longest_s=round(float(np.quantile(durations, 0.99)), 3),
            characters_per_s=tuple(round(float(rate), 3) for rate in rates),
            longest_loop_s=round(_longest_loop(codes) / frame_rate, 3) if codes else None,
            longest_text_loop=_longest_loop([ids[None] for ids in text_ids]) if text_ids else None,
        )

    def after(self, before: TrainedOn | None) -> TrainedOn:
        """The same for a model that had been trained on `before`: the characters of both, the rest of the latter."""
        if before is None:
            return self
        return replace(self, characters="".join(sorted({*self.characters, *before.characters})))

    @property
    def longest_piece(self) -> int:
        """Characters of a sentence's pieces where it is too long to be said in one go.

        `longest_text` at most, and no more than last `longest_s` at the median rate: of a training with slow and fast
        readers the longest texts were the fast ones', and the model may speak as the slow ones do.
        """
        return max(1, min(self.longest_text, int(self.longest_s * self.characters_per_s[1])))

    def unmet(self, text: str) -> list[str]:
        """The characters of a normalised text that the training never had, each once, in their order."""
        return [character for character in dict.fromkeys(text) if character not in self.characters]


def _longest_loop(sequences: Sequence[np.ndarray]) -> int:
    step = -(-len(sequences) // LOOPS_IN)
    return max(longest_loop(sequence) for sequence in sequences[::step])
