"""``slm compare``: the cells of one YAML (frame rates, tokenizers) through the same stages, into one table.

A cell is a name and what it sets; `axes` make a matrix of them (rates x methods x seeds), of which stages that do the
same in several cells run once. A cell whose system is made by other commands names the ``stages`` that it runs.
Stages marked ``shared`` (the teacher, the text LM) run once; the others once per cell, in ``run_dir/<cell>/``. A
comparison that was cut off goes on; a cell added later runs alone; ``only`` runs some cells now. A cell that fails is
named in the table, and the others go on. The table holds every cell that is complete, and ``contrasts`` compares groups
of them, such as the seeds of one method with those of another. A cell's method and seed follow from what it sets; it
may state them as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from rich.console import Console

from eval.contrasts import make_contrasts
from eval.report.contrasts import write_contrasts
from eval.report.markdown import write_markdown
from eval.report.page import format_table, write_report
from eval.rescoring import up_to_date
from eval.schema import Contrast, Results, Row, load_results, merge_results, save_results
from eval.text.lengths import LENGTHS_HELP, LengthBin, in_order
from eval.text_lengths import rows_within
from eval.trainings import Budget
from recipes.config import ConfigError, Problems
from recipes.runs.embedded import check_embedded
from recipes.runs.logs import log
from recipes.runs.pipeline import (
    PipelineConfig,
    StageError,
    Step,
    clock,
    describe,
    make_steps,
    refuse_stale,
    results_folders,
    run_steps,
    set_aside_from,
    stage_override,
)
from recipes.runs.run_folder import ADJUSTABLE, COMPLETE_FILE, RunFolder
from recipes.scoring import fairness
from recipes.scoring.cell_notes import notes_once
from recipes.scoring.cells import Axis, Cell, Identity, cells_of, check_stages, identify
from recipes.scoring.trainings import configurations_of, curves_of

# What does not depend on the cell: kept once in the table.
COMMON_SYSTEMS = ("ground_truth",)


class CellsFailed(ConfigError):
    """Some cells failed; the table of the others is written."""


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
        if clash := set(names) & {stage.name for stage in self.stages}:
            raise ValueError(f"cells: {', '.join(sorted(clash))} is a stage's name too; rename the cell")
        check_stages(self.cells, [stage.name for stage in self.stages])
        for item in [item for axis in self.axes for name in axis.values for item in axis.value(name).set]:
            stage_override(item, [stage.name for stage in self.stages])  # also of what a cell leaves out
        if unknown := set(self.only or ()) - set(names):
            raise ValueError(f"only: no cell is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")

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


def make_cells(config: Config, budgets: Mapping[str, Budget] | None = None) -> dict[str, list[Step]]:
    """Every cell's stages.

    Args:
        config: the comparison.
        budgets: of the cells' fine-tunings; None: those of earlier starts that still hold, where fairness is asked for.

    Raises:
        ConfigError: one is wrong, or an embedded model is missing.
    """
    steps = _steps_of(config, {})
    if config.fairness is not None:
        if budgets is None:
            budgets = fairness.saved_budgets(config.run_dir, fairness.trained_cells(steps), config.fairness)
        steps = _steps_of(config, {cell: fairness.override_of(steps[cell], budgets[cell]) for cell in budgets})
    if not any(results_folders(some) for some in steps.values()):
        raise ConfigError("stages: none is an `evaluate`, so there would be nothing to compare")
    chosen = [step for cell, some in steps.items() if config.runs(cell) for step in some]
    check_embedded(step.config for step in chosen if not step.folder.done(step.config))
    return steps


def _steps_of(config: Config, more: Mapping[str, list[str]]) -> dict[str, list[Step]]:
    """Every cell's stages, with what else each sets, cell -> ``STAGE.key=value``."""
    owners = {} if config.axes else None  # comparisons without axes were begun with a folder for each cell
    return {
        cell.name: make_steps(config, cell.name, [*cell.set, *more.get(cell.name, [])], owners, cell.stages)
        for cell in config.cells
    }


