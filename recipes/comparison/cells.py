"""What a cell of `slm compare` stands for: its method and its seed, beside the frame rate that its tokenizer has.

A cell may state both. Otherwise they follow from what the cells set: the seed is what its keys called ``seed`` say, the
method whatever else they differ in. Cells of one method at one frame rate that differ in seed are pooled in plots, and
let a contrast speak of the method. Cells run all stages of the comparison, or those alone that their ``stages`` name.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import yaml

from recipes.config import yaml_scalar
from recipes.suggestions import did_you_mean

_RATE = "\0"  # stands for a cell's own frame rate in a value


@dataclass
class Cell:
    """One column of the experiment."""

    name: str = field(metadata={"help": "stands in the table and names the folder"})
    set: list[str] = field(default_factory=list, metadata={"help": "what differs, as STAGE.key=value"})
    stages: list[str] | None = field(
        default=None, metadata={"help": "the stages that it runs, in the order of the comparison's; null: all"}
    )
    method: str | None = field(
        default=None,
        metadata={"help": "what it stands for, beside frame rate and seed; null: what it sets that others do not"},
    )
    seed: int | None = field(
        default=None, metadata={"help": "of its trainings; null: that of the stages' `seed` where they have one"}
    )
    without: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "why it has no score in a task (asr, tts, st ...) or in semantic_reconstruction, for the table"
        },
    )

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name {self.name!r} must be usable as a folder's name")


@dataclass
class AxisValue:
    """A value of an axis whose cells run some of the stages, such as a system that is trained by another command."""

    set: list[str] = field(default_factory=list, metadata={"help": "what it sets, as STAGE.key=value"})
    stages: list[str] | None = field(default=None, metadata={"help": "the stages that its cells run; null: all"})
    without: dict[str, str] = field(
        default_factory=dict, metadata={"help": "why its cells have no score in a task (asr, tts, st ...)"}
    )


@dataclass
class Axis:
    """What cells differ in: one of its values stands in each."""

    name: str = field(metadata={"help": "rate, method, seed ...; the values of `method` name the cells' methods"})
    values: dict[str, list[str] | AxisValue] = field(
        metadata={
            "help": "a value's name, which is part of the cells' names, and what it sets, as STAGE.key=value; or "
            "{stages: [...], set: [...]}, where its cells run these stages alone"
        }
    )

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"axis {self.name}: give at least one value")

    def value(self, name: str) -> AxisValue:
        """A value in its long form."""
        value = self.values[name]
        return value if isinstance(value, AxisValue) else AxisValue(value)


def cells_of(axes: Sequence[Axis]) -> list[Cell]:
    """The cells of a matrix: one for each choice of values, called by them, the last axis changing first.

    Where a value names the stages of its cells, they take of the other axes' values what is of these stages: a seed
    axis may seed the trainings of all systems. Raises ValueError where two axes name stages.

    >>> rates = Axis("rate", {"25hz": ["encode.tokenizer=embedded-25hz"], "12.5hz": []})
    >>> [cell.name for cell in cells_of([rates, Axis("seed", {"s0": [], "s1": ["finetune.seed=1"]})])]
    ['25hz-s0', '25hz-s1', '12.5hz-s0', '12.5hz-s1']
    """
    found = []
    for chosen in itertools.product(*(axis.values for axis in axes)) if axes else ():
        name, parts = "-".join(chosen), dict(zip((axis.name for axis in axes), chosen, strict=True))
        values = [axis.value(parts[axis.name]) for axis in axes]
        naming = [value for value in values if value.stages is not None]
        if len(naming) > 1:
            raise ValueError(f"axes: cell {name} has its `stages` from several axes; name them in the values of one")
        stages = naming[0].stages if naming else None
        sets = [
            item
            for value in values
            for item in value.set
            if stages is None or value.stages is not None or stage_of(item) in stages
        ]
        without = {kind: reason for value in values for kind, reason in value.without.items()}
        found.append(Cell(name, sets, stages, method=parts.get("method"), without=without))
    return found


def stage_of(item: str) -> str:
    """The stage of ``STAGE.key=value``."""
    return item.partition("=")[0].partition(".")[0].strip()


def check_stages(cells: Sequence[Cell], stages: Sequence[str]) -> None:
    """Whether the stages that cells name are those of the comparison.

    Args:
        cells: all of them.
        stages: the names of the comparison's stages.

    Raises:
        ValueError: a cell names no stage, one twice or an unknown one, or sets a key of a stage that it does not run;
            or no cell runs a stage. The message names the cell and the stage.
    """
    for cell in cells:
        if cell.stages is None:
            continue
        if not cell.stages:
            raise ValueError(f"cells: {cell.name}: stages is empty; name those that it runs, or leave the key out")
        if twice := _more_than_once(cell.stages):
            raise ValueError(f"cells: {cell.name}: stages: {', '.join(twice)} stands there twice")
        if unknown := [name for name in cell.stages if name not in stages]:
            guess = did_you_mean(unknown[0], stages)
            raise ValueError(
                f"cells: {cell.name}: stages: there is no {', '.join(unknown)}; {guess}there are {', '.join(stages)}"
            )
        if idle := dict.fromkeys(stage_of(item) for item in cell.set if stage_of(item) not in cell.stages):
            raise ValueError(
                f"cells: {cell.name} sets {', '.join(idle)}, which is not among the stages that it runs "
                f"({', '.join(cell.stages)})"
            )
    if idle := [name for name in stages if all(cell.stages is not None and name not in cell.stages for cell in cells)]:
        raise ValueError(f"stages: no cell runs {', '.join(idle)}; name it in a cell's `stages`, or leave it out")


def _more_than_once(names: Collection[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


@dataclass(frozen=True)
class Identity:
    """What the rows of a cell are about; empty or None where nothing tells."""

    cell: str
    method: str = ""
    seed: int | None = None


def identify(
    cells: Sequence[Cell], stages: Mapping[str, Mapping[str, Any]], rates: Mapping[str, float | None]
) -> dict[str, Identity]:
    """Method and seed of each cell.

    Args:
        cells: those that stand in the table.
        stages: cell -> stage that it has to itself -> typed configuration.
        rates: cell -> frame rate of its tokenizer in Hz; a value that names it ("nano-6.25hz") is no method.
    """
    keys = list(dict.fromkeys(item.partition("=")[0].strip() for cell in cells for item in cell.set))
    values = {cell.name: {key: _value(cell, key, stages[cell.name]) for key in keys} for cell in cells}
    seed_keys = [key for key in keys if key.rpartition(".")[2] == "seed"]
    given = {
        cell.name: [values[cell.name][key] for key in seed_keys if _may_set(cell, stage_of(key))] for cell in cells
    }
    seeds = {cell.name: _seed(cell, given[cell.name], stages[cell.name]) for cell in cells}
    if None not in seeds.values():
        keys = [key for key in keys if key not in seed_keys]
    shown = {name: {key: _hide_rate(own[key], rates[name]) for key in keys} for name, own in values.items()}
    methods = _methods(keys, shown)
    return {
        cell.name: Identity(cell.name, methods[cell.name] if cell.method is None else cell.method, seeds[cell.name])
        for cell in cells
    }


def _may_set(cell: Cell, stage: str) -> bool:
    return cell.stages is None or stage in cell.stages


def _value(cell: Cell, key: str, stages: Mapping[str, Any]) -> str:
    """What a key has in a cell, as text: what the cell sets, else what its stage's configuration says."""
    given = [item.partition("=")[2] for item in cell.set if item.partition("=")[0].strip() == key]
    if given:
        return yaml_scalar(yaml.safe_load(given[-1]))
    stage, *path = key.split(".")
    here = stages.get(stage)
    for part in path:
        here = asdict(here) if is_dataclass(here) else here
        if isinstance(here, list):
            here = here[int(part)] if part.isdigit() and int(part) < len(here) else None
        else:
            here = here.get(part) if isinstance(here, dict) else None
    return yaml_scalar(here)


