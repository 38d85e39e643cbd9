"""Results as files for documents: Markdown, LaTeX (for booktabs) and a CSV of each table."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from eval.report.markdown import write_markdown
from eval.report.scores import document_tables
from eval.report.tables import MeasureTable
from eval.schema import Results

__all__ = ["LATEX_FILE", "TABLES_FOLDER", "results_latex", "write_documents"]

LATEX_FILE, TABLES_FOLDER = "results.tex", "results.tables"
_SPECIAL = {
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\u0394": r"$\Delta$",
    "\u2013": "--",
    "\u2028": " ",  # a line's end to XeTeX
    "\u2029": " ",
}
_OWN = re.compile(r"\d+-[a-z0-9.-]*\.csv")


def write_documents(results: Results, folder: Path | str) -> list[Path]:
    """Write ``results.md``, ``results.tex`` and ``results.tables/NN-title.csv``; tables of before are replaced."""
    folder = Path(folder)
    written = [write_markdown(results, folder), folder / LATEX_FILE]
    written[1].write_text(results_latex(results), encoding="utf-8")
    tables = folder / TABLES_FOLDER
    tables.mkdir(exist_ok=True)
    for path in tables.iterdir():
        if _OWN.fullmatch(path.name):
            path.unlink()
    for number, table in enumerate(document_tables(results), start=1):
        path = tables / f"{number:02d}-{_slug(table.title)}.csv"
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([table.headings, *table.lines])
        written.append(path)
    return written


def results_latex(results: Results) -> str:
    r"""Every table as a ``table`` with its title as the caption; the document needs ``\usepackage{booktabs}``."""
    head = [rf"% {_one_line(results.title)}; needs \usepackage{{booktabs}}", ""]
    return "\n".join([*head, *(line for table in document_tables(results) for line in [*_latex(table), ""])])


def _latex(table: MeasureTable) -> list[str]:
    kinds = "l" * table.names + "r" * (len(table.headings) - table.names)
    rows = [" & ".join(map(_escaped, line)) + r" \\" for line in [table.headings, *table.lines]]
    note = [rf"\par\footnotesize {_escaped(table.note)}"] if table.note else []
    return [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(table.title)}}}",
        rf"\begin{{tabular}}{{{kinds}}}",
        r"\toprule",
        rows[0],
        r"\midrule",
        *rows[1:],
        r"\bottomrule",
        r"\end{tabular}",
        *note,
        r"\end{table}",
    ]


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(sign, sign) for sign in _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _slug(title: str) -> str:
    """A title as part of a file name, its first 48 characters."""
    return re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-.")[:48].strip("-.")