def plan(config: Config) -> dict[str, object]:
    """Every cell's stages and where they stand; raises what is wrong in any of them."""
    facts: dict[str, object] = {}
    RunFolder(config.run_dir).check(config)
    problems = Problems("slm compare")
    budgets = None
    if config.fairness is not None:
        budgets, facts["fairness"] = plan_budgets(config)
    for cell, steps in make_cells(config, budgets).items():
        if config.runs(cell):
            facts[cell] = problems.attempt(describe, steps)
        else:
            facts[cell] = f"not run (only): {missing_of(steps) or 'complete'}"
    problems.raise_all()
    return facts | {"result": config.run_dir}


def plan_budgets(config: Config) -> tuple[dict[str, Budget], dict[str, object]]:
    """The budgets that can be known now, and a plan's lines on all of them; nothing is run or kept."""
    cells = make_cells(config, {})
    trained = fairness.trained_cells(cells)
    ready = [cell for cell, steps in trained.items() if _has_codes(steps, cell)]
    reference = next(iter(trained))
    budgets = fairness.find_budgets(trained, ready, config.fairness) if reference in ready else {}
    waits = dict.fromkeys(cells, "as configured: it has no `finetune`")
    waits |= dict.fromkeys(trained, "follows from codes that are not made yet")
    waits[reference] = "as configured; its codes are not made yet"
    lines = {cell: fairness.budget_text(budgets[cell]) if cell in budgets else waits[cell] for cell in cells}
    return budgets, {f"as many {config.fairness} as {reference}": lines}


def _has_codes(steps: list[Step], cell: str) -> bool:
    """Whether all that a cell's fine-tuning waits for is there."""
    return all(step.folder.done(step.config) for step in fairness.before_training(steps, cell))


def run(config: Config) -> Path:
    """Run the cells' stages that are not complete, then one table of every complete cell; returns the report.

    Raises:
        CellsFailed: after all else, where cells failed.
    """
    return end_with(config, make_table(config))


def make_table(config: Config, notes: Sequence[str] = ()) -> dict[str, str]:
    """Run the cells and write what came out; returns why cells failed.

    Args:
        config: the comparison.
        notes: what the table's reader should know besides.
    """
    started = time.perf_counter()
    cells = make_cells(config)
    folder = RunFolder(config.run_dir)
    folder.check(config)
    if folder.complete and any(missing_of(steps) for steps in cells.values()):  # a cell was added since
        folder.path(COMPLETE_FILE).unlink()
    folder.start(config)
    chosen = {cell: steps for cell, steps in cells.items() if config.runs(cell)}
    if config.redo is not None:
        for steps in chosen.values():
            set_aside_from(steps, config.redo)
    early: dict[str, str] = {}
    if config.fairness is not None:
        cells, early = with_budgets(config, cells)
        chosen = {cell: steps for cell, steps in cells.items() if config.runs(cell) and cell not in early}
    seconds, failed = run_cells(chosen)
    failed = early | failed
    results = gather(cells, config, failed)
    results.notes += notes
    save_results(results, folder.folder)
    write_report(results, folder.folder)
    write_markdown(results, folder.folder)
    if results.contrasts:
        target = write_contrasts(results.contrasts, config.title, folder.folder)
        log.info("contrasts: %s, and .svg and .png beside it", target)
    if all(missing_of(steps) is None for steps in cells.values()):
        folder.mark_complete({"seconds": seconds})
    log.info("%d cells in %s", len(chosen), clock(time.perf_counter() - started))
    return failed


