"""Results as plain text for a terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.report.answer import answers
from eval.report.columns import CER, DIFFERENCE, NARROW_COLUMNS, columns_of
from eval.report.contrasts import COLUMNS, blocks
from eval.report.groups import Group, caption_of, groups_of, label_of, lengths_of, skips_in
from eval.report.overview import overview_table
from eval.report.tables import MeasureTable, fitting, measure_tables
from eval.schema import Results

__all__ = ["format_measures", "format_table"]

_LEFT_OUT_FIRST = ("RTF", "S+D+I/N", CER, "tokens/s")
_NAME_WIDTH = 24  # a longer name is folded before a column is left out


def format_table(results: Results, width: int = 110) -> str:
    """The tables as plain text for a terminal of ``width`` columns: one for each task and judge."""
    console, stream = _console(width)
    for group in groups_of(results.rows):
        _print_group(console, group, width)
        for more in (lengths_of(group, results), skips_in(group)):
            if more is not None:
                _print_table(console, more, width)
    overview = overview_table(results)
    for measures in [*measure_tables(results, briefly=True), *([overview] if overview else [])]:
        _print_table(console, measures, width)
    for block in blocks(results.contrasts, each=False):
        _print_contrasts(console, block)
    for answer in answers(results):
        console.print(Text(answer))
    return _text_of(stream)


def format_measures(tables: Sequence[MeasureTable], width: int = 110) -> str:
    """Tables of measures as plain text for a terminal of ``width`` columns."""
    console, stream = _console(width)
    for table in tables:
        _print_table(console, table, width)
    return _text_of(stream)


def _console(width: int) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=width, color_system=None), stream


def _text_of(stream: io.StringIO) -> str:
    """What was printed, without the spaces that fill its lines."""
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _print_group(console: Console, group: Group, width: int) -> None:
    """The error rates of one group, with the recordings' own beside them, and what its differences are against."""
    console.print(Text(caption_of(group)))  # as a table's title it would be folded to the table's width
    truth = [row for row in group.beside if row.system == "ground_truth"]
    shown = Group(group.protocol, group.rows, truth)
    # The others' differences belong to their own table.
    lines = [(label_of(row, group.rows), row, True) for row in group.rows]
    lines += [(f"{row.protocol.judge.get('name', '?')} on {row.label}", row, False) for row in truth]
    columns = {
        heading: [text(row) if own or heading != DIFFERENCE else "" for _, row, own in lines]
        for heading, text, _ in columns_of(shown, NARROW_COLUMNS)
    }
    names = [label for label, _, _ in lines]
    for heading in _LEFT_OUT_FIRST:
        if _natural_width(names, columns) > width:
            columns.pop(heading, None)
    table = Table(box=SIMPLE_HEAD)
    table.add_column("system", overflow="fold")
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, name in enumerate(names):
        cells = (Text(texts[number]) for texts in columns.values())
        table.add_row(Text(name), *cells, end_section=number == len(group.rows) - 1)
    console.print(table)
    for note in group.notes:
        console.print(Text(note))
    against: dict[str, list[str]] = {}
    for name, row, own in lines:
        if own and row.difference:
            against.setdefault(row.difference.against, []).append(name)
    for other, of in against.items():
        console.print(Text(f"{DIFFERENCE} against {other}" + (f": {', '.join(of)}" if len(against) > 1 else "")))
    if against:
        console.print()


def _print_contrasts(console: Console, block: dict[str, Any]) -> None:
    """The contrasts of one name and of the same groups of cells."""
    console.print(Text(f"{block['name']} (a: {block['a']}; b: {block['b']}): {block['scope']}"))
    table = Table(box=SIMPLE_HEAD)
    narrow = ("p", "p, MAPSSWE", "smallest detectable")  # left out: a terminal has no room for them
    shown = [i for i, heading in enumerate(COLUMNS) if heading not in narrow]
    for heading in (COLUMNS[i] for i in shown):
        narrowest = {"row": 14}.get(heading)
        whole = "points" in heading or heading == "reading"
        table.add_column(heading, min_width=narrowest, no_wrap=whole, overflow="fold")
    for line in block["lines"]:
        table.add_row(*(Text(line[i]) for i in shown))
    console.print(table)


def _print_table(console: Console, measures: MeasureTable, width: int) -> None:
    """One table for a terminal, in as many parts as its width asks for."""
    console.print(Text(f"{measures.title}. {measures.note}"))
    for columns in _fitting(measures, width):
        table = Table(box=SIMPLE_HEAD)
        for i in columns:
            words = i < measures.names
            table.add_column(
                measures.headings[i], justify="left" if words else "right", overflow="fold", no_wrap=not words
            )
        for line in measures.lines:
            table.add_row(*(Text(line[i]) for i in columns))
        console.print(table)
    for line in measures.below:
        console.print(Text(line))
    if measures.below:
        console.print()


def _fitting(table: MeasureTable, width: int) -> list[list[int]]:
    """The columns that a terminal shows, in as many tables as its width asks for, each with the columns of words."""
    words = [i for i in table.narrow if i < table.names]
    numbers = [i for i in table.narrow if i >= table.names]
    needs = {i: max(len(line[i]) for line in [table.headings, *table.lines]) for i in table.narrow}
    taken = sum(min(_NAME_WIDTH, needs[i]) + 3 for i in words)  # a longer name is folded
    return [[*words, *(numbers[i] for i in group)] for group in fitting([needs[i] for i in numbers], width - taken)]


def _natural_width(names: Sequence[str], columns: dict[str, list[str]]) -> int:
    """Characters that a terminal table needs: two beside each column's text, one between columns and at either end."""
    widths = [max(map(len, [heading, *texts])) for heading, texts in columns.items()]
    return 1 + sum(width + 3 for width in [min(_NAME_WIDTH, max(map(len, names))), *widths])
