"""One table of every complete cell: results merged, named by cell, contrasted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from eval.contrasts import make_contrasts
from eval.merging import merge_results
from eval.rescoring import up_to_date
from eval.results_file import load_results
from eval.schema import Contrast, Results, Row
from eval.text.lengths import in_order
from eval.text_lengths import rows_within
from recipes.comparison import fairness
from recipes.comparison.cell_notes import notes_once
from recipes.comparison.cells import Identity, identify
from recipes.comparison.config import Config
from recipes.comparison.running import make_cells, missing_of
from recipes.comparison.trainings import configurations_of, costs_of, curves_of
from recipes.config import ConfigError
from recipes.runs.logs import log
from recipes.runs.pipeline import Step, results_folders

# What does not depend on the cell: kept once in the table.
COMMON_SYSTEMS = ("ground_truth",)


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
    results.costs = [cost for cell in found for cost in costs_of(cells[cell], cell)]
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
