"""One table of several systems: what they share once, a line for each, and why a score is missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import tone
from test_contrasts import cell

from eval.codes import code_statistics
from eval.contrasts import make_contrasts
from eval.protocol import TestSet
from eval.report.groups import groups_of
from eval.report.markdown import results_markdown
from eval.report.overview import overview_table
from eval.report.page import write_report
from eval.report.terminal import format_table
from eval.results_file import load_results, save_results
from eval.schema import Clip, Difference, Results, Row, Sample
from eval.text.translation import can_score_translations, score_translations
from recipes.comparison.cells import Axis, AxisValue, cells_of


def rows_of(
    name: str, wrong: int, seed: int, kinds: tuple[str, ...], tokenizer: int = 1, model: str = "t"
) -> list[Row]:
    """A cell's rows: those of its tokenizer, with ``tokenizer`` words wrong, and those of its tasks."""
    method, made = name.rpartition("-")[0], cell(tokenizer)
    told = [row for row in cell(wrong, seed=seed) if row.system in kinds]
    told += [
        dataclasses.replace(row, system="slm-tts-aligned", name="SLM tts-aligned")
        for row in cell(wrong, seed=seed)
        if row.system == "tts" and "slm-tts-aligned" in kinds
    ]
    own = [row for row in made if row.system.endswith("reconstruction")] if model else []
    rows = [dataclasses.replace(row, model=model) for row in own] + told
    rows = [dataclasses.replace(row, cell=name, method=method, seed=seed, frame_rate_hz=12.5) for row in rows]
    truth = next(row for row in made if row.system == "ground_truth")
    for row in rows:
        if row.system == "tts" and row.protocol.key() == truth.protocol.key():
            row.difference = Difference(f"{name}: semantic_reconstruction", 0.1, (0.0, 0.2), 0.1)
    return [truth, *rows]


@pytest.fixture
def systems() -> Results:
    """Two seeds of a system with both tasks, one of a system that only hears, one that says texts by another task."""
    rows = [row for seed in (0, 1) for row in rows_of(f"ours-s{seed}", 2 + seed, seed, ("asr", "tts"))]
    rows += rows_of("hears-s0", 1, 0, ("asr",), model="")
    rows += rows_of("says-s0", 3, 0, ("slm-tts-aligned",))
    rows += rows_of("other-s0", 3, 0, ("asr", "tts"), tokenizer=3, model="u")
    kept = {id(row): row for row in rows if row.system != "ground_truth"}
    results = Results("systems", [rows[0], *kept.values()])
    results.without = {"hears-s0": {"tts": "no way back to sound"}}
    results.codes = [
        dataclasses.replace(code_statistics([np.array([[0, 1, 2]])], [4], 12.5, "t"), cell=name)
        for name in ("ours-s0", "says-s0")
    ]
    return results


def test_what_a_tokenizer_makes_for_several_cells_stands_there_once(systems: Results) -> None:
    first = groups_of(systems.rows)[0]
    labels = [row.label for row in first.rows]
    assert [label for label in labels if "reconstruction" in label and "semantic" not in label] == [
        "other-s0: reconstruction",
        "reconstruction of t",
    ]
    assert first.notes == ["t is the tokenizer of ours-s0, ours-s1, says-s0."]
    assert len(first.each) == len(first.rows) + 4  # plots and contrasts by method see every cell's
    ours = next(row for row in first.rows if row.label == "ours-s1: tts")
    assert ours.difference.against == "semantic_reconstruction of t"
    for text in (format_table(systems), results_markdown(systems)):
        assert text.count("t is the tokenizer of ours-s0, ours-s1, says-s0.") == 2  # once for each judge
        assert "ours-s0: reconstruction" not in text
    assert [line for line in results_markdown(systems).splitlines() if line.startswith("| t | 12.5 |")]


def test_another_hypothesis_is_another_row(systems: Results) -> None:
    changed = next(row for row in systems.rows if row.cell == "says-s0" and row.system == "reconstruction")
    changed.utterances[0] = dataclasses.replace(changed.utterances[0], hypothesis="other words")
    labels = [row.label for row in groups_of(systems.rows)[0].rows]
    assert "says-s0: reconstruction" in labels and "reconstruction of t" in labels


