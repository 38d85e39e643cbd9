"""Corpus word and character error rates, with every count kept per utterance so that intervals can be drawn from them.

What is counted, and how the edges are handled:

- WER = (S + D + I) / N over the whole corpus, N the number of reference words; CER the same over characters, single
  spaces between words included.
- A hypothesis of ``None`` means that the system gave no answer (unreadable audio, a crash). It is counted in
  ``n_failed`` AND scored as if every reference word had been deleted: a system never looks better for failing.
- An empty hypothesis is an answer: all words deleted, not failed.
- An empty reference adds nothing to N; words heard there are insertions. If no reference has a word, the rates are
  ``None``: there is nothing to divide by.
- Beside the corpus rate stands the mean of the utterances' own rates, and the share of them above 50 %, over the
  utterances whose reference has a word. Papers on speech synthesis often publish that mean; it weighs short utterances
  more, and one that went wrong altogether may count more than 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import jiwer
from rapidfuzz.distance import Levenshtein

from eval.text.normalisers import Normaliser

__all__ = [
    "ALIGNMENTS",
    "OFFICIAL",
    "ErrorRates",
    "UtteranceErrors",
    "align_text",
    "aligned_words",
    "error_listing",
    "official_rate",
    "rates_of",
    "score_pairs",
    "sclite_counts",
]

ALIGNMENTS = ("jiwer", "sclite")
# How a protocol's authors come by their number, where it is not the corpus rate over all utterances.
OFFICIAL = {"mean-of-answered": "mean of the utterances' own WER, those without an answer left out"}


@dataclass(frozen=True)
class UtteranceErrors:
    """Counts of one utterance; ``reference`` and ``hypothesis`` are the normalised texts that were compared.

    ``reference_text`` and ``hypothesis_text`` are those before normalising, to score them again by other rules; the
    first is None in results of older versions, which did not keep them. ``speaker`` is empty and ``duration`` (seconds)
    None where they are not known.
    """

    id: str
    reference: str
    hypothesis: str | None
    substitutions: int
    deletions: int
    insertions: int
    n_words: int
    character_errors: int
    n_characters: int
    speaker: str = ""
    duration: float | None = None
    reference_text: str | None = None
    hypothesis_text: str | None = None

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float | None:
        """The utterance's own WER; None where its reference has no word."""
        return self.errors / self.n_words if self.n_words else None


@dataclass(frozen=True)
class ErrorRates:
    """Corpus rates, their counts, and the utterances they were summed from.

    ``n_scored`` utterances had a hypothesis, ``n_failed`` had none; both are in the rates. ``mean_wer`` is the mean of
    the utterances' own rates, ``above_half`` the share of those above 50 %.
    """

    wer: float | None
    cer: float | None
    substitutions: int
    deletions: int
    insertions: int
    n_words: int
    n_characters: int
    n_scored: int
    n_failed: int
    utterances: list[UtteranceErrors] = field(repr=False)
    mean_wer: float | None = None
    above_half: float | None = None


def _counts(alignment: list[jiwer.AlignmentChunk]) -> tuple[int, int, int]:
    """(substitutions, deletions, insertions) of one alignment."""
    substitutions = sum(c.ref_end_idx - c.ref_start_idx for c in alignment if c.type == "substitute")
    deletions = sum(c.ref_end_idx - c.ref_start_idx for c in alignment if c.type == "delete")
    insertions = sum(c.hyp_end_idx - c.hyp_start_idx for c in alignment if c.type == "insert")
    return substitutions, deletions, insertions


def sclite_counts(reference: Sequence[str], hypothesis: Sequence[str]) -> tuple[int, int, int]:
    """(substitutions, deletions, insertions) as NIST's sclite aligns.

    It minimises 4 S + 3 (D + I), so that a word that was missed and another that was added elsewhere stay apart, where
    the fewest errors would call some of them substitutions; the sum may be larger than jiwer's. Of alignments that cost
    the same, one with the fewest errors counts.

    Args:
        reference: words said (N,).
        hypothesis: words heard (M,).
    """
    base = len(reference) + len(hypothesis) + 1  # more than there can be errors: they decide between equal costs alone
    weights = (3 * base + 1, 3 * base + 1, 4 * base + 1)  # insertion, deletion, substitution
    cost, errors = divmod(Levenshtein.distance(reference, hypothesis, weights=weights), base)
    substitutions = cost - 3 * errors
    deletions = (errors - substitutions + len(reference) - len(hypothesis)) // 2
    return substitutions, deletions, errors - substitutions - deletions


