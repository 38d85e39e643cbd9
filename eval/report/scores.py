"""The table of a group's error rates, and all tables of results in one order: what every writer of documents shows."""

from __future__ import annotations

from eval.report.columns import NARROW_COLUMNS, columns_of
from eval.report.contrasts import COLUMNS, blocks
from eval.report.groups import Group, caption_of, groups_of, label_of, lengths_of, skips_in
from eval.report.overview import overview_table
from eval.report.tables import MeasureTable, measure_tables
from eval.schema import Results

__all__ = ["contrast_tables", "document_tables", "group_tables", "score_table"]


def score_table(group: Group) -> MeasureTable:
    """A line for each row: its rates with their intervals, and the row that its difference is against."""
    columns = columns_of(group, NARROW_COLUMNS)
    different = any(row.difference for row in group.rows)
    lines = []
    for row in group.rows:
        cells = [label_of(row, group.rows), *(text_of(row) for _, text_of, _ in columns)]
        lines.append([*cells, row.difference.against if row.difference else ""] if different else cells)
    headings = ["system", *(heading for heading, _, _ in columns), *(["against"] if different else [])]
    note = f"Judge: {_judge(group.protocol.judge)}."
    return MeasureTable(caption_of(group), note, headings, lines, 1, list(range(len(headings))))


def _judge(judge: dict[str, object]) -> str:
    known = [f"{key} {judge[key]}" for key in ("decoding", "num_beams", "ctc_weight", "revision") if judge.get(key)]
    return ", ".join([str(judge.get("name", "none, the system's own transcript")), *known])


def group_tables(group: Group, results: Results) -> list[MeasureTable]:
    """A group's further tables: by length of text, and what went wrong in speech."""
    return [table for table in (lengths_of(group, results), skips_in(group)) if table is not None]


def contrast_tables(results: Results) -> list[MeasureTable]:
    """One for each contrast's name and groups of cells."""
    found = []
    for block in blocks(results.contrasts):
        note = f"a: {block['a']}; b: {block['b']} ({block['counts']}). The difference is {block['scope']}."
        title = f"Contrast: {block['name']}"
        found.append(MeasureTable(title, note, list(COLUMNS), block["lines"], 2, list(range(len(COLUMNS)))))
    return found


def document_tables(results: Results) -> list[MeasureTable]:
    """Every table of the results: at a glance, contrasts, each group's, and what is no error rate."""
    overview = overview_table(results)
    found = [overview] if overview is not None else []
    found += contrast_tables(results)
    for group in groups_of(results.rows):
        found += [score_table(group), *group_tables(group, results)]
    return found + measure_tables(results)
