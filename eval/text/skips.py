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

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer

from eval.stats import bootstrap_interval
from eval.text.wer import UtteranceErrors

__all__ = ["SkipRates", "Skips", "skip_rates", "skips_of"]


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
    inserted = [
        (place, chunk.ref_start_idx)
        for chunk in alignment
        if chunk.type == "insert"
        for place in range(chunk.hyp_start_idx, chunk.hyp_end_idx)
    ]
    repeated = sum(_is_repeated(place, where, len(inserted), reference, hypothesis) for place, where in inserted)
    return Skips(sum(deleted), sum(count > 1 for count in deleted), repeated)


def _is_repeated(place: int, where: int, longest: int, reference: Sequence[str], hypothesis: Sequence[str]) -> bool:
    """Whether an inserted word is in a run of words that is heard twice in a row and stands in the text there.

    Args:
        place: of the word in what was heard.
        where: how many words of the text are before it.
        longest: words of the longest run that is looked for: one said again has all its words inserted.
        reference: words of the text.
        hypothesis: words heard.
    """
    for size in range(1, min(longest, len(reference), len(hypothesis) // 2) + 1):
        near = reference[max(0, where - size) : where + size]
        for start in range(max(0, place - 2 * size + 1), min(place, len(hypothesis) - 2 * size) + 1):
            run = hypothesis[start : start + size]
            twice = run == hypothesis[start + size : start + 2 * size]
            if twice and any(run == near[first : first + size] for first in range(len(near) - size + 1)):
                return True
    return False


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