def with_budgets(config: Config, cells: dict[str, list[Step]]) -> tuple[dict[str, list[Step]], dict[str, str]]:
    """The cells with steps that make `fairness` hold; the stages before the fine-tunings run first.

    Returns:
        the cells, and why some of them failed on the way.

    Raises:
        ConfigError: the reference's corpus cannot be made, without which no cell has a budget.
    """
    plain, reference = fairness.trained_cells(make_cells(config, {})), next(iter(cells))
    chosen = [cell for cell in plain if config.runs(cell)]
    kept = fairness.saved_budgets(config.run_dir, plain, config.fairness)
    if not chosen or all(cell in kept and _has_codes(plain[cell], cell) for cell in [reference, *chosen]):
        return cells, {}
    early = {cell: fairness.before_training(cells[cell], cell) for cell in dict.fromkeys([reference, *chosen])}
    _, failed = run_cells(early)
    if reference in failed:
        raise ConfigError(
            f"fairness: {reference}, whose fine-tuning the others' steps follow from, failed: {failed[reference]}"
        )
    able = [cell for cell, steps in plain.items() if _has_codes(steps, cell)]  # those of earlier starts too
    budgets = fairness.find_budgets(plain, able, config.fairness)
    fairness.save_budgets(config.run_dir, plain, budgets)
    for budget in budgets.values():
        log.info("fairness (%s), %s: %s", config.fairness, budget.cell, fairness.budget_text(budget))
    return make_cells(config, budgets), failed


def end_with(config: Config, failed: Mapping[str, str]) -> Path:
    """Print the table; returns the report. Raises CellsFailed where cells failed."""
    report = show_results(Path(config.run_dir))
    if failed:
        lines = [f"{len(failed)} of the cells failed:", *(f"{cell}: {why}" for cell, why in failed.items())]
        raise CellsFailed("\n  - ".join(lines) + "\nThe others are in the table. The same command tries these again.")
    return report


