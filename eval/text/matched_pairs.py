"""The matched-pairs test of the field: whether two recognisers differ on the same utterances.

Shapes: U utterances.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import jiwer
import numpy as np

__all__ = ["MatchedPairs", "matched_pairs_test"]

GOOD_WORDS = 2  # so many words in a row that both have right part two segments, as in NIST's sc_stats


@dataclass(frozen=True)
class MatchedPairs:
    """What the test found. ``p_value`` is two-sided; None where no spread tells anything: fewer than two segments, or
    the same difference in all. The test takes the mean of segments as normal, for which 50 are few."""

    n_segments: int
    mean_difference: float
    p_value: float | None


def matched_pairs_test(
    references: Sequence[str], hypotheses_a: Sequence[str | None], hypotheses_b: Sequence[str | None]
) -> MatchedPairs:
    """The matched-pairs sentence-segment word error test, MAPSSWE (Gillick and Cox, ICASSP 1989).

    A segment is a stretch of an utterance in which one system or both have errors, parted from the next by
    ``GOOD_WORDS`` words that both have right: errors in different segments hardly depend on each other. With z_i the
    errors of A less those of B in segment i, the mean of z over its standard error is held against the normal
    distribution. Aligned by jiwer; NIST's tool aligns with other weights and may cut a few segments elsewhere.

    Args:
        references: normalised texts (U,).
        hypotheses_a: what system A heard (U,), normalised alike; None counts as nothing.
        hypotheses_b: what system B heard (U,).

    Raises:
        ValueError: lists of different lengths.
    """
    if not len(references) == len(hypotheses_a) == len(hypotheses_b):
        raise ValueError(
            f"{len(references)} references, {len(hypotheses_a)} and {len(hypotheses_b)} hypotheses: give one of each "
            "for every utterance"
        )
    slots_a, slots_b = (_slots(references, hypotheses) for hypotheses in (hypotheses_a, hypotheses_b))
    pairs = zip(slots_a, slots_b, strict=True)
    differences = np.array([z for a, b in pairs for z in _segments(a, b)], dtype=np.float64)
    if not differences.any():
        return MatchedPairs(len(differences), 0.0, 1.0)
    mean, n = float(differences.mean()), len(differences)
    spread = float(differences.std(ddof=1)) if n > 1 else 0.0
    if spread == 0:
        return MatchedPairs(n, mean, None)
    z = abs(mean) / (spread / math.sqrt(n))
    return MatchedPairs(n, mean, 2 * (1 - NormalDist().cdf(z)))


def _slots(references: Sequence[str], hypotheses: Sequence[str | None]) -> list[list[int]]:
    """For each utterance of N words 2 N + 1 counts: insertions before word i at 2 i, its own error at 2 i + 1."""
    if not references:
        return []
    output = jiwer.process_words(list(references), [text or "" for text in hypotheses])
    found = []
    for words, chunks in zip(output.references, output.alignments, strict=True):
        slots = [0] * (2 * len(words) + 1)
        for chunk in chunks:
            if chunk.type == "insert":
                slots[2 * chunk.ref_start_idx] += chunk.hyp_end_idx - chunk.hyp_start_idx
            elif chunk.type != "equal":
                for i in range(chunk.ref_start_idx, chunk.ref_end_idx):
                    slots[2 * i + 1] += 1
        found.append(slots)
    return found


def _segments(a: Sequence[int], b: Sequence[int]) -> Iterator[int]:
    """Errors of A less those of B in each segment of an utterance."""
    difference, errors, good = 0, False, 0
    for place, (mine, other) in enumerate(zip(a, b, strict=True)):
        if mine or other:
            if errors and good >= GOOD_WORDS:
                yield difference
                difference = 0
            difference, errors, good = difference + mine - other, True, 0
        elif place % 2:
            good += 1
    if errors:
        yield difference
