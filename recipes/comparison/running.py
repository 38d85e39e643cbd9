"""Every cell's stages: made, with the steps that fairness asks for, run, and what is missing of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from eval.trainings import Budget
from recipes.comparison import fairness
from recipes.comparison.config import Config
from recipes.comparison.workers import LOGS, run_with_workers
from recipes.config import ConfigError
from recipes.runs.embedded import check_embedded
from recipes.runs.logs import log
from recipes.runs.pipeline import StageError, Step, make_steps, refuse_stale, results_folders, run_steps


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
    owners = {} if config.axes else None  # without axes each cell has a folder of its own
    return {
        cell.name: make_steps(config, cell.name, [*cell.set, *more.get(cell.name, [])], owners, cell.stages)
        for cell in config.cells
    }


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
    _, failed = run_cells(early, config)
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


def run_cells(cells: dict[str, list[Step]], config: Config) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Run the cells, one after the other or several at once; one that fails does not keep the others from running.

    Returns:
        cell -> stage -> seconds of what ran, and cell -> why it failed.

    Raises:
        Exception: what a shared stage raised, without which no cell can run.
    """
    if config.parallel_cells > 1:
        return run_with_workers(cells, config.parallel_cells, Path(config.run_dir, LOGS))
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
