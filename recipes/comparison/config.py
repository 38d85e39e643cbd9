"""The keys of `slm compare`: a pipeline, the cells that go through it, and what is contrasted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from eval.text.lengths import LENGTHS_HELP, LengthBin, in_order
from recipes.comparison.cells import Axis, Cell, cells_of, check_stages
from recipes.comparison.workers import LOGS
from recipes.runs.pipeline import PipelineConfig, stage_override
from recipes.runs.run_folder import ADJUSTABLE
from recipes.suggestions import did_you_mean


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

    run_dir: str = field(default="runs/compare", metadata={"help": "a folder for each cell, and the table's"})
    cells: list[Cell] = field(default_factory=list, metadata={"help": "what is compared", **ADJUSTABLE})
    axes: list[Axis] = field(
        default_factory=list,
        metadata={
            "help": "or a matrix: a cell for each choice of their values; what several of its cells do alike, such as "
            "encoding for two seeds, is done once",
            **ADJUSTABLE,
        },
    )
    only: list[str] | None = field(
        default=None,
        metadata={
            "help": "run these cells now; []: none, the table over what is complete; null: all",
            **ADJUSTABLE,
        },
    )
    parallel_cells: int = field(
        default=1,
        metadata={
            "help": "so many cells at once, each in a process of its own, on one of the GPUs or its part of the CPU's "
            "threads; what they say goes to run_dir/logs",
            **ADJUSTABLE,
        },
    )
    contrasts: list[Contrasted] = field(
        default_factory=list, metadata={"help": "differences between groups of cells, seeds pooled", **ADJUSTABLE}
    )
    fairness: Literal["steps", "tokens", "audio_seconds", "flops"] | None = field(
        default=None,
        metadata={
            "help": "what every cell's fine-tuning sees as much of as the first cell's does: its steps follow from the "
            "coded corpora and the model; null: as the stages say",
            **ADJUSTABLE,
        },
    )
    text_lengths: list[LengthBin] = field(
        default_factory=list,
        metadata={"help": f"{LENGTHS_HELP}. Contrasts are drawn on each length too", **ADJUSTABLE},
    )
    title: str = field(default="Comparison", metadata={"help": "of the report", **ADJUSTABLE})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cells = self._with_matrix()
        names = [cell.name for cell in self.cells]
        if not names or len(set(names)) != len(names):
            raise ValueError("cells: give at least one, each with a name of its own")
        if self.parallel_cells < 1:
            raise ValueError(f"parallel_cells={self.parallel_cells}: give at least 1")
        if clash := set(names) & {stage.name for stage in self.stages}:
            raise ValueError(f"cells: {', '.join(sorted(clash))} is a stage's name too; rename the cell")
        if clash := set(names) & {LOGS, "transcripts"}:
            raise ValueError(f"cells: {', '.join(sorted(clash))} is a folder of the comparison itself; rename the cell")
        check_stages(self.cells, [stage.name for stage in self.stages])
        for item in [item for axis in self.axes for name in axis.values for item in axis.value(name).set]:
            stage_override(item, [stage.name for stage in self.stages])  # also of what a cell leaves out
        if unknown := sorted(set(self.only or ()) - set(names)):
            guess = did_you_mean(unknown[0], names)
            raise ValueError(f"only: no cell is called {', '.join(unknown)}; {guess}there are {', '.join(names)}")

        in_order(self.text_lengths)
        headings = [contrast.name for contrast in self.contrasts]
        if twice := {name for name in headings if headings.count(name) > 1}:
            raise ValueError(f"contrasts: {', '.join(sorted(twice))} stands there twice; give each a name of its own")
        for contrast in self.contrasts:
            sides = [contrast.group(patterns, names) for patterns in (contrast.a, contrast.b)]
            unmatched = [p for p in (*contrast.a, *contrast.b) if not contrast.group([p], names)]
            if unmatched or not all(sides) or set(sides[0]) & set(sides[1]):
                why = f"no cell fits {', '.join(unmatched)}" if unmatched else "a and b must hold different cells"
                raise ValueError(f"contrasts: {contrast.name!r}: {why}; there are {', '.join(names)}")

    def _with_matrix(self) -> list[Cell]:
        """The cells that are listed and those of the axes; a resolved configuration lists both. Raises ValueError."""
        if twice := {axis.name for axis in self.axes if [other.name for other in self.axes].count(axis.name) > 1}:
            raise ValueError(f"axes: {', '.join(sorted(twice))} stands there twice; give each a name of its own")
        listed = {cell.name: cell for cell in self.cells}
        made = [cell for cell in cells_of(self.axes) if listed.get(cell.name) != cell]
        if clash := [cell.name for cell in made if cell.name in listed]:
            raise ValueError(f"cells: {', '.join(clash)} of the axes is listed with other settings; rename one")
        return [*self.cells, *made]

    def runs(self, cell: str) -> bool:
        """Whether the cell is to be run, not only shown."""
        return self.only is None or cell in self.only
