"""A comparison as a matrix: cells from axes, what several of them do alike done once, nothing repeated after a kill."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_contrasts import cell

from eval.results_file import load_results, save_results
from eval.schema import Results
from recipes.commands import compare
from recipes.comparison.cells import Axis, Cell
from recipes.comparison.config import Contrasted
from recipes.config import load_config
from recipes.runs.pipeline import Stage
from recipes.runs.run_folder import RunFolder


@dataclass
class Work:
    """The keys of a stage that only says that it ran."""

    run_dir: str = ""
    source: str = ""
    rate: int = 1
    seed: int = 0


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """What ran, as CELL/STAGE; a stage called so in `fails` does not come to its end."""

    class Names(list):
        fails: set[str] = set()

    names = Names()

    def recipe(name: str) -> types.SimpleNamespace:
        def run(config: Work) -> None:
            folder = RunFolder(config.run_dir)
            if folder.complete:
                return
            place = "/".join(Path(config.run_dir).parts[-2:])
            if place in names.fails:
                raise ValueError(f"{place} is killed")
            folder.start(config)
            names.append(place)
            if name == "evaluate":
                rows = cell(config.rate + 1, seed=config.seed)
                save_results(Results("", rows), config.run_dir)
            folder.mark_complete()

        return types.SimpleNamespace(Config=Work, run=run, plan=lambda config: {})

    for name in ("codes", "train", "evaluate"):
        monkeypatch.setitem(sys.modules, f"recipes.commands.{name}", recipe(name))
    monkeypatch.setattr(compare, "write_report", lambda results, folder: None)
    monkeypatch.setattr("eval.report.contrasts.save_figure", lambda figure, path: path)
    monkeypatch.setattr("recipes.runs.run_folder.git_commit", lambda: None)
    return names


def matrix(tmp_path: Path, **more) -> compare.Config:
    stages = [
        Stage("codes"),
        Stage("train", set=["source=${codes}"]),
        Stage("evaluate", set=["source=${train}"]),
    ]
    axes = [
        Axis("rate", {"25hz": ["codes.rate=1", "evaluate.rate=1"], "12.5hz": ["codes.rate=2", "evaluate.rate=2"]}),
        Axis("seed", {"s0": ["train.seed=0", "evaluate.seed=0"], "s1": ["train.seed=1", "evaluate.seed=1"]}),
    ]
    contrasts = [Contrasted("rates", ["25hz-*"], ["12.5hz-*"])]
    return compare.Config(run_dir=str(tmp_path / "runs"), stages=stages, axes=axes, contrasts=contrasts, **more)


def test_cells_that_do_the_same_do_it_once(tmp_path, ran) -> None:
    compare.run(matrix(tmp_path))
    assert ran == [
        *("25hz-s0/codes", "25hz-s0/train", "25hz-s0/evaluate", "25hz-s1/train", "25hz-s1/evaluate"),
        *("12.5hz-s0/codes", "12.5hz-s0/train", "12.5hz-s0/evaluate", "12.5hz-s1/train", "12.5hz-s1/evaluate"),
    ]
    found = load_results(tmp_path / "runs")
    assert {(row.cell, row.seed) for row in found.rows if row.system == "tts"} == {
        *(("25hz-s0", 0), ("25hz-s1", 1), ("12.5hz-s0", 0), ("12.5hz-s1", 1))
    }
    assert found.contrasts[0].a == ["25hz-s0", "25hz-s1"]


def test_what_was_killed_goes_on_and_repeats_nothing(tmp_path, ran) -> None:
    ran.fails = {"25hz-s1/train", "12.5hz-s0/codes"}
    with pytest.raises(compare.CellsFailed, match="3 of the cells failed") as error:
        compare.run(matrix(tmp_path))
    # One that both cells of a rate wait for fails both, by name; the others are in the table.
    assert all(name in str(error.value) for name in ("25hz-s1", "12.5hz-s0", "12.5hz-s1"))
    assert {row.cell for row in load_results(tmp_path / "runs").rows} == {"", "25hz-s0"}
    before, ran.fails = list(ran), set()
    compare.run(matrix(tmp_path))
    assert ran[: len(before)] == before and len(ran) == len(set(ran)) == 10
    compare.run(matrix(tmp_path))
    assert len(ran) == 10


def test_a_resolved_configuration_runs_again_as_it_is(tmp_path, ran) -> None:
    compare.run(matrix(tmp_path))
    again = load_config(compare.Config, tmp_path / "runs" / "config.yaml")
    assert [one.name for one in again.cells] == [one.name for one in matrix(tmp_path).cells]
    compare.run(again)
    assert len(ran) == 10


def test_values_of_a_method_axis_name_the_methods(tmp_path) -> None:
    axes = [Axis("method", {"ours": ["train.source=a"], "theirs": ["train.source=b"]}), Axis("seed", {"s0": []})]
    config = compare.Config(run_dir=str(tmp_path), stages=[Stage("train"), Stage("evaluate")], axes=axes)
    assert [(one.name, one.method) for one in config.cells] == [("ours-s0", "ours"), ("theirs-s0", "theirs")]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"cells": [Cell("25hz-s0", [])]}, "cells: 25hz-s0 of the axes is listed with other settings"),
        ({"only": ["25hz"]}, "only: no cell is called 25hz; did you mean .*there are 25hz-s0, "),
    ],
)
def test_wrong_names_are_named(tmp_path, more, message) -> None:
    with pytest.raises(ValueError, match=message):
        matrix(tmp_path, **more)
    with pytest.raises(ValueError, match="axis x: give at least one value"):
        Axis("x", {})
    with pytest.raises(ValueError, match="axes: x stands there twice"):
        compare.Config(stages=[Stage("evaluate")], axes=[Axis("x", {"a": []}), Axis("x", {"b": []})])
