"""Contrasts: groups of cells, row by row, from the configuration to results.json, Markdown, plots and the report."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from eval.contrasts import make_contrasts
from eval.merging import merge_results
from eval.protocol import Protocol, TestSet
from eval.report.contrasts import blocks, contrasts_markdown, reading, write_contrasts
from eval.report.page import write_report
from eval.report.terminal import format_table
from eval.results_file import load_results, save_results
from eval.schema import Results, Row, make_row
from eval.stats import pooled_bootstrap
from eval.text.normalisers import get_normaliser
from eval.text.wer import score_pairs
from recipes.commands import compare
from recipes.comparison.cells import Cell
from recipes.comparison.config import Contrasted
from recipes.comparison.running import make_cells
from recipes.comparison.table import gather
from recipes.config import ConfigError, load_config
from recipes.runs.pipeline import Stage, make_steps, set_aside_from
from recipes.runs.run_folder import RunFolder

TEXTS = ["bin blue at f two now", "set white by g six please", "lay green with a nine soon", "place red in b one again"]
IDS = ["u1", "u2", "u3", "u4"]
JUDGES = ({"name": "teacher", "weights_sha256": "ab"}, {"name": "second <judge>", "weights_sha256": "cd"})


def cell(wrong: int, ids: list[str] = IDS, seed: int | None = 0, **changes) -> list[Row]:
    """The rows of one cell: each kind by each judge, with ``wrong`` words of every utterance misheard."""

    def row(system: str, judge: dict) -> Row:
        test_set = TestSet("t", changes.get("test_set", "0"), 4)
        task = "asr" if system == "asr" else "speech"
        protocol = Protocol(task, judge, "basic", "1", test_set, bootstrap_samples=300)
        counts = [wrong + (i + (seed or 0)) % 2 for i in range(len(TEXTS))]
        heard = [" ".join(["x"] * n + text.split()[n:]) for n, text in zip(counts, TEXTS, strict=True)]
        rates = score_pairs(TEXTS, heard, get_normaliser("basic"), ids)
        about = {key: changes[key] for key in ("method", "frame_rate_hz") if key in changes}
        return make_row(system, system, "m", protocol, rates, seed=seed, **about)

    kinds = ("ground_truth", "reconstruction", "semantic_reconstruction", "resynthesis", "tts")
    return [*(row(kind, judge) for judge in JUDGES for kind in kinds), row("asr", {})]


def test_every_row_by_every_judge_is_contrasted_with_seeds_pooled() -> None:
    a, b = {"a-s0": cell(1), "a-s1": cell(2, seed=1)}, {"b-s0": cell(3)}
    found = make_contrasts("a - b", a, b)
    kinds = [(c.system, c.judge) for c in found]
    assert kinds[:2] == [("reconstruction", "teacher"), ("reconstruction", "second <judge>")]
    assert len(kinds) == 9 and kinds[-1] == ("asr", "") and "ground_truth" not in dict(kinds)
    errors = [[u.errors for u in rows[1].utterances] for rows in (*a.values(), *b.values())]
    expected = pooled_bootstrap(errors[:2], errors[2:], [6] * 4, samples=300)
    one = found[0]
    assert not one.of_methods  # there is one seed of b
    assert (one.difference, one.interval, one.p_value) == (expected.difference, expected.interval, expected.p_value)
    assert one.wers_a == [6 / 24, 10 / 24] and one.wers_b == [14 / 24] and (one.n_words, one.n_utterances) == (24, 4)
    assert (one.a, one.b) == (["a-s0", "a-s1"], ["b-s0"]) and one.smallest_detectable > 0


def test_a_further_task_is_contrasted_behind_the_known_ones(tmp_path) -> None:
    def rows(wrong: int) -> list[Row]:
        asr = cell(wrong)[-1]
        st = dataclasses.replace(asr, system="slm-st", protocol=dataclasses.replace(asr.protocol, task="slm-st"))
        return [st, *cell(wrong)]

    found = make_contrasts("a - b", {"a": rows(1)}, {"b": rows(3)})
    assert [c.system for c in found][-2:] == ["asr", "slm-st"] and len(found) == 10
    assert blocks(found)[0]["lines"][-1][0] == "SLM st"
    assert "SLM st" in write_contrasts(found, "Tasks", tmp_path).read_text()
    assert "SLM st" in (tmp_path / "contrasts.svg").read_text()


def test_utterances_are_matched_by_id() -> None:
    other = cell(3)
    for row in other:
        row.utterances.reverse()
    assert make_contrasts("x", {"a": cell(1)}, {"b": other}) == make_contrasts("x", {"a": cell(1)}, {"b": cell(3)})


def test_several_test_sets_are_contrasted_each_by_itself() -> None:
    def rows(wrong: int, other: int) -> list[Row]:
        digits = cell(other, test_set="1")
        for row in digits:
            row.protocol = dataclasses.replace(row.protocol, test_set=TestSet("digits", "1", 4))
        return cell(wrong) + digits

    found = make_contrasts("a - b", {"a": rows(1, 3)}, {"b": rows(2, 2)})
    assert [c.name for c in found] == ["a - b, t"] * 9 + ["a - b, digits"] * 9
    assert found[0].difference == pytest.approx(-4 / 24) and found[9].difference == pytest.approx(4 / 24)


@pytest.mark.parametrize(
    ("b", "message"),
    [
        ({}, "none empty"),
        ({"a": cell(1)}, "no cell in both"),
        ({"b": cell(1, test_set="1")}, "protocols differ in test set"),
        ({"b": cell(1, ids=["u1", "u2", "u3", "u5"])}, "not scored on the same utterances"),
        ({"b": cell(1) + cell(2)}, "cell b has two rows of kind"),
    ],
)
def test_what_cannot_be_contrasted_is_refused(b: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_contrasts("x", {"a": cell(1)}, b)


def test_a_reading_claims_no_more_than_the_interval() -> None:
    a, b = ({f"{side}{seed}": cell(wrong, seed=seed) for seed in (0, 2)} for side, wrong in (("a", 1), ("b", 3)))
    (one, *_) = make_contrasts("x", a, b)
    assert one.of_methods and reading(one) == "a is better"
    for interval, words in (((-0.1, 0.0), "inconclusive"), ((-0.1, 0.1), "inconclusive"), ((0.01, 0.2), "b is better")):
        assert reading(dataclasses.replace(one, interval=interval)) == words


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([cell(1)], [cell(3)]),
        ([cell(1), cell(1, seed=2)], [cell(3)]),
        ([cell(1), cell(1)], [cell(3), cell(3, seed=2)]),  # one seed twice
        ([cell(1), cell(1, seed=2, method="other")], [cell(3), cell(3, seed=2)]),
        ([cell(1), cell(1, seed=2)], [cell(3, frame_rate_hz=12.5), cell(3, seed=2, frame_rate_hz=25.0)]),
        ([cell(1), cell(1, seed=None)], [cell(3), cell(3, seed=2)]),
    ],
)
def test_a_verdict_on_methods_needs_two_seeds_of_each(a: list, b: list, tmp_path: Path) -> None:
    found = make_contrasts("x", dict(zip("ab", a, strict=False)), dict(zip("cd", b, strict=False)))
    assert {reading(one) for one in found} == {"these models differ"} and not any(one.of_methods for one in found)
    near = dataclasses.replace(found[0], interval=(-0.1, 0.1))
    assert reading(near) == "no difference shown"
    write_contrasts(found, "T", tmp_path)
    page = write_report(Results("T", [], contrasts=found), tmp_path).read_text()
    shown = (format_table(Results("T", [], contrasts=found)), contrasts_markdown(found, "T"), page)
    for text in shown:
        assert "is better" not in text.replace("below zero, a is better", "") and "these models differ" in text
        assert "of these trained models" in " ".join(text.split())
    assert "these models, not the methods" in (tmp_path / "contrasts.svg").read_text()


def test_the_interval_of_methods_holds_the_seeds_spread() -> None:
    """Seeds a point apart and seeds eight points apart, with one mean: the second pair tells less of its method."""

    def contrast(*wrong: int):
        a = {f"a{seed}": cell(w, seed=2 * seed) for seed, w in enumerate(wrong)}
        return make_contrasts("x", a, {"b0": cell(5), "b1": cell(5, seed=2)})[0]

    near, far = contrast(2, 2), contrast(0, 4)
    assert near.difference == far.difference and reading(near) == "a is better" and reading(far) == "inconclusive"
    assert far.interval[1] - far.interval[0] > 4 * (near.interval[1] - near.interval[0])


def test_contrasts_of_one_name_are_not_folded_together() -> None:
    found = make_contrasts("x", {"a": cell(1)}, {"b": cell(3)}) + make_contrasts("x", {"c": cell(3)}, {"d": cell(1)})
    assert [(block["a"], block["b"], len(block["lines"])) for block in blocks(found)] == [("a", "b", 9), ("c", "d", 9)]
    one, other = (Results(title, [], contrasts=part) for title, part in (("one", found[:9]), ("other", found[9:])))
    merged = merge_results([one, other, one], "both").contrasts
    assert list(dict.fromkeys(c.name for c in merged)) == ["x", "x (other)"] and len(merged) == 18


def test_contrasts_are_kept_written_plotted_and_shown(tmp_path: Path) -> None:
    a, b = {"a-s0": cell(1), "a-s1": cell(2, seed=1)}, {"b-s0": cell(3)}
    contrasts = make_contrasts("low | <rate>", a, b) + make_contrasts("high", b, a)
    results = Results("T", [], contrasts=contrasts)
    save_results(results, tmp_path)
    assert load_results(tmp_path).contrasts == contrasts
    text = write_contrasts(contrasts, "T", tmp_path).read_text()
    assert text == contrasts_markdown(contrasts, "T") and "4 utterances, 24 words" in text
    line = next(line for line in text.splitlines() if line.startswith("| semantic reconstruction | teacher"))
    assert "| 33.3 (25.0, 41.7) | 58.3 | -25.0 [" in line and line.count("|") == 11
    assert (tmp_path / "contrasts.png").read_bytes()[:4] == b"\x89PNG"
    svg = (tmp_path / "contrasts.svg").read_text()
    assert "low | &lt;rate&gt;" in svg and "second &lt;judge&gt;" in svg and "zero" not in svg
    write_contrasts(contrasts, "T", tmp_path)
    assert (tmp_path / "contrasts.svg").read_text() == svg
    html = write_report(results, tmp_path).read_text()
    assert "<h2>Contrasts</h2>" in html and "low | &lt;rate&gt;" in html and "<rate>" not in html
    assert html.count("<svg") == 1 and "a: a-s0, a-s1; b: b-s0" in html and "second <judge>" not in html
    table = format_table(results)
    assert "high (a: b-s0; b: a-s0, a-s1)" in table and max(map(len, table.splitlines())) <= 110


def test_no_contrasts_no_section(tmp_path: Path) -> None:
    assert "Contrasts" not in write_report(Results("T", []), tmp_path).read_text()
    with pytest.raises(ValueError, match="no contrasts"):
        write_contrasts([], "T", tmp_path)


@dataclasses.dataclass
class FakeConfig:
    run_dir: str = ""
    rate: int = 1
    transcripts_dir: str | None = None


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """`compare` over recipes that only say that they ran; `evaluate` leaves the rows of a cell behind."""
    names: list[str] = []

    def recipe(name: str) -> types.SimpleNamespace:
        def run(config: FakeConfig) -> None:
            folder = RunFolder(config.run_dir)
            if folder.complete:
                return
            folder.start(config)
            names.append(str(Path(config.run_dir).relative_to(Path(config.run_dir).parents[1])))
            if name == "evaluate":
                save_results(Results("", cell(config.rate)), config.run_dir)
            folder.mark_complete()

        return types.SimpleNamespace(Config=FakeConfig, run=run, plan=lambda config: {})

    for name in ("make", "evaluate"):
        monkeypatch.setitem(sys.modules, f"recipes.commands.{name}", recipe(name))
    # Report and pictures have tests of their own.
    monkeypatch.setattr(compare, "write_report", lambda results, folder: None)
    monkeypatch.setattr("eval.report.contrasts.save_figure", lambda figure, path: path)
    monkeypatch.setattr("recipes.runs.run_folder.git_commit", lambda: None)
    return names


def comparison(tmp_path: Path, **more) -> compare.Config:
    stages = [Stage("make", shared=True, run_dir=str(tmp_path / "elsewhere" / "make")), Stage("evaluate")]
    cells = [Cell(f"{kind}-s{s}", [f"evaluate.rate={r}"]) for s in (0, 1) for kind, r in (("a", 1), ("b", 3))]
    contrasts = [Contrasted("a - b", ["a-*"], ["b-*"])]
    given = {"cells": cells, "contrasts": contrasts} | more
    return compare.Config(run_dir=str(tmp_path / "runs"), stages=stages, **given)


def test_some_cells_now_and_a_table_of_all_that_are_complete(tmp_path, ran) -> None:
    compare.run(comparison(tmp_path, only=["a-s0"]))
    assert ran == ["elsewhere/make", "a-s0/evaluate"]
    results = load_results(tmp_path / "runs")
    assert not results.contrasts and not RunFolder(tmp_path / "runs").complete
    assert "left out: b-s0, evaluate is not complete" in results.notes
    compare.run(comparison(tmp_path, only=["b-s0", "a-s1"]))
    assert ran[2:] == ["b-s0/evaluate", "a-s1/evaluate"]
    contrasts = load_results(tmp_path / "runs").contrasts
    assert contrasts[0].a == ["a-s0", "a-s1"] and contrasts[0].b == ["b-s0"] and contrasts[0].difference < 0
    assert (tmp_path / "runs" / "contrasts.md").is_file()
    compare.run(comparison(tmp_path, only=[]))
    assert len(ran) == 4
    plan = compare.plan(comparison(tmp_path, only=[]))
    assert plan["a-s0"] == "not run (only): complete" and "evaluate is not complete" in plan["b-s1"]
    compare.run(comparison(tmp_path))
    assert ran[4:] == ["b-s1/evaluate"] and RunFolder(tmp_path / "runs").complete
    assert len(load_results(tmp_path / "runs").contrasts[0].wers_b) == 2
    more = comparison(tmp_path, only=[])
    more.cells.append(Cell("c-s0"))
    compare.run(more)
    assert not RunFolder(tmp_path / "runs").complete and "c-s0" in (tmp_path / "runs" / "config.yaml").read_text()


def test_a_cell_of_other_settings_stays_out_of_the_table(tmp_path, ran) -> None:
    compare.run(comparison(tmp_path))
    changed = comparison(tmp_path, only=[], set=["evaluate.rate=5"])
    changed.cells = [Cell("a-s0", []), Cell("b-s0", ["evaluate.rate=3"])]
    compare.run(changed)
    results = load_results(tmp_path / "runs")
    assert any(note.startswith("left out: a-s0, evaluate: ") for note in results.notes)
    assert {row.cell for row in results.rows} == {"", "b-s0"}


def test_a_note_that_cells_share_but_for_their_folders_stands_once_with_their_names(tmp_path, ran) -> None:
    config = comparison(tmp_path)
    compare.run(config)
    for number, name in enumerate(("a-s0", "a-s1", "b-s0", "b-s1")):
        place = tmp_path / "runs" / name / "evaluate"
        missing = "none" if name != "b-s1" else "two"
        said = [f"{place}/predictions.jsonl: {missing} of them are missing ({place})", "players hold 30 s"]
        said += [f"{place}-of-before: 7 are missing"] if number == 0 else []
        save_results(dataclasses.replace(load_results(place), notes=said), place)
    notes = gather(make_cells(config), config).notes
    assert notes == [
        "a-s0, b-s0, a-s1: evaluate/predictions.jsonl: none of them are missing (evaluate)",
        "players hold 30 s",
        f"{tmp_path}/runs/a-s0/evaluate-of-before: 7 are missing",  # another folder, and one cell's: as it is written
        f"{tmp_path}/runs/b-s1/evaluate/predictions.jsonl: two of them are missing ({tmp_path}/runs/b-s1/evaluate)",
    ]


def test_no_complete_cell_is_an_error(tmp_path, ran) -> None:
    with pytest.raises(ConfigError, match="no cell is complete yet.*a-s0"):
        compare.run(comparison(tmp_path, only=[]))


def test_a_folder_elsewhere_is_shared_and_outlives_a_redo(tmp_path, ran) -> None:
    config = comparison(tmp_path)
    compare.run(config)
    steps = make_steps(config, "a-s0")
    steps = [steps[1], steps[0]]  # the stage elsewhere after the one that is redone
    set_aside_from(steps, "evaluate")
    assert not (tmp_path / "runs" / "a-s0" / "evaluate").exists() and (tmp_path / "elsewhere" / "make").is_dir()
    config.stages[0].shared = False
    with pytest.raises(ConfigError, match="stage make: run_dir=.*every cell's"):
        make_steps(config, "a-s0")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"only": ["c-s0"]}, "only: no cell is called c-s0; .*there are a-s0, b-s0"),
        ({"contrasts": [Contrasted("x", ["a-*"], ["c-*"])]}, r"no cell fits c-\*"),
        ({"contrasts": [Contrasted("x", ["a-*"], ["*-s0"])]}, "different cells"),
        ({"contrasts": [Contrasted("x", [], ["*-s0"])]}, "different cells"),
        ({"contrasts": [Contrasted("x", ["a-*"], ["b-*"])] * 2}, "contrasts: x stands there twice"),
    ],
)
def test_wrong_names_are_named(tmp_path, more, message) -> None:
    with pytest.raises(ValueError, match=message):
        comparison(tmp_path, **more)


def test_the_shipped_comparison_differs_between_cells_in_what_their_names_say() -> None:
    config = load_config(compare.Config, "mixed/compare-distillation")
    names = [c.name for c in config.cells]
    assert names[:4] == [f"{hz}hz-{kind}-s0" for hz in ("6.25", "12.5") for kind in ("resynthesis", "pooled")]
    assert len(names) == 19 and names[-1] == "6.25hz-pooled-quarter-s0"
    for entry in config.cells:
        rate, kind, part, seed = re.fullmatch(r"([\d.]+)hz-([a-z]+)(-quarter)?-s(\d)", entry.name).groups()
        steps = {step.stage.name: step.config for step in make_steps(config, entry.name, entry.set)}
        tokenizer = steps["tokenizer"]
        assert (tokenizer.preset, tokenizer.distillation.kind) == (f"nano-{rate}hz", kind)
        assert [tokenizer.seed, steps["codes"].seed, steps["slm"].seed] == [int(seed)] * 3
        assert tokenizer.distillation.probe is (kind != "resynthesis")
        assert tokenizer.weights.distillation == (25 if part else None)
        assert tokenizer.teacher.name == steps["evaluate"].judges[0].name == "runs/mixed/teacher/model"
        assert steps["evaluate"].judges[1].name == "runs/grid-s1/second-judge/model"
        assert (
            len(tokenizer.data) == 3 and len(steps["evaluate"].data) == 1 and steps["teacher"].run_dir in str(tokenizer)
        )
    for contrast in config.contrasts:
        groups = [contrast.group(patterns, names) for patterns in (contrast.a, contrast.b)]
        assert [len(group) for group in groups] == [3, 1 if "quarter" in contrast.name else 3]
        rates = {name.split("-")[0] for group in groups for name in group}
        assert len(rates) == (2 if "6.25 - 12.5" in contrast.name else 1)
    assert np.unique([c.name for c in config.contrasts]).size == len(config.contrasts) == 9
