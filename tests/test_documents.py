"""Results for documents and for those who do not see the page: LaTeX, CSV, captions, players in a grid."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import soundfile
from test_answer import of, rows_of
from test_report import results  # noqa: F401 - a fixture

from eval.report.documents import results_latex, write_documents
from eval.report.markdown import results_markdown
from eval.report.page import write_report
from eval.report.scores import document_tables
from eval.report.terminal import format_table
from eval.results_file import load_results, save_results
from eval.schema import Clip, Results, Sample


def test_every_table_is_in_latex_and_in_a_csv_of_its_own(results, tmp_path: Path) -> None:  # noqa: F811
    results.rows[0].name = "TTS_1 & 50 % {a}\u2028b"
    tables = document_tables(results)
    write_documents(results, tmp_path)
    latex = (tmp_path / "results.tex").read_text("utf-8")
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == len(tables) >= 4
    assert r"TTS\_1 \& 50 \% \{a\} b" in latex and "\u2028" not in latex
    for body in re.findall(r"\\midrule\n(.*?)\n\\bottomrule", latex, re.DOTALL):
        for line in body.splitlines():
            assert line.endswith(r" \\") and not re.search(r"(?<!\\)[%$#_]", line.replace(r"$\Delta$", ""))
    files = sorted((tmp_path / "results.tables").iterdir())
    assert len(files) == len(tables)
    for file, table in zip(files, tables, strict=True):
        with file.open(encoding="utf-8", newline="") as stream:
            assert list(csv.reader(stream)) == [table.headings, *table.lines]
    (tmp_path / "results.tables" / "notes.csv").write_text("mine", "utf-8")
    write_documents(Results("none", []), tmp_path)  # tables of before are gone, and what is not ours stays
    assert [path.name for path in (tmp_path / "results.tables").iterdir()] == ["notes.csv"]
    assert r"\begin{table}" not in results_latex(Results("none", []))


def test_every_table_of_the_page_has_a_caption_and_names_its_lines(results, tmp_path: Path) -> None:  # noqa: F811
    html = write_report(results, tmp_path).read_text("utf-8")
    tables = re.findall(r"<table.*?</table>", html, re.DOTALL)
    assert len(tables) > 6
    for table in tables:
        assert re.search(r"<caption>[^<]+</caption>", table), table[:200]
        body = table.split("<tbody>")[1]
        assert body.count("<tr") == body.count('<th scope="row"') > 0, table[:200]


def test_the_command_and_what_made_it_stand_on_top(tmp_path: Path) -> None:
    found = of({"a": rows_of("a", 25.0, 4)}, {"b": rows_of("b", 12.5, 1)})
    found.command, found.versions = "slm compare --config '<mine>'", {"commit": "c0ffee", "machine": "2 cores"}
    found.rows[0].seed, found.rows[-1].seed = 0, 1
    save_results(found, tmp_path)
    head = write_report(load_results(tmp_path), tmp_path).read_text("utf-8").split("</header>")[0]
    assert "<code>slm compare --config &#39;&lt;mine&gt;&#39;</code>" in head
    assert "commit c0ffee · machine 2 cores · seeds 0, 1" in head
    assert "`slm compare --config '<mine>'`" in results_markdown(found)


def test_players_are_a_grid_with_errors_marked_and_both_sides_named(tmp_path: Path) -> None:
    for number, name in enumerate(("", "c25", "c12")):
        soundfile.write(tmp_path / f"clip{name}.flac", (0.1 + 0.1 * number) * np.ones(800), 16_000)
    compared = of({"c25": rows_of("c25", 25.0, 4)}, {"c12": rows_of("c12", 12.5, 1)})
    judge = next(row.protocol.judge["name"] for row in compared.rows if row.protocol.judge)

    def clip(cell: str, heard: str) -> Clip:
        return Clip(
            "tts" if cell else "recording",
            str(tmp_path / f"clip{cell}.flac"),
            {judge: heard, "elsewhere": "<raw>"},
            cell,
        )

    compared.samples = [
        Sample("u1", "bin blue", [clip("", "bin blue"), clip("c25", "Bin <blew>!"), clip("c12", "")]),
        Sample("u2", "set red", [clip("c25", "set")]),
    ]
    page = write_report(compared, tmp_path).read_text("utf-8")
    grid = page[page.index('<table class="players">') :].split("</table>")[0]
    lines = grid.split("<tbody>")[1].split("</tr>")[:-1]
    assert len(lines) == 3 and all(line.count("<td>") == 2 for line in lines)  # recording, c25, c12 by u1, u2
    assert ["".join(re.findall(r'class="side">([AB])<', line)) for line in lines] == ["", "A", "B"]
    assert "<mark>(blue-&gt;blew)</mark>" in grid and "<mark>(red-&gt;*)</mark>" in grid and "(nothing)" in grid
    assert "&lt;raw&gt;" in grid and "<raw>" not in grid  # of no row: as it came
    assert grid.count("<audio") == 4 == grid.count("aria-label")


def test_a_terminal_says_why_a_measure_is_missing(results) -> None:  # noqa: F811
    assert "PESQ: no extra" in format_table(results)
