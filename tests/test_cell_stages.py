"""Cells that run some of a comparison's stages: systems that are made by other commands, in one table."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_matrix import Work, ran  # noqa: F401  (a fixture)

from eval.results_file import load_results
from recipes.commands import compare
from recipes.comparison.cells import Axis, AxisValue
from recipes.comparison.running import make_cells
from recipes.config import ConfigError, dump_config, load_config
from recipes.runs.pipeline import Stage

STAGES = """
stages:
  - {command: codes, name: align, set: [rate=2]}
  - {command: codes}
  - {command: train, set: ["source=${codes}"]}
  - {command: train, name: train-other}
  - {command: evaluate, set: ["source=${train}"]}
"""
AXES = """
axes:
  - name: method
    values:
      plain: {stages: [codes, train, evaluate]}
      aligned: {stages: [align, codes, train, evaluate], set: ["codes.source=${align}", evaluate.rate=3]}
      other: {stages: [train-other, evaluate], set: ["evaluate.source=${train-other}", evaluate.rate=5]}
  - name: seed
    values: {s0: [], s1: [train.seed=1, train-other.seed=1, evaluate.seed=1]}
"""


def comparison(tmp_path: Path, text: str = AXES, **more) -> compare.Config:
    file = tmp_path / "compare.yaml"
    file.write_text(STAGES + text, encoding="utf-8")
    config = load_config(compare.Config, file, [f"run_dir={tmp_path / 'runs'}"])
    for key, value in more.items():
        setattr(config, key, value)
    return config


def sources(config: compare.Config, cell: str) -> dict[str, str]:
    """Each stage of a cell and what it reads, below the run folder."""
    steps = make_cells(config)[cell]
    return {step.stage.name: step.config.source.removeprefix(f"{config.run_dir}/") for step in steps}


def test_a_cell_runs_the_stages_that_it_names_and_reads_what_they_made(tmp_path, ran) -> None:  # noqa: F811
    config = comparison(tmp_path)
    assert sources(config, "plain-s0") == {"codes": "", "train": "plain-s0/codes", "evaluate": "plain-s0/train"}
    assert sources(config, "other-s0") == {"train-other": "", "evaluate": "other-s0/train-other"}
    # The second seed finds the alignment and the codes of the first one.
    assert sources(config, "aligned-s1") == {
        "align": "",
        "codes": "aligned-s0/align",
        "train": "aligned-s0/codes",
        "evaluate": "aligned-s1/train",
    }
    compare.run(config)
    assert ran == [
        *("plain-s0/codes", "plain-s0/train", "plain-s0/evaluate", "plain-s1/train", "plain-s1/evaluate"),
        *("aligned-s0/align", "aligned-s0/codes", "aligned-s0/train", "aligned-s0/evaluate"),
        *("aligned-s1/train", "aligned-s1/evaluate"),
        *("other-s0/train-other", "other-s0/evaluate", "other-s1/train-other", "other-s1/evaluate"),
    ]
    rows = [row for row in load_results(tmp_path / "runs").rows if row.system == "tts"]
    assert {(row.cell, row.method, row.seed) for row in rows} == {
        (f"{method}-s{seed}", method, seed) for method in ("plain", "aligned", "other") for seed in (0, 1)
    }


def test_it_goes_on_is_planned_and_runs_again_as_resolved(tmp_path, ran) -> None:  # noqa: F811
    ran.fails = {"other-s0/train-other"}
    with pytest.raises(compare.CellsFailed, match="other-s0: stage train-other: other-s0/train-other is killed"):
        compare.run(comparison(tmp_path, only=["other-s0", "plain-s0"]))
    assert ran == ["plain-s0/codes", "plain-s0/train", "plain-s0/evaluate"]
    ran.fails = set()
    plan = compare.plan(comparison(tmp_path))
    assert plan["plain-s0"]["train"].endswith("(complete: skipped)") and list(plan["other-s1"]) == [
        "train-other",
        "evaluate",
    ]
    compare.run(comparison(tmp_path))
    assert len(ran) == len(set(ran)) == 15
    again = load_config(compare.Config, tmp_path / "runs" / "config.yaml")
    assert again.cells == comparison(tmp_path).cells and dump_config(again) == dump_config(comparison(tmp_path))
    compare.run(again)
    assert len(ran) == 15
    # Of `redo` the cells that do not run the stage stay as they are.
    compare.run(comparison(tmp_path, redo="align"))
    assert [name for name in ran[15:] if "aligned" not in name] == [] and len(ran) == 21


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("{name: a, stages: []}", "cells: a: stages is empty"),
        ("{name: a, stages: [codes, codes]}", "cells: a: stages: codes stands there twice"),
        (
            "{name: a, stages: [code]}",
            "cells: a: stages: there is no code; did you mean `codes`. there are align, codes, ",
        ),
        ("{name: a, stages: [codes], set: [train.rate=2]}", "cells: a sets train, which is not among the stages"),
        ("{name: a, stages: [align, codes, train, evaluate]}", "stages: no cell runs train-other; name it"),
    ],
)
def test_wrong_stages_of_a_cell_are_named_at_load(tmp_path, cells, message) -> None:
    with pytest.raises(ConfigError, match=message):
        comparison(tmp_path, f"cells: [{cells}]")


def test_a_seed_of_a_stage_that_nobody_has_is_named_though_cells_take_their_own_alone(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"set: 'trian.seed=1' is not of the form STAGE.key=value"):
        comparison(tmp_path, AXES.replace("[train.seed=1,", "[trian.seed=1,"))


def test_stages_come_from_one_axis() -> None:
    axes = [Axis("method", {"a": AxisValue(stages=["train"])}), Axis("seed", {"s0": AxisValue(stages=["train"])})]
    with pytest.raises(ValueError, match="axes: cell a-s0 has its `stages` from several axes"):
        compare.Config(stages=[Stage("train"), Stage("evaluate")], axes=axes)


def test_reading_a_stage_that_the_cell_does_not_run_is_refused_at_load(tmp_path, ran) -> None:  # noqa: F811
    cells = "cells: [{name: all}, {name: a, stages: [train-other, evaluate]}]"
    with pytest.raises(ConfigError, match=r"cell a, stage evaluate: reads \$\{train\}, a stage that"):
        compare.plan(comparison(tmp_path, cells))
    assert not ran


def test_a_cell_may_set_a_shared_pipeline_s_key_to_a_stage_of_its_own(tmp_path, ran) -> None:  # noqa: F811
    """What a later override replaces is not read: its stage need not be there, and makes nothing stale."""
    steps = make_cells(comparison(tmp_path))["other-s0"]
    assert [str(folder.folder) for folder in steps[-1].inputs] == [str(tmp_path / "runs" / "other-s0" / "train-other")]
    assert Work in {type(step.config) for step in steps}
