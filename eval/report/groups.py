"""Rows that may be compared, together: a group for each protocol, with its caption, labels and further tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.protocol import Protocol
from eval.report.lengths import length_table
from eval.report.shared import rows_once, shared_notes
from eval.report.skips import skip_table
from eval.report.tables import MeasureTable
from eval.schema import Results, Row
from eval.stats import FEW
from eval.systems import is_task, system_name, systems_of
from eval.text.wer import OFFICIAL

__all__ = ["Group", "caption_of", "groups_of", "intervals_of", "label_of", "lengths_of", "skips_in"]


@dataclass
class Group:
    """Rows of one protocol; ``beside`` are rows of another protocol on the same test set, shown for orientation.

    ``rows`` hold what a tokenizer makes once where several cells have it, as ``notes`` say; ``each`` are every cell's.
    """

    protocol: Protocol
    rows: list[Row]
    beside: list[Row] = field(default_factory=list)
    each: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def heading(self) -> str:
        if self.protocol.task == "asr":
            ours = all(is_task(row.system) for row in self.rows)
            return "Speech recognition by the SLM" if ours else "Transcripts"
        if self.protocol.task != "speech":
            return f"What {system_name(self.protocol.task)} writes"
        return f"Speech as judge {self.protocol.judge.get('name', '?')} reads it"


def _ordered(rows: Sequence[Row]) -> list[Row]:
    systems = systems_of(row.system for row in rows)

    def place(row: Row) -> tuple[Any, ...]:
        rate = row.system != "ground_truth" and -(row.frame_rate_hz or 0)
        return (systems.index(row.system), rate, row.label, row.model)

    return sorted(rows, key=place)


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """One group for each protocol, judges before the SLM's own texts, those by task, in order of first appearance."""
    by_key: dict[str, Group] = {}
    for row in rows:
        by_key.setdefault(row.protocol.key(), Group(row.protocol, [])).rows.append(row)
    tasks = ["speech", *systems_of({group.protocol.task for group in by_key.values()} - {"speech"})]
    groups = sorted(by_key.values(), key=lambda group: tasks.index(group.protocol.task))
    for group in groups:
        group.each = _ordered(group.rows)
        group.rows, group.notes = _ordered(rows_once(group.each)), shared_notes(group.each)
        if group.protocol.task != "speech":
            # What a judge hears in the recordings and in the codes is where the SLM's own loss begins.
            same = [g for g in groups if g.protocol.task == "speech" and _same_test(g.protocol, group.protocol)]
            group.beside = [row for row in same[0].rows if not is_task(row.system)] if same else []
    return groups


def _same_test(a: Protocol, b: Protocol) -> bool:
    one, other = a.comparable_by(), b.comparable_by()
    return all(one[key] == other[key] for key in ("normaliser", "normaliser version", "aggregation", "test set"))


def caption_of(group: Group) -> str:
    """The line above a group's table: judge, test set, normaliser and how the intervals were drawn."""
    protocol = group.protocol
    names = dict.fromkeys(row.protocol.name for row in group.rows if row.protocol.name)
    named = f"protocol {' or '.join(names)}, " if names else ""
    against = ", against the judge's own transcript of the recordings" if protocol.reference == "judge" else ""
    official = f"; official: {OFFICIAL[protocol.official]}" if protocol.official in OFFICIAL else ""
    return (
        f"{group.heading} ({named}{protocol.test_set.name}, {protocol.test_set.n} utterances{against}, "
        f"normaliser {protocol.normaliser} {protocol.normaliser_version}; {' or '.join(intervals_of(group))}{official})"
    )


def intervals_of(group: Group) -> list[str]:
    """How the rows' intervals came about: rows may be compared whose intervals were drawn in other ways."""
    found = list(dict.fromkeys(row.protocol.interval_text() for row in group.rows))
    few = any(row.interval_by == "wilson" for row in group.rows)
    widened = f", widened to Wilson's over words where fewer than {FEW} utterances have errors or all words are wrong"
    return [text + widened * few for text in found]


def label_of(row: Row, rows: Sequence[Row]) -> str:
    """A row's label, with its model where another row has the same label."""
    return f"{row.label}, {row.model}" if sum(other.label == row.label for other in rows) > 1 else row.label


def lengths_of(group: Group, results: Results) -> MeasureTable | None:
    """A group's error rates by length of text, where the results name lengths."""
    return length_table(group.rows, [label_of(row, group.rows) for row in group.rows], results.text_lengths)


def skips_in(group: Group) -> MeasureTable | None:
    """What went wrong in a group's speech, where something was spoken from text."""
    return skip_table(group.rows, [label_of(row, group.rows) for row in group.rows])