def score_pairs(
    references: Sequence[str],
    hypotheses: Sequence[str | None],
    normaliser: Normaliser,
    ids: Sequence[str] | None = None,
    speakers: Sequence[str] | None = None,
    durations: Sequence[float | None] | None = None,
    alignment: str = "jiwer",
) -> ErrorRates:
    """Score hypotheses against references, utterance by utterance and for the corpus.

    Args:
        references: what was said.
        hypotheses: what was heard, in the same order; ``None`` where the system failed.
        normaliser: applied to both sides.
        ids: utterance ids, kept with the counts; positions ("0", "1", ...) where absent.
        speakers: who spoke each utterance, kept with the counts; empty where unknown.
        durations: how long each is in seconds, kept with the counts; None where unknown.
        alignment: of words, one of ``ALIGNMENTS``: the fewest errors as jiwer counts them, or :func:`sclite_counts`.

    Raises:
        ValueError: unequal lengths, no utterances at all, an id that occurs twice, or an unknown alignment.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment {alignment!r} is unknown: one of {', '.join(ALIGNMENTS)}")
    ids = [str(i) for i in range(len(references))] if ids is None else list(ids)
    speakers = [""] * len(ids) if speakers is None else list(speakers)
    durations = [None] * len(ids) if durations is None else list(durations)
    if not len(references) == len(hypotheses) == len(ids) == len(speakers) == len(durations):
        raise ValueError(
            f"references ({len(references)}), hypotheses ({len(hypotheses)}), ids ({len(ids)}), speakers "
            f"({len(speakers)}) and durations ({len(durations)}) differ in number: "
            "give one hypothesis for each reference, None where there is no answer"
        )
    if not ids:
        raise ValueError("there are no utterances to score")
    if len(set(ids)) != len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"utterance id {twice!r} occurs more than once: ids must be unique within a test set")
    expected = [normaliser(text) for text in references]
    found = [None if text is None else normaliser(text) for text in hypotheses]
    filled = [text or "" for text in found]
    if alignment == "sclite":
        counts = [sclite_counts(a.split(), b.split()) for a, b in zip(expected, filled, strict=True)]
    else:
        counts = [_counts(chunks) for chunks in jiwer.process_words(expected, filled).alignments]
    utterances = [
        UtteranceErrors(
            id=ids[i],
            reference=expected[i],
            hypothesis=found[i],
            **dict(zip(("substitutions", "deletions", "insertions"), counts[i], strict=True)),
            n_words=len(expected[i].split()),
            # Their number alone is asked for; jiwer would list every edit, which takes sixty times as long.
            character_errors=Levenshtein.distance(expected[i], filled[i]),
            n_characters=len(expected[i]),
            speaker=speakers[i],
            duration=durations[i],
            reference_text=references[i],
            hypothesis_text=hypotheses[i],
        )
        for i in range(len(ids))
    ]
    return rates_of(utterances)


def rates_of(utterances: Sequence[UtteranceErrors]) -> ErrorRates:
    """The corpus rates of utterances that were aligned already."""
    utterances = list(utterances)
    n_words = sum(u.n_words for u in utterances)
    n_characters = sum(u.n_characters for u in utterances)
    n_failed = sum(u.hypothesis is None for u in utterances)
    own = [u.rate for u in utterances if u.rate is not None]
    return ErrorRates(
        wer=sum(u.errors for u in utterances) / n_words if n_words else None,
        cer=sum(u.character_errors for u in utterances) / n_characters if n_characters else None,
        substitutions=sum(u.substitutions for u in utterances),
        deletions=sum(u.deletions for u in utterances),
        insertions=sum(u.insertions for u in utterances),
        n_words=n_words,
        n_characters=n_characters,
        n_scored=len(utterances) - n_failed,
        n_failed=n_failed,
        utterances=utterances,
        mean_wer=sum(own) / len(own) if own else None,
        above_half=sum(rate > 0.5 for rate in own) / len(own) if own else None,
    )


def official_rate(utterances: Sequence[UtteranceErrors], rule: str) -> float | None:
    """The WER as a protocol's authors compute it, which leaves utterances without an answer out.

    Args:
        utterances: all that were scored.
        rule: one of ``OFFICIAL``.

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in OFFICIAL:
        raise ValueError(f"official rate {rule!r} is unknown: one of {', '.join(OFFICIAL)}")
    rates = [u.rate for u in utterances if u.hypothesis is not None and u.rate is not None]
    return sum(rates) / len(rates) if rates else None


def align_text(reference: str, hypothesis: str) -> str:
    """One line with the errors marked: ``bin (blue->white) at (f->*) (*->and) two``.

    ``(a->b)`` was heard as something else, ``(a->*)`` was missed, ``(*->b)`` was added.
    """
    return " ".join(word for word, _ in aligned_words(reference, hypothesis))


def aligned_words(reference: str, hypothesis: str) -> list[tuple[str, bool]]:
    """The words of :func:`align_text`, each with whether it is an error."""
    output = jiwer.process_words([reference], [hypothesis])
    expected, found = output.references[0], output.hypotheses[0]  # split into words
    words: list[tuple[str, bool]] = []
    for chunk in output.alignments[0]:
        reference_words = expected[chunk.ref_start_idx : chunk.ref_end_idx]
        hypothesis_words = found[chunk.hyp_start_idx : chunk.hyp_end_idx]
        if chunk.type == "equal":
            words += [(word, False) for word in reference_words]
        else:
            pairs = zip_longest(reference_words, hypothesis_words, fillvalue="*")
            words += [(f"({said}->{heard})", True) for said, heard in pairs]
    return words


def error_listing(rates: ErrorRates, title: str = "") -> str:
    """Every utterance as text, worst first, in the style of icefall's error statistics.

    Worst is the larger number of word errors, then the larger share of wrong words, then the id.
    """

    def share(u: UtteranceErrors) -> float:
        return u.errors / max(u.n_words, 1)

    wer = "n/a" if rates.wer is None else f"{100 * rates.wer:.2f} %"
    lines = [
        f"# {title}".rstrip(),
        f"# WER {wer}: {rates.substitutions} substituted, {rates.deletions} deleted, {rates.insertions} inserted "
        f"of {rates.n_words} words; {rates.n_scored} utterances scored, {rates.n_failed} failed",
        "# (said->heard); (said->*) missed; (*->heard) added; worst utterances first",
    ]
    for u in sorted(rates.utterances, key=lambda u: (-u.errors, -share(u), u.id)):
        text = "FAILED: " + u.reference if u.hypothesis is None else align_text(u.reference, u.hypothesis)
        lines.append(f"{u.id}\t{u.errors}/{u.n_words}\t{text}")
    return "\n".join(lines) + "\n"
