"""What a comparison keeps of its trainings: their learning curves, and the configuration of each method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Budget", "Configuration", "Cost", "Curve", "differing_keys", "group_names", "runs_stage"]


@dataclass(frozen=True)
class Curve:
    """One figure of one training at the steps where it was logged.

    ``figure`` is "loss", or the name of a task's figure ("asr WER"); ``split`` is "train" or "valid". ``cell``,
    ``method``, ``seed`` and ``frame_rate_hz`` are those of :class:`eval.schema.Row`. Losses are per token in nats,
    error rates are fractions. Values that were not finite are left out, and ``n_left_out`` counts them.
    """

    cell: str
    stage: str
    split: str
    figure: str
    steps: list[int]
    values: list[float]
    method: str = ""
    frame_rate_hz: float | None = None
    seed: int | None = None
    n_left_out: int = 0


@dataclass(frozen=True)
class Configuration:
    """What one method was made with: the settings of its stages.

    ``values`` holds each setting by its dotted key, stage first, as text; where the cells (seeds of one method) differ
    in one, each of their values. ``yaml`` is the resolved configuration of each stage of the first of ``cells``.
    """

    name: str
    cells: list[str]
    values: dict[str, str]
    yaml: dict[str, str] = field(default_factory=dict)


def differing_keys(configurations: Sequence[Configuration]) -> list[str]:
    """The keys whose values are not the same in all that run the key's stage, in their order.

    Of those that run it one that lacks a key differs in it.

    >>> differing_keys([Configuration("a", [], {"x.k": "1", "y.k": "2"}), Configuration("b", [], {"x.k": "1"})])
    []
    >>> differing_keys([Configuration("a", [], {"x.k": "1", "x.l": "2"}), Configuration("b", [], {"x.k": "1"})])
    ['x.l']
    """
    keys = dict.fromkeys(key for one in configurations for key in one.values)
    return [key for key in keys if len({one.values.get(key) for one in configurations if runs_stage(one, key)}) > 1]


def runs_stage(configuration: Configuration, key: str) -> bool:
    """Whether the stage that a dotted key is of is among a configuration's."""
    return key.partition(".")[0] in {own.partition(".")[0] for own in configuration.values}


def group_names(about: Iterable[tuple[str, str, float | None, int | None]]) -> dict[str, str]:
    """The name of each cell's group: seeds of one method at one frame rate have one name.

    Args:
        about: (cell, method, frame rate in Hz, seed) of each cell.

    Returns:
        cell -> name: of frame rate and method as far as they tell cells apart; the cell's own name where nothing does,
        or where two cells of one group are not known to differ in their seed alone.

    >>> group_names([("a", "", 25.0, 0), ("b", "", 25.0, 1), ("c", "", 12.5, None)])
    {'a': '25 Hz', 'b': '25 Hz', 'c': '12.5 Hz'}
    """
    cells = list(about)
    rates, methods = {rate for _, _, rate, _ in cells} - {None}, {method for _, method, _, _ in cells}
    named: dict[str, list[tuple[str, int | None]]] = {}
    for cell, method, rate, seed in cells:
        parts = [f"{rate:g} Hz" if rate is not None and (len(rates) > 1 or not method) else ""]
        parts += [method if len(methods) > 1 or len(rates) < 2 else ""]
        named.setdefault(", ".join(filter(None, parts)) or cell, []).append((cell, seed))
    found = {}
    for name, some in named.items():
        seeds = {seed for _, seed in some} - {None}
        pooled = len(some) == 1 or len(seeds) == len(some)
        found |= {cell: name if pooled else cell for cell, _ in some}
    return {cell: found[cell] for cell, _, _, _ in cells}


@dataclass(frozen=True)
class Budget:
    """How much one cell's fine-tuning sees, and which of it was made equal among the cells.

    ``equal`` is "steps", "tokens", "audio_seconds" or "flops"; ``reference`` is the cell that the others were made
    equal to. ``tokens`` are those of text and speech; ``audio_seconds`` counts a recording once for each time and task
    that it is seen; ``flops`` are model FLOPs.
    """

    cell: str
    equal: str
    reference: str
    steps: int
    tokens: int
    audio_seconds: float
    flops: float
    epochs: float


@dataclass(frozen=True)
class Cost:
    """What one cell's fine-tuning cost, and what its speech costs an LLM that runs.

    ``flops`` are model FLOPs of all steps; ``wall_s`` is the time from start to end, breaks left out, None where it is
    not known; ``cache_bytes_per_s`` are the keys and values of a second of speech, two bytes a number.
    """

    cell: str
    stage: str
    steps: int
    flops: float
    cache_bytes_per_s: float
    wall_s: float | None = None
