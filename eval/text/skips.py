"""Words that speech skipped or said again, from the alignment of a text with what a recogniser heard in its speech.

What goes wrong when text and speech lose each other: a word or a phrase is not said, or is said twice. Counted on
jiwer's alignment (the fewest errors):

- A word is **skipped** where the alignment deletes it; two or more in a row are a **skipped phrase**.
- A word is **repeated** where the alignment inserts it as part of a run of words that stands twice, one behind the
  other, in what was heard, and once in the text at that place: "bin blue bin blue at" for "bin blue at" has two.
  Other inserted words (something else was said, or heard) are not counted, nor is a word in another's place.
- An utterance without an answer has all its words skipped, as it has in WER.

A recogniser mishears too: read these beside those of the recordings.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jiwer
import numpy as np

from eval.stats import bootstrap_interval
from eval.text.wer import UtteranceErrors

__all__ = ["SkipRates", "Skips", "skip_rates", "skips_of"]

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, and its bits as if drawn


@dataclass(frozen=True)
class Skips:
    """Counts of one utterance: words skipped, phrases of two words or more among these, words said again."""

    skipped: int
    skipped_phrases: int
    repeated: int


@dataclass(frozen=True)
class SkipRates:
    """Counts of all utterances; intervals are of words skipped and of words repeated per word of the text."""

    skipped: int
    skipped_phrases: int
    repeated: int
    n_words: int
    skipped_interval: tuple[float, float] | None = None
    repeated_interval: tuple[float, float] | None = None


def skips_of(reference: Sequence[str], hypothesis: Sequence[str], alignment: Sequence[jiwer.AlignmentChunk]) -> Skips:
    """The counts of one utterance.

    Args:
        reference: words of the text (N,).
        hypothesis: words heard (M,).
        alignment: of the two, as jiwer gives it.
    """
    deleted = [chunk.ref_end_idx - chunk.ref_start_idx for chunk in alignment if chunk.type == "delete"]
    inserted = {
        place: chunk.ref_start_idx
        for chunk in alignment
        if chunk.type == "insert"
        for place in range(chunk.hyp_start_idx, chunk.hyp_end_idx)
    }
    return Skips(sum(deleted), sum(count > 1 for count in deleted), _repeated(inserted, reference, hypothesis))


def _repeated(inserted: Mapping[int, int], reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """How many inserted words are in a run of words that is heard twice in a row and stands in the text there.

    A run of s words stands there where it is found among the s words before and the s words behind the insertion. Runs
    of one length are looked for in the whole utterance at once: it may be hours long.

    Args:
        inserted: place in what was heard -> how many words of the text are before it; in order of the places.
        reference: words of the text (N,).
        hypothesis: words heard (M,).
    """
    numbers: dict[str, int] = {}
    said, heard = (
        np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.uint64)
        for words in (reference, hypothesis)
    )
    waiting = list(inserted)  # those that are in no such run so far, in order
    # Whether the run that starts there may stand in the text. Once it does not, no longer one does.
    stands = np.ones(len(heard), bool)
    hashes_said, hashes_heard = np.zeros(len(said) + 1, np.uint64), np.zeros(len(heard) + 1, np.uint64)
    # One said again has all its words inserted, so no run is longer than there are insertions.
    for size in range(1, min(len(inserted), len(said), len(heard) // 2) + 1):
        # A polynomial of each run's words modulo 2^64: runs of different hashes differ.
        hashes_said = hashes_said[:-1] * _BASE + said[size - 1 :]
        hashes_heard = hashes_heard[:-1] * _BASE + heard[size - 1 :]
        twice = np.flatnonzero(hashes_heard[:-size] == hashes_heard[size:])
        twice = twice[stands[twice]]
        if not (waiting and twice.size):
            continue
        stands[twice] = np.isin(hashes_heard[twice], hashes_said)
        for start in twice[stands[twice]].tolist():
            run = heard[start : start + size]
            first = bisect_left(waiting, start)
            for place in waiting[first : bisect_left(waiting, start + 2 * size, first)]:
                near = max(0, inserted[place] - size)
                alike = near + np.flatnonzero(hashes_said[near : inserted[place] + 1] == hashes_heard[start])
                if np.array_equal(run, heard[start + size : start + 2 * size]) and any(
                    np.array_equal(run, said[at : at + size]) for at in alike.tolist()
                ):
                    waiting.remove(place)
    return len(inserted) - len(waiting)


def skip_rates(
    utterances: Sequence[UtteranceErrors], speakers: Sequence[str] | None = None, samples: int = 10_000, seed: int = 0
) -> SkipRates:
    """The counts of all utterances, of texts as they were normalised, with bootstrap intervals.

    Args:
        utterances: at least one.
        speakers: of each, to draw speakers; None draws utterances.
        samples: resamples of the intervals.
        seed: of the resamples.
    """
    found = jiwer.process_words([u.reference for u in utterances], [u.hypothesis or "" for u in utterances])
    aligned = zip(found.references, found.hypotheses, found.alignments, strict=True)
    skips, words = [skips_of(*one) for one in aligned], [u.n_words for u in utterances]
    drawing = {"speakers": speakers, "samples": samples, "seed": seed}
    return SkipRates(
        skipped=sum(one.skipped for one in skips),
        skipped_phrases=sum(one.skipped_phrases for one in skips),
        repeated=sum(one.repeated for one in skips),
        n_words=sum(words),
        skipped_interval=bootstrap_interval([one.skipped for one in skips], words, **drawing),
        repeated_interval=bootstrap_interval([one.repeated for one in skips], words, **drawing),
    )
