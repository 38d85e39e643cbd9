"""The report's answer in words: what the contrasts say, with its cost, and no more than they allow to say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from test_contrasts import cell

from eval.contrasts import make_contrasts
from eval.report.answer import ONE_SEED, answers
from eval.report.markdown import results_markdown
from eval.report.page import write_report
from eval.report.terminal import format_table
from eval.schema import Results, Row


def rows_of(name: str, hz: float, wrong: int, seed: int = 0, method: str = "") -> list[Row]:
    """A cell's rows as a comparison holds them."""
    found = cell(wrong, seed=seed, method=method, frame_rate_hz=hz)
    return [dataclasses.replace(row, cell=name, tokens_per_second=hz) for row in found]


def of(*sides: dict[str, list[Row]], judge: str = "teacher") -> Results:
    kept = [
        {name: [r for r in rows if r.protocol.judge.get("name", "") in ("", judge)] for name, rows in s.items()}
        for s in sides
    ]
    rows = [row for side in kept for some in side.values() for row in some]
    return Results("t", rows, contrasts=make_contrasts("x", *kept))


def test_rates_are_named_with_the_difference_of_the_tasks_and_the_tokens() -> None:
    found = of({"c25": rows_of("c25", 25.0, 4)}, {"c12": rows_of("c12", 12.5, 1)})
    first, caution = answers(found)
    assert first.startswith("25 Hz against 12.5 Hz: SLM TTS, WER 50.0 points higher [50.0, 50.0]; SLM ASR, WER")
    assert first.endswith("; twice the tokens (25 against 12.5 a second).") and "reconstruction" not in first
    assert caution == ONE_SEED
    (other, _) = answers(of({"c12": rows_of("c12", 12.5, 1)}, {"c25": rows_of("c25", 25.0, 4)}))
    assert (
        other.startswith("12.5 Hz against 25 Hz: SLM TTS, WER 50.0 points lower [50.0, 50.0]") and "half the" in other
    )


def test_methods_of_several_seeds_are_named_without_the_caution() -> None:
    sides = [
        {f"{name}-{seed}": rows_of(f"{name}-{seed}", 12.5, wrong, seed, name) for seed in (0, 1)}
        for name, wrong in (("resynthesis", 1), ("none", 1))
    ]
    (told,) = answers(of(*sides))
    assert told.startswith("resynthesis against none: SLM TTS, no difference in WER shown (+0.0 points [")
    assert "as many of the tokens" not in told and "the same tokens" in told


def test_two_methods_at_two_rates_are_told_apart_by_the_contrasts_names() -> None:
    rows, contrasts = [], []
    for hz in (25.0, 12.5):
        a, b = ({f"{name}{hz}": rows_of(f"{name}{hz}", hz, 1, method=name)} for name in ("ours", "theirs"))
        contrasts += make_contrasts(f"ours - theirs, {hz:g} Hz", a, b)
        rows += [row for side in (a, b) for some in side.values() for row in some]
    first, second, _ = answers(Results("t", rows, contrasts=contrasts))
    assert first.startswith("ours against theirs (ours - theirs, 25 Hz): ")
    assert second.startswith("ours against theirs (ours - theirs, 12.5 Hz): ")


def test_several_judges_are_told_apart() -> None:
    sides = ({"a": rows_of("a", 25.0, 2)}, {"b": rows_of("b", 12.5, 1)})
    contrasts = make_contrasts("x", *sides)
    rows = [row for side in sides for some in side.values() for row in some]
    (told, _) = answers(Results("t", rows, contrasts=contrasts))
    assert "SLM TTS (read by teacher)" in told and "SLM TTS (read by second <judge>)" in told


def test_what_the_correction_takes_away_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = of({"a": rows_of("a", 25.0, 4)}, {"b": rows_of("b", 12.5, 1)})
    found.contrasts = [dataclasses.replace(c, p_value=0.04) for c in found.contrasts]
    assert "points higher [50.0, 50.0], not after correction for the number of contrasts" in answers(found)[0]


def test_of_many_contrasts_those_with_the_largest_differences_are_told_and_the_others_counted() -> None:
    rows, contrasts = rows_of("base", 25.0, 0, method="base"), []
    for number, wrong in enumerate([0, 2, 0, 1, 3, 4, 2, 1, 0]):
        other = rows_of(f"m{number}", 25.0, wrong, method=f"m{number}")
        rows += other
        contrasts += make_contrasts(f"m{number} - base", {f"m{number}": other}, {"base": rows_of("base", 25.0, 0)})
    contrasts = [dataclasses.replace(c, p_value=0.9 if "m7" in c.name else 1e-4) for c in contrasts]
    *told, rest, _ = answers(Results("t", rows, contrasts=contrasts))
    assert [line.split(" against")[0] for line in told] == ["m0", "m1", "m3", "m4", "m5", "m6"]  # m0: the first of none
    assert rest.startswith("These are 6 of 9 contrasts") and "of the other 3, in the tables, none show one" in rest
    contrasts = [dataclasses.replace(c, p_value=1e-4) for c in contrasts]
    *told, rest, _ = answers(Results("t", rows, contrasts=contrasts))
    assert [line.split(" against")[0] for line in told] == ["m1", "m3", "m4", "m5", "m6", "m7"]
    assert "of the other 3, in the tables, none show" in rest


def test_cells_that_are_neither_one_rate_nor_one_method_keep_their_names() -> None:
    mixed = rows_of("a1", 25.0, 2), rows_of("a2", 12.5, 2)
    found = of({"a1": mixed[0], "a2": mixed[1]}, {"b": rows_of("b", 6.25, 1)})
    assert answers(found)[0].startswith("a1, a2 against b: ") and "tokens" not in answers(found)[0]


def test_every_writer_shows_it(tmp_path: Path) -> None:
    found = of({"a": rows_of("a", 25.0, 4)}, {"b": rows_of("b", 12.5, 1)})
    told = answers(found)[0]
    assert told in format_table(found, width=400) and told in results_markdown(found)
    assert told in write_report(found, tmp_path).read_text(encoding="utf-8")
    assert not answers(dataclasses.replace(found, contrasts=[]))
