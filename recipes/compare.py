"""``slm compare``: the cells of one YAML (frame rates, tokenizers) through the same stages, into one table.

A cell is a name and what it sets. Stages marked ``shared`` (the teacher, the text LM) run once; the others once per
cell, in ``run_dir/<cell>/``. A comparison that was cut off goes on; a cell added later runs alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from eval.report import write_report
from eval.schema import Results, load_results, merge_results, save_results
from recipes.config import ConfigError
from recipes.pipeline import (
    PipelineConfig,
    Step,
    clock,
    describe,
    make_steps,
    results_folders,
    run_steps,
    set_aside_from,
)
from recipes.quickstart import show_results
from recipes.runtime import MAY_CHANGE, RunFolder, log

# What does not depend on the cell: kept once in the table.
COMMON_SYSTEMS = ("ground_truth",)


@dataclass
class Cell:
    """One column of the experiment."""

    name: str = field(metadata={"help": "stands in the table and names the folder"})
    set: list[str] = field(default_factory=list, metadata={"help": "what differs, as STAGE.key=value"})

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name {self.name!r} must be usable as a folder's name")


@dataclass
class Config(PipelineConfig):
    """A pipeline and the cells that go through it."""

    run_dir: str = "runs/compare"
    cells: list[Cell] = field(default_factory=list, metadata={"help": "what is compared", MAY_CHANGE: True})
    title: str = field(default="Comparison", metadata={"help": "of the report", MAY_CHANGE: True})

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [cell.name for cell in self.cells]
        if not names or len(set(names)) != len(names):
            raise ValueError("cells: give at least one, each with a name of its own")
        if clash := set(names) & {stage.name for stage in self.stages}:
            raise ValueError(f"cells: {', '.join(sorted(clash))} is a stage's name too; rename the cell")


def _cells(config: Config) -> dict[str, list[Step]]:
    steps = {cell.name: make_steps(config, cell.name, cell.set) for cell in config.cells}
    if not any(results_folders(some) for some in steps.values()):
        raise ConfigError("stages: none is an `evaluate`, so there would be nothing to compare")
    return steps


def plan(config: Config) -> dict[str, object]:
    """Every cell's stages and where they stand; raises what is wrong in any of them."""
    return {cell: describe(steps) for cell, steps in _cells(config).items()} | {"result": config.run_dir}


def run(config: Config) -> Path:
    """Run every cell's stages that are not complete, then one table; returns the report."""
    started = time.perf_counter()
    cells = _cells(config)
    folder = RunFolder(config.run_dir).start(config)
    if config.redo is not None:
        for steps in cells.values():
            set_aside_from(steps, config.redo)
    seconds, parts = {}, []
    for cell, steps in cells.items():
        seconds[cell] = run_steps(steps, label=f"{cell}: ")
        parts += [label_results(load_results(place), cell) for place in results_folders(steps)]
    results = merge_results(parts, config.title)
    save_results(results, folder.folder)
    write_report(results, folder.folder)
    folder.mark_complete({"seconds": seconds})
    log.info("%d cells in %s", len(cells), clock(time.perf_counter() - started))
    return show_results(folder.folder)


def label_results(results: Results, cell: str) -> Results:
    """Put the cell's name before the names of rows, players, code and quality figures that depend on it; in place."""
    renamed = {row.name: f"{cell}: {row.name}" for row in results.rows if row.system not in COMMON_SYSTEMS}
    for row in results.rows:
        row.name = renamed.get(row.name, row.name)
        if row.difference is not None and row.difference.against in renamed:
            against = renamed[row.difference.against]
            row.difference = type(row.difference)(**(vars(row.difference) | {"against": against}))
    for sample in results.samples:
        for clip in sample.clips:
            clip.label = renamed.get(clip.label, clip.label)
            # Beside judges, the cells' own transcripts: each under its row's name.
            clip.heard = {renamed.get(name, name): text for name, text in clip.heard.items()}
    results.codes = [
        item if item.name.startswith(f"{cell}/") else replace(item, name=f"{cell}: {item.name}")
        for item in results.codes
    ]
    results.quality = [replace(item, name=renamed.get(item.name, item.name)) for item in results.quality]
    return results