def _seed(cell: Cell, texts: Sequence[str], stages: Mapping[str, Any]) -> int | None:
    """The one seed of a cell; None where its stages have several."""
    if cell.seed is not None:
        return cell.seed
    # That of an evaluation is the bootstrap's: it trains nothing.
    own = [yaml_scalar(stage.seed) for stage in stages.values() if hasattr(stage, "seed") and not _scores(stage)]
    found = set(texts or own)
    text = found.pop() if len(found) == 1 else ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _scores(stage: Any) -> bool:
    return hasattr(stage, "bootstrap_samples")


def _hide_rate(text: str, rate: float | None) -> str:
    return text if rate is None else re.sub(rf"(?i)(?<![\d.]){re.escape(f'{rate:g}')}(?=[ _-]?hz)", _RATE, text)


def _methods(keys: Sequence[str], values: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """A short text for each cell, of as few keys as tell the cells apart (the first ones); equal where nothing does."""

    def apart(some: Sequence[str]) -> int:
        return len({tuple(own[key] for key in some) for own in values.values()})

    needed = [key for key in keys if apart([key]) > 1]
    for key in reversed(needed):
        others = [other for other in needed if other != key]
        if apart(others) == apart(needed):
            needed = others
    short = {name: ", ".join(filter(None, (_short(key, own[key]) for key in needed))) for name, own in values.items()}
    if apart(needed) > 1 and ("" in short.values() or len(set(short.values())) < apart(needed)):
        return {
            name: ", ".join(f"{key}={own[key].replace(_RATE, '*')}" for key in needed) for name, own in values.items()
        }
    return short


def _short(key: str, text: str) -> str:
    """A name as it is, a number with the end of its key, nothing for what is not set."""
    value = yaml.safe_load(text.replace(_RATE, "RATE"))
    if value is None:
        return ""
    if isinstance(value, str):
        return re.sub(rf"[ _-]?{_RATE}[ _-]?hz", "", text, flags=re.IGNORECASE).strip("'\"")
    return f"{'.'.join(key.split('.')[-2:])}={text}"
