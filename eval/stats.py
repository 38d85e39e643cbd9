"""Intervals for corpus error rates: the bootstrap over utterances, and its paired form for a difference.

Shapes: U utterances, R resamples.

Utterances, not words, are resampled: the errors of one utterance depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["PairedDifference", "bootstrap_interval", "paired_bootstrap"]

_CELLS_PER_BLOCK = 4_000_000  # bounds the memory of one block of resamples (int64)


def _resamples(n_utterances: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield blocks of indices (R, U), drawn with replacement; the same for the same seed."""
    rng = np.random.default_rng(seed)
    block = max(1, _CELLS_PER_BLOCK // n_utterances)
    for start in range(0, samples, block):
        yield rng.integers(0, n_utterances, size=(min(block, samples - start), n_utterances))


def _rate(errors: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Sum over the last axis and divide; NaN where a resample holds no word."""
    total = words.sum(-1)
    return np.where(total > 0, errors.sum(-1) / np.maximum(total, 1), np.nan)


def _check(errors: Sequence[int], words: Sequence[int], samples: int, confidence: float) -> tuple[np.ndarray, ...]:
    errors_array, words_array = np.asarray(errors, dtype=np.int64), np.asarray(words, dtype=np.int64)
    if errors_array.shape != words_array.shape or errors_array.ndim != 1:
        raise ValueError(f"errors {errors_array.shape} and words {words_array.shape} must be two lists of one length")
    if samples < 1 or not 0 < confidence < 1:
        raise ValueError(f"samples must be at least 1 and confidence between 0 and 1, not {samples} and {confidence}")
    return errors_array, words_array


def _percentiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = 50 * (1 - confidence)
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


def bootstrap_interval(
    errors: Sequence[int],
    words: Sequence[int],
    *,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the corpus error rate ``sum(errors) / sum(words)``.

    Args:
        errors: word errors of each utterance (U,).
        words: reference words of each utterance (U,).
        samples: number of resamples.
        seed: makes the interval repeatable.
        confidence: 0.95 gives the 95 % interval.

    Returns:
        (low, high), or None where there is no interval: fewer than two utterances, or no reference word.

    Raises:
        ValueError: lists of different lengths, or settings out of range.
    """
    errors_array, words_array = _check(errors, words, samples, confidence)
    if len(errors_array) < 2 or words_array.sum() == 0:
        return None
    rates = [_rate(errors_array[index], words_array[index]) for index in _resamples(len(errors_array), samples, seed)]
    return _percentiles(np.concatenate(rates), confidence)


@dataclass(frozen=True)
class PairedDifference:
    """Error rate of system A minus that of system B on the same utterances; negative means that A is better.

    ``p_value`` is two-sided: how often the resampled difference has the other sign (at least 2 / (resamples + 1)).
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    n_utterances: int


def paired_bootstrap(
    ids_a: Sequence[str],
    errors_a: Sequence[int],
    ids_b: Sequence[str],
    errors_b: Sequence[int],
    words_a: Sequence[int],
    words_b: Sequence[int],
    *,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedDifference:
    """Paired bootstrap of the difference of two systems' corpus error rates; utterances are matched by id.

    Raises:
        ValueError: the two systems were not scored on the same utterances (ids, or reference words of one of them,
            differ), an id occurs twice, or there are fewer than two utterances.
    """
    a_errors, a_words = _check(errors_a, words_a, samples, confidence)
    b_errors, b_words = _check(errors_b, words_b, samples, confidence)
    for ids, errors in ((ids_a, a_errors), (ids_b, b_errors)):
        if len(ids) != len(errors) or len(set(ids)) != len(ids):
            raise ValueError("every utterance needs one id of its own")
    if set(ids_a) != set(ids_b):
        odd = sorted(set(ids_a) ^ set(ids_b))
        raise ValueError(
            f"the two systems were not scored on the same utterances: {len(odd)} ids are in one only (such as "
            f"{odd[0]!r}); score both on one test set"
        )
    position = {name: i for i, name in enumerate(ids_b)}
    order = np.array([position[name] for name in ids_a], dtype=np.int64)
    b_errors, b_words = b_errors[order], b_words[order]
    if not np.array_equal(a_words, b_words):
        odd_id = ids_a[int(np.flatnonzero(a_words != b_words)[0])]
        raise ValueError(f"utterance {odd_id!r} has references of different lengths: use one normaliser for both")
    if len(a_errors) < 2 or a_words.sum() == 0:
        raise ValueError("a paired bootstrap needs at least two utterances with words")
    deltas = a_errors - b_errors
    drawn = np.concatenate([_rate(deltas[index], a_words[index]) for index in _resamples(len(deltas), samples, seed)])
    drawn = drawn[~np.isnan(drawn)]
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return PairedDifference(
        difference=float(deltas.sum() / a_words.sum()),
        interval=_percentiles(drawn, confidence),
        p_value=float(min(1.0, 2 * (tail + 1) / (len(drawn) + 1))),
        n_utterances=len(deltas),
    )
