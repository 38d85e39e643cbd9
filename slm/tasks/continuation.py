"""Continuation: the beginning of an utterance in, the speech that follows out.

How it is scored. What a continuation should say is not known: many would do, and without times of the words it is not
even known which of the transcript's words the prompt has said already. So there is no reference and no error rate of
words. What is counted are the faults of its end (cut off, looping, silent) and its length beside that of the speech
that did follow; a judge's reading of it and the measures of audio that need no recording are shown beside. Whether it
makes sense is judged elsewhere: by listeners, or by a text LM's perplexity of what a recogniser reads in it (GSLM,
arXiv 2102.01192).

An encoder that is not causal has heard the whole utterance: the last codes of a prompt know a little of what follows.
"""

from __future__ import annotations

import numpy as np

from slm.tasks.registry import Mark, Speech, Task, Turn, UtteranceTokens, register

CONTINUE = "<|continue|>"


def split_codes(codes: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(K, F) codes -> the first `share` of their frames and the rest; each gets one frame where there are two.

    >>> [part.shape[1] for part in split_codes(np.zeros((1, 10)), 0.3)]
    [3, 7]
    """
    frames = codes.shape[1]
    first = frames if share >= 1 else min(max(1, round(frames * share)), max(1, frames - 1))
    return codes[:, :first], codes[:, first:]


def turn(utterance: UtteranceTokens) -> Turn:
    """`<|speech|> first codes <|/speech|> <|continue|>` -> `<|speech|> the other codes <|/speech|>`."""
    first, rest = (None, None) if utterance.codes is None else split_codes(utterance.codes, utterance.prompt_share)
    return Turn(prompt=[Speech(first), Mark(CONTINUE)], answer=[Speech(rest)])


CONTINUATION = register(Task("continuation", "speech", turn, marks=(CONTINUE,), reference=None, continues=True))