def test_a_line_for_each_method_with_reasons_for_what_is_missing(systems: Results) -> None:
    table = overview_table(systems)
    assert table.headings == [
        *("system", "ASR", "TTS, teacher", "TTS, second <judge>"),
        *("semantic reconstruction, teacher", "semantic reconstruction, second <judge>"),
    ]
    lines = {line[0]: line[1:] for line in table.lines}
    assert list(lines) == ["ours", "hears", "says", "other"]
    wers = [100 * row.wer for row in systems.rows if row.cell.startswith("ours") and row.system == "asr"]
    assert lines["ours"][0] == f"{sum(wers) / 2:.1f} ({wers[0]:.1f}, {wers[1]:.1f})"
    assert lines["hears"][0].endswith("]")  # one model: its interval
    assert lines["hears"][1:] == ["\u2013 (a)", "\u2013 (a)", "\u2013 (b)", "\u2013 (b)"]
    assert lines["says"][0] == "\u2013 (b)" and lines["says"][1][0].isdigit()
    assert "(a) no way back to sound; (b) it was not asked." in table.note
    assert all(cell for line in table.lines for cell in line)


def test_the_overview_is_on_the_page_and_in_results(systems: Results, tmp_path: Path) -> None:
    save_results(systems, tmp_path)
    again = load_results(tmp_path)
    assert again.without == systems.without
    page = write_report(again, tmp_path).read_text("utf-8")
    assert page.index("<h2>Overview</h2>") < page.index("<h2>Speech as judge") and "no way back to sound" in page
    # Once for each judge, in its scores and in what went wrong.
    assert page.count('<th scope="row" class="system">reconstruction of t</th>') == 4
    one = Results("one", [row for row in systems.rows if row.cell in ("", "ours-s0")])
    assert overview_table(one) is None
    tokenizers = Results("tokenizers", [row for row in systems.rows if "reconstruction" in row.system])
    assert overview_table(tokenizers) is None


@pytest.mark.skipif(not can_score_translations(), reason="sacrebleu is not installed")
def test_translations_show_their_bleu(systems: Results) -> None:
    asr = next(row for row in systems.rows if row.system == "asr" and row.cell == "ours-s0")
    scores = score_translations(asr.utterances, samples=100)
    protocol = dataclasses.replace(asr.protocol, task="slm-st", test_set=TestSet("t, translation", "1", 4))
    systems.rows.append(dataclasses.replace(asr, system="slm-st", protocol=protocol, translation=scores))
    table = overview_table(systems)
    assert table.headings[-1] == "SLM st" and table.lines[0][-1].startswith(f"BLEU {scores.bleu:.1f} [")


def test_speech_of_different_tasks_is_contrasted_as_tts_and_a_shared_tokenizer_is_not(systems: Results) -> None:
    by_cell = {name: [row for row in systems.rows if row.cell == name] for name in ("ours-s0", "ours-s1", "says-s0")}
    ours = {name: by_cell[name] for name in ("ours-s0", "ours-s1")}
    found = make_contrasts("x", ours, {"says-s0": by_cell["says-s0"]})
    assert [(c.system, c.judge) for c in found] == [("tts", "teacher"), ("tts", "second <judge>")]
    same = make_contrasts("x", {"a": by_cell["says-s0"]}, {"b": rows_of("b-s0", 1, 0, ("slm-tts-aligned",))})
    assert [c.system for c in same] == ["slm-tts-aligned", "slm-tts-aligned"]


def test_one_sound_of_several_cells_is_one_player(tmp_path: Path) -> None:
    for name, pitch in (("a", 120), ("b", 120), ("c", 200)):
        soundfile.write(tmp_path / f"{name}.flac", tone(0.1, 16_000, pitch), 16_000)
    clips = [Clip("reconstruction", f"{name}.flac", cell=name) for name in ("a", "b", "c")]
    page = write_report(Results("", [], samples=[Sample("u", "said", clips)]), tmp_path).read_text("utf-8")
    for label in ("a and 1 more: reconstruction", "c: reconstruction"):
        assert f'<th scope="row" class="system">{label}</th>' in page
    assert page.count("<audio") == 2


def test_reasons_come_from_the_axis_value() -> None:
    axes = [Axis("method", {"a": AxisValue(stages=["x"], without={"tts": "why"})}), Axis("seed", {"s0": []})]
    assert cells_of(axes)[0].without == {"tts": "why"}