def run_cells(cells: dict[str, list[Step]]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Run the cells one after the other; one that fails does not keep the others from running.

    Returns:
        cell -> stage -> seconds of what ran, and cell -> why it failed.

    Raises:
        Exception: what a shared stage raised, without which no cell can run.
    """
    seconds, failed = {}, {}
    for cell, steps in cells.items():
        try:
            seconds[cell] = run_steps(steps, label=f"{cell}: ")
        except StageError as error:
            if error.stage.shared:
                raise error.cause from None
            # What no user can have caused keeps its traceback.
            log.error("%s failed, %s", cell, error, exc_info=not isinstance(error.cause, ValueError | OSError))
            failed[cell] = str(error)  # the error itself holds on to all that its stage had in memory
    return seconds, failed


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


def gather(cells: dict[str, list[Step]], config: Config, failed: Mapping[str, str] | None = None) -> Results:
    """One table of every complete cell; the others are named in its notes, those that ``failed`` with their error.

    Raises:
        ConfigError: no cell is complete.
    """
    found, notes = {}, []
    for cell, steps in cells.items():
        if (why := missing_of(steps)) is not None:
            log.warning("left out of the table: %s, %s", cell, why)
            kind, why = ("failed", failed[cell]) if failed and cell in failed else ("left out", why)
            notes.append(f"{kind}: {cell}, {why.splitlines()[0]}")
            continue
        found[cell] = [_current(load_results(place), place) for place in results_folders(steps)]
    if not found:
        raise ConfigError(f"no cell is complete yet, so there is no table: {'; '.join(notes)}")
    about = identities(cells, config, found)
    parts = {
        cell: merge_results([label_results(one, about[cell]) for one in some], cell) for cell, some in found.items()
    }
    results = merge_results(list(parts.values()), config.title)
    folders = {cell: {step.stage.name: step.config.run_dir for step in cells[cell]} for cell in parts}
    results.notes = notes_once({cell: part.notes for cell, part in parts.items()}, folders) + notes
    results.without = {cell.name: cell.without for cell in config.cells if cell.name in found and cell.without}
    if config.text_lengths:
        results.text_lengths = in_order(config.text_lengths)
    _add_trainings(results, {cell: cells[cell] for cell in found}, about)
    if config.fairness is not None:
        plain = fairness.trained_cells(make_cells(config, {}))
        budgets = fairness.saved_budgets(config.run_dir, plain, config.fairness)
        results.budgets = [budget for cell, budget in budgets.items() if cell in found]
    for contrast in config.contrasts:
        a, b = (contrast.group(patterns, parts) for patterns in (contrast.a, contrast.b))
        if a and b:
            made = _contrasts(contrast.name, *({cell: parts[cell].rows for cell in side} for side in (a, b)), results)
            if min(len(a), len(b)) > 1 and not all(one.of_methods for one in made):
                log.warning(
                    "contrast %s: cells of one side differ in more than their seed and rows' verdicts are about the "
                    "models alone; where they are seeds of one method, state `method` and `seed` in each cell",
                    contrast.name,
                )
            results.contrasts += made
        else:
            waits = [*(() if a else contrast.a), *(() if b else contrast.b)]
            log.warning("contrast %s waits for %s", contrast.name, ", ".join(waits))
    return results


def _contrasts(name: str, a: dict[str, list[Row]], b: dict[str, list[Row]], results: Results) -> list[Contrast]:
    """Contrasts of two groups on whole test sets and, where lengths are named, on the texts of each."""
    made = make_contrasts(name, a, b)
    several = len({row.protocol.test_set.name for rows in a.values() for row in rows}) > 1
    for bin_ in results.text_lengths:
        within = [{cell: rows_within(rows, bin_, least=2) for cell, rows in side.items()} for side in (a, b)]
        # Of several test sets each one's name, which says the length, is added there.
        made += make_contrasts(name if several else f"{name}, {bin_.name} texts", *within)
    return made


def _current(results: Results, place: Path) -> Results:
    """The results, scored again from their texts where a normaliser has changed; as they are where they keep none."""
    try:
        return up_to_date(results)
    except ValueError as error:
        log.warning("%s: %s; its rows stand under the normaliser's old version", place, error)
        return results


def _add_trainings(results: Results, cells: dict[str, list[Step]], about: dict[str, Identity]) -> None:
    """Each cell's learning curves and settings, in place."""
    found: dict[str, set[float | None]] = {cell: set() for cell in cells}
    for row in results.rows:
        found.get(row.cell, set()).add(row.frame_rate_hz)
    rates = {cell: next(iter(some), None) for cell, some in ((c, s - {None}) for c, s in found.items())}
    results.curves = [curve for cell, steps in cells.items() for curve in curves_of(steps, about[cell], rates[cell])]
    results.configurations = configurations_of(cells, about, rates)


def identities(cells: dict[str, list[Step]], config: Config, found: dict[str, list[Results]]) -> dict[str, Identity]:
    """What each cell that has results stands for."""
    stages, rates = {}, {}
    for cell, some in found.items():
        stages[cell] = {step.stage.name: step.config for step in cells[cell] if not step.stage.shared}
        there = {row.frame_rate_hz for one in some for row in one.rows} - {None}
        rates[cell] = there.pop() if len(there) == 1 else None
    return identify([cell for cell in config.cells if cell.name in found], stages, rates)


def label_results(results: Results, about: Identity) -> Results:
    """Say of rows, players, code and quality figures that depend on a cell which one it is; in place."""
    renamed = {}
    for row in results.rows:
        if row.system not in COMMON_SYSTEMS:
            before = row.label
            row.cell, row.method, row.seed = about.cell, about.method, about.seed
            renamed[before] = row.label
    for row in results.rows:
        if row.difference is not None:
            row.difference = replace(
                row.difference, against=renamed.get(row.difference.against, row.difference.against)
            )
    for sample in results.samples:
        for clip in sample.clips:
            clip.cell = about.cell if clip.label in renamed else ""
            # Beside judges, the cells' own transcripts: each under its row's label.
            clip.heard = {renamed.get(name, name): text for name, text in clip.heard.items()}
    results.codes = [replace(item, cell=about.cell) for item in results.codes]
    results.quality = [replace(item, cell=about.cell) for item in results.quality]
    return results
