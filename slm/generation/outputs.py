"""What is generated, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slm.decoding.row_rules import FinishReason


@dataclass(frozen=True)
class TranscribeOutput:
    """A transcript, why it ended, and how many tokens it is; `n_best`: the likeliest texts where several were asked."""

    text: str
    finish_reason: FinishReason
    n_tokens: int
    n_best: tuple[str, ...] = ()

    @property
    def truncated(self) -> bool:
        """Whether the model did not end it."""
        return self.finish_reason != "stop"


@dataclass(frozen=True)
class SaidWord:
    """How many frames a word of an answer by word has, why its speech ended, and how often it was drawn."""

    n_frames: int
    finish_reason: FinishReason
    draws: int = 1


@dataclass(frozen=True)
class SynthesizeOutput:
    """(n, F) codes, F >= 1 unless the scores were not finite; why they ended, and in which attempt they were drawn.

    `n_passes` are the model's forward passes where one may give several tokens (`decoding.multi_token`); else 0. Of a
    task by word `words` are those that were said, whose frames are F together.
    """

    codes: np.ndarray
    finish_reason: FinishReason
    attempts: int = 1
    n_passes: int = 0
    words: tuple[SaidWord, ...] = ()

    @property
    def n_words_redrawn(self) -> int:
        """Words that were drawn more than once (`decoding.word_retries`)."""
        return sum(word.draws > 1 for word in self.words)

    @property
    def truncated(self) -> bool:
        """Whether the model did not end them."""
        return self.finish_reason != "stop"
