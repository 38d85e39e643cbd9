"""Learning curves and resolved configurations of a comparison: read from the runs, shown on its page."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_contrasts import cell

from eval.merging import merge_results
from eval.report.page import write_report
from eval.report.trainings import DARK, LIGHT, curve_figures, differences_table, trainings_table
from eval.results_file import load_results, save_results
from eval.schema import Results
from eval.trainings import Configuration, Curve, differing_keys, group_names
from recipes.comparison.cells import Identity
from recipes.comparison.trainings import MOST_POINTS, configurations_of, curves_of
from recipes.runs.pipeline import Stage, Step


@dataclass
class Training:
    steps: int = 100
    rate: float = 1e-3


@dataclass
class Settings:
    run_dir: str = ""
    corpus: str = ""
    seed: int = 0
    training: Training = field(default_factory=Training)


def step(name: str, folder: Path, shared: bool = False, **settings) -> Step:
    return Step(Stage("finetune", name, shared=shared), SimpleNamespace(), Settings(str(folder), **settings))


def write_log(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9', "utf-8")


def test_curves_are_what_was_logged(tmp_path):
    log = [{"step": 0, "eval_loss": 9.0, "eval_asr_wer": 100.0}, {"step": 10, "loss": 4.0}, {"step": 20, "loss": None}]
    log += [{"step": 20, "eval_loss": 3.0, "eval_asr_wer": 25.0, "eval_asr_cer": 0.1}, {"step": 30, "loss": 2.0}]
    write_log(tmp_path / "slm", log)
    write_log(tmp_path / "shared", log)
    steps = [step("shared", tmp_path / "shared", shared=True), step("slm", tmp_path / "slm"), step("x", tmp_path / "x")]
    found = curves_of(steps, Identity("a", "ours", 3), 12.5)
    by_name = {(c.split, c.figure): (c.steps, c.values) for c in found}
    assert by_name == {
        ("valid", "loss"): ([0, 20], [9.0, 3.0]),
        ("valid", "asr WER"): ([0, 20], [1.0, 0.25]),
        ("train", "loss"): ([10, 30], [4.0, 2.0]),
    }
    assert {(c.cell, c.method, c.seed, c.frame_rate_hz, c.stage) for c in found} == {("a", "ours", 3, 12.5, "slm")}
    assert [c.n_left_out for c in found if c.split == "train"] == [1]


def test_a_long_curve_is_shown_by_means_and_a_valid_one_whole(tmp_path):
    n = 2 * MOST_POINTS + 1
    rows = [{"step": i, "loss": float(i), "eval_loss": float(i)} for i in range(1, n + 1)]
    write_log(tmp_path, rows)
    train, valid = sorted(curves_of([step("slm", tmp_path)], Identity("a"), None), key=lambda c: c.split)
    assert len(train.steps) <= MOST_POINTS and train.steps[0] == 3 and train.values[0] == 2.0
    assert train.steps[-1] == n and valid.steps == list(range(1, n + 1))


def test_settings_differ_where_methods_do_and_not_in_folders_or_seeds(tmp_path):
    def steps(name: str, seed: int, rate: float) -> list[Step]:
        codes, slm = tmp_path / name / "codes", tmp_path / name / "slm"
        return [step("codes", codes), step("slm", slm, corpus=str(codes), seed=seed, training=Training(rate=rate))]

    cells = {"a0": steps("a0", 0, 1.0), "a1": steps("a1", 1, 1.0), "b0": steps("b0", 0, 2.0), "b1": steps("b1", 1, 2.0)}
    about = {name: Identity(name, name[0], int(name[1])) for name in cells}
    found = configurations_of(cells, about, dict.fromkeys(cells, 25.0))
    assert [(one.name, one.cells) for one in found] == [("a", ["a0", "a1"]), ("b", ["b0", "b1"])]
    assert found[0].values["slm.corpus"] == "${codes}" and found[0].values["slm.seed"] == "0 / 1"
    assert differing_keys(found) == ["slm.training.rate"]
    assert found[0].yaml["slm"].startswith(f"run_dir: {tmp_path}/a0/slm\n")
    assert differences_table(found).lines == [["slm.training.rate", "1.0", "2.0"]]
    assert differences_table(found[:1]) is None


def test_cells_that_are_not_known_to_be_seeds_keep_their_names():
    assert group_names([("a", "m", 25.0, None), ("b", "m", 25.0, None)]) == {"a": "a", "b": "b"}
    assert group_names([("a", "m", 25.0, 1), ("b", "m", 25.0, 1)]) == {"a": "a", "b": "b"}


def curves() -> list[Curve]:
    found = []
    for cell_name, rate, seed in (("r25-s0", 25.0, 0), ("r25-s1", 25.0, 1), ("r12-s0", 12.5, 0)):
        about = {"frame_rate_hz": rate, "seed": seed}
        found += [
            Curve(cell_name, "slm", "train", "loss", [1, 50, 100], [5.0, 3.0 + seed, 2.0], **about),
            Curve(cell_name, "slm", "valid", "loss", [0, 50, 100], [6.0, 2.5, 3.0], **about),
            Curve(cell_name, "slm", "valid", "asr WER", [50, 100], [0.5, 0.25], **about),
            Curve(cell_name, "slm", "valid", "asr loss", [50, 100], [0.5, 0.25], **about),
        ]
    return found


def test_each_figure_has_a_title_and_a_look_beside_the_colour():
    found = curve_figures(curves())
    assert [caption for caption, _ in found] == ["slm: loss (train)", "slm: loss (valid)", "slm: asr WER, % (valid)"]
    for _, svg in found:
        assert re.search(r'role="img"><title>slm: [^<]+</title>', svg)
        assert "var(--curve-1)" in svg and "#0a0b" not in svg
        assert "stroke-dasharray" in svg  # the second group's line is told apart without its colour
        assert svg.count(">25 Hz<") == svg.count(">12.5 Hz<") == 1  # one entry for both seeds
    ids = [name for _, svg in found for name in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))


def test_where_trainings_ended_and_the_best_before_it():
    table = trainings_table(curves())
    line = dict(zip(table.headings, table.lines[0], strict=True))
    assert line["cell"] == "r25-s0" and line["steps"] == "100" and line["train loss"] == "2.000"
    assert line["valid loss"] == "3.000 (best 2.500, step 50)" and line["valid asr WER %"] == "25.0"
    assert trainings_table([]) is None


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_lines_stand_out_from_the_page_by_day_and_night(tmp_path):
    page = write_report(Results("t", cell(1), curves=curves()), tmp_path).read_text("utf-8")
    light, dark = re.findall(r"--card: (#\w+)", page)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert min(contrast(colour, light) for colour in LIGHT) >= 4.5
    assert min(contrast(colour, dark) for colour in DARK) >= 4.5
    assert all(f"--curve-{n}: {colour};" in page for n, colour in enumerate(LIGHT, start=1))


def made(title: str = "t") -> Results:
    configurations = [
        Configuration("25 Hz", ["a"], {"slm.x": "1", "slm.same": "7"}, {"slm": "x: 1 # <b>\n"}),
        Configuration("12.5 Hz", ["b"], {"slm.x": "2", "slm.same": "7"}, {"slm": "x: 2\n"}),
    ]
    return Results(title, cell(1), curves=curves(), configurations=configurations)


def test_the_page_shows_what_differs_and_keeps_the_rest_folded(tmp_path):
    page = write_report(made(), tmp_path).read_text("utf-8")
    section = page.split("<h2>Configurations</h2>")[1].split("</section>")[0]
    assert section.count("<details>") == 2 and "&lt;b&gt;" in section
    table = section.split("</table>")[0]
    assert "slm.x" in table and "slm.same" not in table and "1 of 2 settings" in section
    assert "details::details-content" in page  # opened on paper
    plain = write_report(Results("t", cell(1)), tmp_path / "plain").read_text("utf-8")
    assert "Learning curves" not in plain and "Configurations" not in plain


def test_results_keep_both_and_older_results_have_none(tmp_path):
    save_results(made(), tmp_path)
    found = load_results(tmp_path)
    assert found.curves == made().curves and found.configurations == made().configurations
    assert merge_results([found, made("u")], "m").curves == found.curves
    content = json.loads((tmp_path / "results.json").read_text("utf-8"))
    for key in ("curves", "configurations"):
        del content[key]
    (tmp_path / "results.json").write_text(json.dumps(content), "utf-8")
    assert load_results(tmp_path).curves == [] and asdict(load_results(tmp_path))["configurations"] == []
