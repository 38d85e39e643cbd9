"""Where a row's errors are, as tables: confusions, speakers, lengths; and its worst utterances to read."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.report.contrasts import p_text
from eval.report.tables import MeasureTable
from eval.schema import Row
from eval.text.breakdown import BREAKDOWN_RESAMPLES, Part, by_duration, by_speaker, confusions
from eval.text.wer import UtteranceErrors, align_text

__all__ = ["error_tables", "format_errors", "worst_utterances"]

MOST_PARTS = 40  # speakers in a table, the worst
_PARTS = ["utterances", "N", "WER % [95 %]", "S", "D", "I"]


def error_tables(row: Row, most: int = 10) -> list[MeasureTable]:
    """The commonest errors, then the rates by speaker and by length where these are known."""
    found = []
    if lines := confusions(row.utterances, most).lines()[:most]:
        note = "(said->heard); (said->*) was missed, (*->heard) was added."
        cells = [[text, str(count)] for text, count in lines]
        found.append(MeasureTable("Commonest errors", note, ["error", "times"], cells, 1, [0, 1]))
    note = (
        f"Intervals: bootstrap over the utterances of a line, {BREAKDOWN_RESAMPLES} resamples, with few errors widened."
    )
    if speakers := by_speaker(row.utterances):
        more = f" The worst {MOST_PARTS} of {len(speakers)}." if len(speakers) > MOST_PARTS else ""
        found.append(_parts("By speaker", note + more, "speaker", speakers[:MOST_PARTS]))
    lengths = by_duration(row.utterances)
    if len(lengths) > 1:
        found.append(_parts("By length of the recording", note, "length", lengths))
    return found


def _parts(title: str, note: str, what: str, parts: Sequence[Part]) -> MeasureTable:
    lines = [
        [
            part.name,
            str(part.n_utterances),
            str(part.n_words),
            _rate(part),
            str(part.substitutions),
            str(part.deletions),
            str(part.insertions),
        ]
        for part in parts
    ]
    return MeasureTable(title, note, [what, *_PARTS], lines, 1, list(range(1 + len(_PARTS))))


def _rate(part: Part) -> str:
    if part.wer is None:
        return "n/a"
    low_high = "" if part.interval is None else " [{:.1f}, {:.1f}]".format(*(100 * edge for edge in part.interval))
    return f"{100 * part.wer:.1f}{low_high}"


def worst_utterances(utterances: Sequence[UtteranceErrors], most: int) -> list[tuple[str, str, str]]:
    """(id, errors/words, aligned text) of the ``most`` utterances with the most errors, then the largest share."""
    bad = sorted((u for u in utterances if u.errors), key=lambda u: (-u.errors, -u.errors / max(1, u.n_words), u.id))
    return [
        (
            u.id,
            f"{u.errors}/{u.n_words}",
            f"failed: {u.reference}" if u.hypothesis is None else align_text(u.reference, u.hypothesis),
        )
        for u in bad[:most]
    ]


def format_errors(rows: Sequence[Row], most: int = 10, worst: int = 5, width: int = 110) -> str:
    """Each row's tables and worst utterances, as plain text for a terminal of ``width`` columns.

    Args:
        rows: of one report.
        most: lines of the table of the commonest errors.
        worst: utterances to read; 0: none.
        width: columns.
    """
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    several = len({str(row.protocol.judge.get("name", "")) for row in rows}) > 1
    for row in rows:
        label = f"{row.label} ({row.protocol.judge.get('name') or 'own text'})" if several else row.label
        if row.difference is not None:
            console.print(Text(_difference(row, label)))
        for measures in error_tables(row, most):
            console.print(Text(f"{label}: {measures.title[:1].lower()}{measures.title[1:]}. {measures.note}"))
            table = Table(box=SIMPLE_HEAD)
            for i, heading in enumerate(measures.headings):
                table.add_column(heading, justify="left" if i < measures.names else "right", overflow="fold")
            for line in measures.lines:
                table.add_row(*map(Text, line))
            console.print(table)
        if found := worst_utterances(row.utterances, worst):
            console.print(Text(f"{label}: utterances with the most errors"))
            for identity, share, text in found:
                console.print(Text(f"  {identity} ({share}): {text}"))
            console.print()
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _difference(row: Row, label: str) -> str:
    found = row.difference
    low, high = (f"{100 * edge:+.1f}" for edge in found.interval)
    segments = ""
    if found.mapsswe_segments:
        p_value = p_text(found.mapsswe_p) or "not defined"
        segments = f"; MAPSSWE p {p_value} ({found.mapsswe_segments} segments)"
    return (
        f"{label} - {found.against}: {100 * found.wer:+.1f} points [{low}, {high}], paired bootstrap p "
        f"{p_text(found.p_value)}{segments}"
    )
