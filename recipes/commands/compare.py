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
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from eval.report.contrasts import write_contrasts
from eval.report.documents import write_documents
from eval.report.page import write_report
from eval.report.terminal import format_table
from eval.results_file import load_results, save_results
from recipes.comparison.config import Config
from recipes.comparison.running import make_cells, missing_of, plan_budgets, run_cells, with_budgets
from recipes.comparison.table import gather
from recipes.config import ConfigError, Problems
from recipes.runs.logs import log
from recipes.runs.pipeline import clock, describe, set_aside_from
from recipes.runs.run_folder import COMPLETE_FILE, RunFolder, command_text


class CellsFailed(ConfigError):
    """Some cells failed; the table of the others is written."""


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
    seconds, failed = run_cells(chosen, config)
    failed = early | failed
    results = gather(cells, config, failed)
    results.notes += notes
    results.command = command_text()
    save_results(results, folder.folder)
    write_report(results, folder.folder)
    write_documents(results, folder.folder)
    if results.contrasts:
        target = write_contrasts(results.contrasts, config.title, folder.folder)
        log.info("contrasts: %s, and .svg and .png beside it", target)
    if all(missing_of(steps) is None for steps in cells.values()):
        folder.mark_complete({"seconds": seconds})
    log.info("%d cells in %s", len(chosen), clock(time.perf_counter() - started))
    return failed


def end_with(config: Config, failed: Mapping[str, str]) -> Path:
    """Print the table; returns the report. Raises CellsFailed where cells failed."""
    report = show_results(Path(config.run_dir))
    if failed:
        lines = [f"{len(failed)} of the cells failed:", *(f"{cell}: {why}" for cell, why in failed.items())]
        raise CellsFailed("\n  - ".join(lines) + "\nThe others are in the table. The same command tries these again.")
    return report


def show_results(place: Path) -> Path:
    """Print the table of a folder's results.json; returns its report."""
    Console(soft_wrap=True).print(format_table(load_results(place)), markup=False, highlight=False)
    log.info("report: %s", place / "report.html")
    return place / "report.html"
