"""What several cells of a comparison have in common, such as one tokenizer's reconstruction, shown once.

Results keep it for each cell, so that contrasts and plots by method find it; tables show it once, with its cells named.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from eval.codes import CodeStatistics
from eval.schema import Row
from eval.speech.quality import QualitySummary
from eval.systems import is_task

__all__ = ["rows_once", "shared_notes", "summaries_once"]

ItemT = TypeVar("ItemT")


def rows_once(rows: Sequence[Row]) -> list[Row]:
    """The rows of one table with what a tokenizer makes once, where several cells have the same texts of it.

    Such a row is called "reconstruction of TOKENIZER" in place of "CELL: reconstruction", also where another row's
    difference was drawn against it. It keeps the first cell's timings.
    """
    names: dict[str, str] = {}  # label in one cell -> label of them all
    shown = []
    for some in _together(rows, _about):
        first = some[0]
        if len(some) > 1:
            methods, seeds = {row.method for row in some}, {row.seed for row in some}
            first = replace(
                first,
                name=f"{first.name} of {first.model}",
                cell="",
                method=first.method if len(methods) == 1 else "",
                seed=first.seed if len(seeds) == 1 else None,
            )
            names |= {row.label: first.label for row in some}
        shown.append(first)
    return [
        replace(row, difference=replace(row.difference, against=names[row.difference.against]))
        if row.difference is not None and row.difference.against in names
        else row
        for row in shown
    ]


def shared_notes(rows: Sequence[Row]) -> list[str]:
    """For each tokenizer whose rows :func:`rows_once` joins, which cells they stand for."""
    found: dict[str, None] = {}
    for some in _together(rows, _about):
        if len(some) > 1:
            found[f"{some[0].model} is the tokenizer of {', '.join(dict.fromkeys(row.cell for row in some))}."] = None
    return list(found)


def summaries_once(items: Sequence[CodeStatistics | QualitySummary]) -> list[Any]:
    """Figures of codes or audio that are the same in several cells once, without a cell."""
    kept: list[tuple[Any, list[Any]]] = []
    for item in items:
        bare = replace(item, cell="")
        same = next((some for other, some in kept if other == bare), None)
        if same is None:
            kept.append((bare, [item]))
        else:
            same.append(item)
    return [some[0] if len(some) == 1 else bare for bare, some in kept]


def _about(row: Row) -> Hashable:
    """Equal for rows of one tokenizer in which a judge heard the same; every other row is alone."""
    if is_task(row.system) or not row.cell:
        return id(row)
    texts = tuple((u.id, u.reference, u.hypothesis) for u in row.utterances)
    return (row.protocol.key(), row.system, row.name, row.model, row.frame_rate_hz, row.wer, row.n_failed, texts)


def _together(items: Sequence[ItemT], key: Callable[[ItemT], Hashable]) -> list[list[ItemT]]:
    """Items of one key together, in the order of their first ones."""
    found: dict[Hashable, list[ItemT]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())
