"""`fairness` of `slm compare`: each cell's fine-tuning as long as makes one quantity equal in all of them.

The steps follow from the coded corpora and the model, so the stages before the fine-tuning run first. What was found
is kept in ``run_dir/fairness.json``, and found anew where a fine-tuning's settings or its corpus have changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eval.trainings import Budget
from recipes.config import ConfigError, from_values
from recipes.finetuning.config import Config as FinetuneConfig
from recipes.finetuning.corpora import open_corpora
from recipes.finetuning.exposure import Exposure, Quantity, equal_amounts, exposure_of
from recipes.runs.files import atomic_write_text, read_json
from recipes.runs.inputs import digest
from recipes.runs.pipeline import Step
from slm.corpus import CorpusError

FAIRNESS_FILE = "fairness.json"


def training_of(steps: Sequence[Step], cell: str) -> Step:
    """A cell's own fine-tuning. Raises ConfigError where it has none, or several."""
    found = [step for step in steps if _fine_tunes(step)]
    if len(found) != 1:
        names = ", ".join(step.stage.name for step in found) or "none"
        raise ConfigError(
            f"fairness: cell {cell} needs one `finetune` stage of its own, and has {names}; leave fairness out, or "
            "compare one fine-tuning at a time"
        )
    return found[0]


def trained_cells(cells: Mapping[str, Sequence[Step]]) -> dict[str, Sequence[Step]]:
    """The cells with a fine-tuning, whose steps can be chosen; the others, such as a system without codes, keep theirs.

    Raises:
        ConfigError: the first cell, which the others follow, has no fine-tuning, or several.
    """
    reference = next(iter(cells))
    training_of(cells[reference], reference)
    return {cell: steps for cell, steps in cells.items() if any(map(_fine_tunes, steps))}


def _fine_tunes(step: Step) -> bool:
    return step.stage.command == "finetune" and not step.stage.shared


def before_training(steps: Sequence[Step], cell: str) -> list[Step]:
    """The stages that a cell's fine-tuning waits for."""
    return list(steps[: steps.index(training_of(steps, cell))])


def override_of(steps: Sequence[Step], budget: Budget) -> list[str]:
    """What a cell sets for its fine-tuning to be as long as its budget says; nothing in the reference's."""
    if budget.cell == budget.reference:
        return []
    name = training_of(steps, budget.cell).stage.name
    return [f"{name}.training.steps={budget.steps}", f"{name}.training.epochs=null"]


def saved_budgets(folder: Path | str, cells: Mapping[str, Sequence[Step]], equal: Quantity) -> dict[str, Budget]:
    """The budgets found before that still hold; empty where the reference's does not.

    Args:
        folder: of the comparison.
        cells: the stages as configured of each cell that has a fine-tuning, the reference first.
        equal: the quantity.
    """
    values = read_json(Path(folder, FAIRNESS_FILE))
    reference = next(iter(cells))
    if values.get("equal") != equal or values.get("reference") != reference:
        return {}
    found = {}
    for cell, entry in values.get("cells", {}).items():
        if cell in cells and _still_holds(entry, training_of(cells[cell], cell).config):
            found[cell] = from_values(Budget, entry["budget"])
    return found if reference in found else {}


def _still_holds(entry: Mapping[str, Any], config: FinetuneConfig) -> bool:
    """Whether a budget is of these settings and this corpus; a corpus that is gone has not changed."""
    return entry["settings"] == _settings(config) and _corpus(config) in (entry["corpus"], None)


def _settings(config: FinetuneConfig, *without: str) -> str:
    """A hash of a fine-tuning's settings but for its folder."""
    values = {key: value for key, value in asdict(config).items() if key not in ("run_dir", *without)}
    return digest(json.dumps(values, sort_keys=True, default=str))


def _corpus(config: FinetuneConfig) -> str | None:
    try:
        return digest(open_corpora(config).index_text)
    except (ConfigError, CorpusError):
        return None


def find_budgets(cells: Mapping[str, Sequence[Step]], chosen: Iterable[str], equal: Quantity) -> dict[str, Budget]:
    """The budgets of the chosen cells and of the reference, which is the first one.

    Raises:
        ConfigError, CorpusError, ModelError: what a fine-tuning learns from is not there, or it holds none of the
            quantity.
    """
    reference = next(iter(cells))
    exposures: dict[str, Exposure] = {}
    known: dict[str, Exposure] = {}  # seeds see the same samples in other orders
    for cell in dict.fromkeys([reference, *chosen]):
        config: FinetuneConfig = training_of(cells[cell], cell).config
        if (key := _settings(config, "seed")) not in known:
            known[key] = exposure_of(config)
        exposures[cell] = replace(known[key], seed=config.seed)
    try:
        amounts = equal_amounts(exposures, reference, equal)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return {cell: Budget(cell, equal, reference, **asdict(some)) for cell, some in amounts.items()}


def save_budgets(folder: Path | str, cells: Mapping[str, Sequence[Step]], budgets: Mapping[str, Budget]) -> None:
    """Keep what was found, with what it holds for."""
    first = next(iter(budgets.values()))
    kept = {}
    for cell, budget in budgets.items():
        config = training_of(cells[cell], cell).config
        kept[cell] = {"settings": _settings(config), "corpus": _corpus(config), "budget": asdict(budget)}
    values = {"equal": first.equal, "reference": first.reference, "cells": kept}
    atomic_write_text(Path(folder, FAIRNESS_FILE), json.dumps(values, indent=2) + "\n")


def budget_text(budget: Budget) -> str:
    """One line for a plan."""
    return (
        f"{budget.steps:,} steps, {budget.tokens:,} tokens, {budget.audio_seconds:,.0f} s of speech, "
        f"{budget.flops:.3g} model FLOPs, {budget.epochs:.2f} epochs"
    )
