"""What the contrasts say, in sentences: the answer that a reader looks for before the tables."""

from __future__ import annotations

from collections.abc import Sequence

from eval.report.contrasts import LEVEL, shows_difference
from eval.schema import Contrast, Results, Row, by_groups
from eval.stats import holm
from eval.systems import is_task, system_name

__all__ = ["answers"]

ONE_SEED = "Where a side has no two seeds, this is about the trained models and no verdict on their methods."
MOST = 6  # contrasts told in words; the tables hold all
FACTORS = {0.25: "a quarter of", 0.5: "half", 2.0: "twice", 4.0: "four times"}


def answers(results: Results) -> list[str]:
    """One sentence for each contrast: how much the word error rates differ, and what each side costs in tokens.

    Of the SLM's tasks; where there are none, of what the tokenizers make. Of more than `MOST` contrasts the most
    telling, and how many others there are. The last one says what they are not about. Empty without contrasts.

    >>> answers(Results("", []))
    []
    """
    judges = {contrast.judge for contrast in results.contrasts if contrast.judge}
    corrected = holm([contrast.p_value for contrast in results.contrasts])
    survives = {id(c): p <= LEVEL for c, p in zip(results.contrasts, corrected, strict=True)}
    blocks = by_groups(results.contrasts)
    sides_of = [[_rows(results.rows, cells) for cells in (block[0].a, block[0].b)] for block in blocks]
    names = [_names(sides, (block[0].a, block[0].b)) for block, sides in zip(blocks, sides_of, strict=True)]
    told = [[c for c in block if is_task(c.system)] or block for block in blocks]
    sizes = [
        max((abs(c.difference) for c in some if shows_difference(c) and survives[id(c)]), default=0) for some in told
    ]
    found, chosen = [], _most_telling(sizes)
    for number in chosen:
        first, (a, b) = blocks[number][0], names[number]
        # Two methods at several rates, or one pair on several test sets: the contrast's name tells which.
        again = names.count([a, b]) > 1
        parts = [_difference(contrast, survives[id(contrast)], len(judges) > 1) for contrast in told[number]]
        parts += _cost(*sides_of[number])
        found.append(f"{a} against {b}{f' ({first.name})' if again else ''}: {'; '.join(parts)}.")
    if rest := [sizes[number] for number in range(len(blocks)) if number not in chosen]:
        shown = sum(size > 0 for size in rest)
        others = f"{shown or 'none'} show{'s' if shown == 1 else ''} one"
        found.append(
            f"These are {MOST} of {len(blocks)} contrasts, by the size of the difference shown; of the other "
            f"{len(rest)}, in the tables, {others} after correction for the number of contrasts."
        )
    if any(not contrast.of_methods for contrast in results.contrasts):
        found.append(ONE_SEED)
    return found


def _most_telling(sizes: Sequence[float]) -> list[int]:
    """Which contrasts are told, in their order: all, or of many those with the largest difference that is shown.

    >>> _most_telling([0.1, 0.0, 0.3]), _most_telling([0.1, 0, 0.3, 0.2, 0, 0.4, 0.5, 0.6])
    ([0, 1, 2], [0, 2, 3, 5, 6, 7])
    """
    order = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    return sorted(order[:MOST])


def _rows(rows: Sequence[Row], cells: Sequence[str]) -> list[Row]:
    return [row for row in rows if row.cell in cells]


def _names(sides: Sequence[Sequence[Row]], cells: Sequence[Sequence[str]]) -> list[str]:
    """Each side by what tells it from the other, its method or its frame rate; by its cells where that is neither."""
    methods = [{row.method for row in side if row.method} for side in sides]
    rates = [{row.frame_rate_hz for row in side if row.frame_rate_hz} for side in sides]
    if any(len(values) > 1 for values in (*methods, *rates)):
        return [", ".join(names) for names in cells]
    found = []
    for method, rate, names in zip(methods, rates, cells, strict=True):
        parts = [*(method if methods[0] != methods[1] else ()), *(f"{hz:g} Hz" for hz in rate if rates[0] != rates[1])]
        found.append(", ".join(parts) or ", ".join(names))
    return found if found[0] != found[1] else [", ".join(names) for names in cells]


def _difference(contrast: Contrast, survives: bool, name_judge: bool) -> str:
    """``SLM TTS, WER 3.1 points lower [0.9, 5.2]``, or that none is shown."""
    low, high = (100 * edge for edge in contrast.interval)
    points = 100 * contrast.difference
    what = system_name(contrast.system) + (f" (read by {contrast.judge})" if name_judge and contrast.judge else "")
    if not shows_difference(contrast):
        return f"{what}, no difference in WER shown ({points:+.1f} points [{low:+.1f}, {high:+.1f}])"
    edges = sorted((abs(low), abs(high)))
    direction = "lower" if points < 0 else "higher"
    lost = "" if survives else ", not after correction for the number of contrasts"
    return f"{what}, WER {abs(points):.1f} points {direction} [{edges[0]:.1f}, {edges[1]:.1f}]{lost}"


def _cost(a: Sequence[Row], b: Sequence[Row]) -> list[str]:
    """What an LLM reads of each side in a second, where both sides say it."""
    costs = [{row.tokens_per_second for row in side if is_task(row.system)} - {None} for side in (a, b)]
    if any(len(values) != 1 for values in costs):
        return []
    one, other = (next(iter(values)) for values in costs)
    if one == other:
        return [f"the same tokens ({one:g} a second)"]
    ratio = one / other
    factor = FACTORS.get(ratio, f"{ratio:.2g} times")
    return [f"{factor} the tokens ({one:g} against {other:g} a second)"]
