"""Where the errors are: which words are taken for which, and the rates by speaker and by length of the recording.

Shapes: U utterances.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import jiwer

from eval.stats import bootstrap_interval
from eval.text.wer import UtteranceErrors

__all__ = ["Confusions", "Part", "by_duration", "by_speaker", "confusions"]

DURATION_EDGES = (2.0, 5.0, 10.0, 20.0)  # seconds: a part holds what is as long as its lower edge, or longer
BREAKDOWN_RESAMPLES = 1000  # of a part's interval: there may be many parts


@dataclass(frozen=True)
class Confusions:
    """The commonest errors, each with its count: (said, heard), and words that were missed or added."""

    substitutions: list[tuple[tuple[str, str], int]]
    deletions: list[tuple[str, int]]
    insertions: list[tuple[str, int]]

    def lines(self) -> list[tuple[str, int]]:
        """``(said->heard)`` in the field's form, with ``*`` for nothing; the commonest first."""
        found = [(f"({said}->{heard})", count) for (said, heard), count in self.substitutions]
        found += [(f"({said}->*)", count) for said, count in self.deletions]
        found += [(f"(*->{heard})", count) for heard, count in self.insertions]
        return sorted(found, key=lambda item: (-item[1], item[0]))


@dataclass(frozen=True)
class Part:
    """The rates of some of the utterances. ``interval`` is a bootstrap over them, None for a single one."""

    name: str
    n_utterances: int
    n_words: int
    substitutions: int
    deletions: int
    insertions: int
    wer: float | None
    interval: tuple[float, float] | None


def confusions(utterances: Sequence[UtteranceErrors], most: int = 10) -> Confusions:
    """The ``most`` commonest errors of each kind; utterances without an answer say nothing of what is confused."""
    heard = [u for u in utterances if u.hypothesis is not None]
    said, swapped, missed, added = [u.reference for u in heard], Counter(), Counter(), Counter()
    output = jiwer.process_words(said, [u.hypothesis or "" for u in heard]) if heard else None
    for reference, hypothesis, chunks in (
        zip(output.references, output.hypotheses, output.alignments, strict=True) if output else ()
    ):
        for chunk in chunks:
            expected = reference[chunk.ref_start_idx : chunk.ref_end_idx]
            found = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
            if chunk.type == "substitute":
                swapped.update(zip(expected, found, strict=True))
            elif chunk.type == "delete":
                missed.update(expected)
            elif chunk.type == "insert":
                added.update(found)
    return Confusions(*(_commonest(counter, most) for counter in (swapped, missed, added)))


def _commonest(counter: Counter, most: int) -> list:
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:most]


def by_speaker(utterances: Sequence[UtteranceErrors]) -> list[Part]:
    """One part for each speaker, the worst first; empty where a speaker is not known, or there is one alone."""
    if not all(u.speaker for u in utterances) or len({u.speaker for u in utterances}) < 2:
        return []
    parts: dict[str, list[UtteranceErrors]] = {}
    for u in utterances:
        parts.setdefault(u.speaker, []).append(u)
    found = [_part(name, some) for name, some in parts.items()]
    return sorted(found, key=lambda part: (-1.0 if part.wer is None else -part.wer, part.name))


def by_duration(utterances: Sequence[UtteranceErrors]) -> list[Part]:
    """One part for each range of lengths that has an utterance, the shortest first; empty where a length is unknown."""
    if not utterances or any(u.duration is None for u in utterances):
        return []
    names = [f"under {DURATION_EDGES[0]:g} s"]
    names += [f"{a:g} to {b:g} s" for a, b in zip(DURATION_EDGES, DURATION_EDGES[1:], strict=False)]
    names += [f"{DURATION_EDGES[-1]:g} s and over"]
    parts: list[list[UtteranceErrors]] = [[] for _ in names]
    for u in utterances:
        parts[sum(u.duration >= edge for edge in DURATION_EDGES)].append(u)
    return [_part(name, some) for name, some in zip(names, parts, strict=True) if some]


def _part(name: str, utterances: Sequence[UtteranceErrors]) -> Part:
    errors, words = [u.errors for u in utterances], [u.n_words for u in utterances]
    return Part(
        name=name,
        n_utterances=len(utterances),
        n_words=sum(words),
        substitutions=sum(u.substitutions for u in utterances),
        deletions=sum(u.deletions for u in utterances),
        insertions=sum(u.insertions for u in utterances),
        wer=sum(errors) / sum(words) if sum(words) else None,
        interval=bootstrap_interval(errors, words, samples=BREAKDOWN_RESAMPLES),
    )
