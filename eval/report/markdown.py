"""Results as Markdown, ready for a document, a model card or an issue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.report.answer import answers
from eval.report.columns import DIFFERENCE
from eval.report.groups import groups_of
from eval.report.overview import overview_table
from eval.report.scores import group_tables, score_table
from eval.report.tables import measure_tables
from eval.schema import Results

__all__ = ["MARKDOWN_FILE", "results_markdown", "write_markdown"]

MARKDOWN_FILE = "results.md"
_NOTE = (
    f"WER and CER over the corpus with 95 % bootstrap intervals; {DIFFERENCE} is the paired difference from the row "
    "named. A failed utterance counts as all its words missed."
)


def results_markdown(results: Results) -> str:
    """Every table of the report: the scores of each judge and test set, the codes, the audio's quality."""
    command = [f"`{results.command}`", ""] if results.command else []
    said = [line for answer in answers(results) for line in (answer, "")]
    text = [f"# {results.title}", "", *command, *said, _NOTE, ""]
    if (overview := overview_table(results)) is not None:
        text += [f"## {overview.title}", "", overview.note, ""]
        text += _table(overview.headings, overview.lines, overview.names)
    for group in groups_of(results.rows):
        scores = score_table(group)
        text += [f"## {scores.title}", "", scores.note, ""]
        text += _table(scores.headings, scores.lines, scores.names)
        text += [line for note in group.notes for line in (note, "")]
        for more in group_tables(group, results):
            text += [f"### {more.title}", "", more.note, ""]
            text += _table(more.headings, more.lines, more.names)
    for measures in measure_tables(results):
        text += [f"## {measures.title}", "", measures.note, ""]
        text += _table(measures.headings, measures.lines, measures.names)
    if results.notes:
        text += ["## Notes", "", *(f"- {note}" for note in results.notes), ""]
    return "\n".join(text)


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]], names: int) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

    marks = "".join("---|" if i < names else "---:|" for i in range(len(headings)))
    return [line(headings), f"|{marks}", *map(line, lines), ""]


def write_markdown(results: Results, folder: Path | str) -> Path:
    """Write ``results.md`` into a folder."""
    target = Path(folder) / MARKDOWN_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(results_markdown(results), encoding="utf-8")
    return target
