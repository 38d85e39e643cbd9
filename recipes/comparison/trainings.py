"""What a cell of `slm compare` leaves of its trainings: learning curves from ``metrics.jsonl``, cost, settings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from eval.trainings import Configuration, Cost, Curve, group_names
from recipes.comparison.cells import Identity
from recipes.config import dump_config, flatten, yaml_scalar
from recipes.runs.files import read_json, text_lines
from recipes.runs.pipeline import Step
from recipes.runs.run_folder import COMPLETE_FILE

MOST_POINTS = 200  # of a curve on the page; a longer one is shown by the means of equal stretches
_TRAIN = {"loss": "loss", "loss/total": "loss"}  # of transformers' Trainer, and of a tokenizer's training
_VALID = re.compile(r"(?:eval_|valid_)(?:(?P<task>\w+)_)?(?P<kind>loss|wer)")
_OF_TOKENIZER = {"valid/mel": "mel loss"}


def curves_of(steps: Sequence[Step], about: Identity, frame_rate_hz: float | None) -> list[Curve]:
    """The learning curves of a cell's own stages that logged any: loss in training, loss and WER on the valid split.

    Args:
        steps: the cell's stages.
        about: what the cell stands for.
        frame_rate_hz: of its tokenizer.
    """
    found = []
    for step in steps:
        if step.stage.shared:
            continue
        for (split, figure), points in _figures(step.folder.metrics).items():
            kept = [(at, value) for at, value in points if value is not None and math.isfinite(value)]
            if not kept:
                continue
            if figure.endswith("WER"):  # logged in per cent
                kept = [(at, value / 100) for at, value in kept]
            shown = _thinned(kept) if split == "train" else kept
            steps_, values = (list(column) for column in zip(*shown, strict=True))
            found.append(
                Curve(
                    *(about.cell, step.stage.name, split, figure, steps_, values),
                    method=about.method,
                    frame_rate_hz=frame_rate_hz,
                    seed=about.seed,
                    n_left_out=len(points) - len(kept),
                )
            )
    return found


def _figures(path: Path) -> dict[tuple[str, str], list[tuple[int, float | None]]]:
    """(split, figure) -> its (step, value); of a step that was logged twice the last. Empty where there is no log."""
    found: dict[tuple[str, str], dict[int, float | None]] = {}
    for line in text_lines(path) if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a run that was cut off
            continue
        for name, value in row.items() if isinstance(row, dict) and "step" in row else ():
            if (key := _named(name)) and (value is None or isinstance(value, int | float)):
                found.setdefault(key, {})[row["step"]] = value
    return {key: sorted(points.items()) for key, points in found.items()}


def _named(key: str) -> tuple[str, str] | None:
    """(split, figure) of a key of metrics.jsonl; None of one that is no curve of the report."""
    if key in _TRAIN:
        return "train", _TRAIN[key]
    if key in _OF_TOKENIZER:
        return "valid", _OF_TOKENIZER[key]
    if (match := _VALID.fullmatch(key)) is None:
        return None
    kind = {"loss": "loss", "wer": "WER"}[match["kind"]]
    return "valid", f"{match['task']} {kind}" if match["task"] else kind


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MOST_POINTS: each the mean of a stretch, at its last step."""
    size = -(-len(points) // MOST_POINTS)
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return [(some[-1][0], sum(value for _, value in some) / len(some)) for some in stretches]


def costs_of(steps: Sequence[Step], cell: str) -> list[Cost]:
    """What each of a cell's fine-tunings says that it cost; those of older folders say nothing."""
    found = []
    for step in steps:
        summary = step.folder.summary
        if "flops" in summary:
            wall_s = read_json(step.folder.path(COMPLETE_FILE)).get("wall_s")
            told = (summary["steps"], summary["flops"], summary["cache_bytes_per_s"])
            found.append(Cost(cell, step.stage.name, *told, wall_s=wall_s))
    return found


def configurations_of(
    cells: Mapping[str, Sequence[Step]], about: Mapping[str, Identity], rates: Mapping[str, float | None]
) -> list[Configuration]:
    """The settings of each method, its seeds together; folders of the cell's own stages stand as ``${stage}``.

    Args:
        cells: cell -> its stages.
        about: cell -> what it stands for.
        rates: cell -> frame rate of its tokenizer in Hz.
    """
    names = group_names([(cell, about[cell].method, rates.get(cell), about[cell].seed) for cell in cells])
    groups: dict[str, list[str]] = {}
    for cell in cells:
        groups.setdefault(names[cell], []).append(cell)
    found = []
    for name, members in groups.items():
        settings = [_settings(cells[cell]) for cell in members]
        keys = dict.fromkeys(key for one in settings for key in one)
        values = {key: " / ".join(dict.fromkeys(one.get(key, "") for one in settings)) for key in keys}
        values = {"stages": ", ".join(step.stage.name for step in cells[members[0]])} | values
        texts = {step.stage.name: dump_config(step.config) for step in cells[members[0]]}
        found.append(Configuration(name, members, values, texts))
    return found


def _settings(steps: Sequence[Step]) -> dict[str, str]:
    """Every setting of a cell's stages as text by its dotted key."""
    folders = sorted(((str(step.config.run_dir), step.stage.name) for step in steps), key=lambda item: -len(item[0]))
    found = {}
    for step in steps:
        own = flatten({step.stage.name: yaml.safe_load(dump_config(step.config))})
        del own[f"{step.stage.name}.run_dir"]
        found |= {key: yaml_scalar(_by_stage(value, folders)) for key, value in own.items()}
    return found


def _by_stage(value: Any, folders: Sequence[tuple[str, str]]) -> Any:
    """A value with each stage's folder in it replaced by ``${stage}``."""
    if isinstance(value, dict):
        return {key: _by_stage(inner, folders) for key, inner in value.items()}
    if isinstance(value, list):
        return [_by_stage(inner, folders) for inner in value]
    for folder, stage in folders:
        if isinstance(value, str) and (value == folder or value.startswith(f"{folder}/")):
            return "${" + stage + "}" + value.removeprefix(folder)
    return value
