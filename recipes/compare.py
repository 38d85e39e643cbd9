"""``slm compare``: the cells of one YAML (frame rates, tokenizers) through the same stages, into one table.

A cell is a name and what it sets. Stages marked ``shared`` (the teacher, the text LM) run once; the others once per
cell, in ``run_dir/<cell>/``. A comparison that was cut off goes on; a cell added later runs alone; ``only`` runs some
cells now. The table holds every cell that is complete, and ``contrasts`` compares groups of them, such as the seeds of
one method with those of another.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from rich.console import Console

from eval.contrasts import make_contrasts, write_contrasts
from eval.markdown import write_markdown
from eval.report import format_table, write_report
from eval.schema import Results, load_results, merge_results, save_results
from recipes.config import ConfigError
from recipes.embedded import check_embedded
from recipes.pipeline import (
    PipelineConfig,
    Step,
    clock,
    describe,
    make_steps,
    refuse_stale,
    results_folders,
    run_steps,
    set_aside_from,
)
from recipes.runtime import COMPLETE_FILE, MAY_CHANGE, RunFolder, log

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
class Contrasted:
    """Two groups of cells whose scores are subtracted, row by row."""

    name: str = field(metadata={"help": "heading, such as: resynthesis - pooled, 6.25 Hz"})
    a: list[str] = field(metadata={"help": "cells, or patterns of their names (6.25hz-pooled-*); seeds of one method"})
    b: list[str] = field(metadata={"help": "the cells that a is held against"})

    def group(self, patterns: list[str], cells: Iterable[str]) -> list[str]:
        """The cells that a pattern names, in their order."""
        return [cell for cell in cells if any(fnmatchcase(cell, pattern) for pattern in patterns)]


@dataclass
class Config(PipelineConfig):
    """A pipeline and the cells that go through it."""

    run_dir: str = "runs/compare"
    cells: list[Cell] = field(default_factory=list, metadata={"help": "what is compared", MAY_CHANGE: True})
    only: list[str] | None = field(
        default=None,
        metadata={
            "help": "run these cells now; []: none, the table over what is complete; null: all",
            MAY_CHANGE: True,
        },
    )
    contrasts: list[Contrasted] = field(
        default_factory=list, metadata={"help": "differences between groups of cells, seeds pooled", MAY_CHANGE: True}
    )
    title: str = field(default="Comparison", metadata={"help": "of the report", MAY_CHANGE: True})

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [cell.name for cell in self.cells]
        if not names or len(set(names)) != len(names):
            raise ValueError("cells: give at least one, each with a name of its own")
        if clash := set(names) & {stage.name for stage in self.stages}:
            raise ValueError(f"cells: {', '.join(sorted(clash))} is a stage's name too; rename the cell")
        if unknown := set(self.only or ()) - set(names):
            raise ValueError(f"only: no cell is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")

        for contrast in self.contrasts:
            sides = [contrast.group(patterns, names) for patterns in (contrast.a, contrast.b)]
            unmatched = [p for p in (*contrast.a, *contrast.b) if not contrast.group([p], names)]
            if unmatched or not all(sides) or set(sides[0]) & set(sides[1]):
                why = f"no cell fits {', '.join(unmatched)}" if unmatched else "a and b must hold different cells"
                raise ValueError(f"contrasts: {contrast.name!r}: {why}; there are {', '.join(names)}")

    def runs(self, cell: str) -> bool:
        """Whether the cell is to be run, not only shown."""
        return self.only is None or cell in self.only


def _cells(config: Config) -> dict[str, list[Step]]:
    steps = {cell.name: make_steps(config, cell.name, cell.set) for cell in config.cells}
    if not any(results_folders(some) for some in steps.values()):
        raise ConfigError("stages: none is an `evaluate`, so there would be nothing to compare")
    chosen = [step for cell, some in steps.items() if config.runs(cell) for step in some]
    check_embedded(step.config for step in chosen if not step.folder.done(step.config))
    return steps


def plan(config: Config) -> dict[str, object]:
    """Every cell's stages and where they stand; raises what is wrong in any of them."""
    facts: dict[str, object] = {}
    RunFolder(config.run_dir).check(config)
    for cell, steps in _cells(config).items():
        facts[cell] = describe(steps) if config.runs(cell) else f"not run (only): {missing_of(steps) or 'complete'}"
    return facts | {"result": config.run_dir}


def run(config: Config) -> Path:
    """Run the cells' stages that are not complete, then one table of every complete cell; returns the report."""
    started = time.perf_counter()
    cells = _cells(config)
    folder = RunFolder(config.run_dir)
    folder.check(config)
    if folder.complete and any(missing_of(steps) for steps in cells.values()):  # a cell was added since
        folder.path(COMPLETE_FILE).unlink()
    folder.start(config)
    chosen = {cell: steps for cell, steps in cells.items() if config.runs(cell)}
    if config.redo is not None:
        for steps in chosen.values():
            set_aside_from(steps, config.redo)
    seconds = {cell: run_steps(steps, label=f"{cell}: ") for cell, steps in chosen.items()}
    results = gather(cells, config)
    save_results(results, folder.folder)
    write_report(results, folder.folder)
    write_markdown(results, folder.folder)
    if results.contrasts:
        target = write_contrasts(results.contrasts, config.title, folder.folder)
        log.info("contrasts: %s, and .svg and .png beside it", target)
    if all(missing_of(steps) is None for steps in cells.values()):
        folder.mark_complete({"seconds": seconds})
    log.info("%d cells in %s", len(chosen), clock(time.perf_counter() - started))
    return show_results(folder.folder)


def show_results(place: Path) -> Path:
    """Print the table of a folder's results.json; returns its report."""
    Console(soft_wrap=True).print(format_table(load_results(place)), markup=False, highlight=False)
    log.info("report: %s", place / "report.html")
    return place / "report.html"


def missing_of(steps: list[Step]) -> str | None:
    """Why a cell cannot stand in the table (the first stage that is not complete, or not of this configuration)."""
    for step in steps:
        if not step.folder.done(step.config):
            return f"{step.stage.name} is not complete"
        try:
            step.folder.check(step.config)
            refuse_stale(step)
        except ConfigError as error:
            return f"{step.stage.name}: {error}"
    return None


def gather(cells: dict[str, list[Step]], config: Config) -> Results:
    """One table of every complete cell; the others are named in its notes.

    Raises:
        ConfigError: no cell is complete.
    """
    parts, notes = {}, []
    for cell, steps in cells.items():
        if (why := missing_of(steps)) is not None:
            log.warning("left out of the table: %s, %s", cell, why)
            notes.append(f"left out: {cell}, {why.splitlines()[0]}")
            continue
        some = [label_results(load_results(place), cell) for place in results_folders(steps)]
        parts[cell] = merge_results(some, cell)
    if not parts:
        raise ConfigError(f"no cell is complete yet, so there is no table: {'; '.join(notes)}")
    results = merge_results(list(parts.values()), config.title)
    results.notes += notes
    for contrast in config.contrasts:
        a, b = (contrast.group(patterns, parts) for patterns in (contrast.a, contrast.b))
        if a and b:
            groups = ({cell: parts[cell].rows for cell in side} for side in (a, b))
            results.contrasts += make_contrasts(contrast.name, *groups)
        else:
            waits = [*(() if a else contrast.a), *(() if b else contrast.b)]
            log.warning("contrast %s waits for %s", contrast.name, ", ".join(waits))
    return results


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
