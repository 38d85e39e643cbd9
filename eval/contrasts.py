"""Contrasts: two groups of cells, such as the seeds of two methods, compared row by row; as a table and a plot.

Shapes: T trainings (cells of a group), U utterances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from eval.report.plots import contrast_figure, save_figure
from eval.schema import Contrast, Row, by_groups, refuse_other_protocol, speakers_of, system_name, systems_of
from eval.stats import pooled_bootstrap, smallest_detectable_difference

__all__ = [
    "COLUMNS",
    "EXPLANATION",
    "blocks",
    "contrasts_markdown",
    "make_contrasts",
    "reading",
    "scope",
    "seeds_of_one_method",
    "write_contrasts",
]

COLUMNS = ("row", "judge", "WER % a", "WER % b", "a - b, points [95 %]", "p", "smallest detectable", "reading")
EXPLANATION = (
    "a - b is the difference of the groups' mean corpus WER; below zero, a is better. Intervals and p: paired "
    "bootstrap over utterances (or speakers). Where each side has two or more seeds of one method at one frame rate, "
    "Student's t of the spread between seeds is added, and the verdict is about the methods. Otherwise it is about "
    "these trained models alone: trained anew with other seeds they may differ otherwise. Smallest detectable: the "
    "true difference that this test set would show in four of five draws of its utterances (95 % confidence, 80 % "
    "power), seeds apart. No correction for the number of comparisons: of twenty pairs that are equal in truth, one "
    "looks different."
)


def make_contrasts(name: str, a: Mapping[str, Sequence[Row]], b: Mapping[str, Sequence[Row]]) -> list[Contrast]:
    """Every kind of row, by every judge and on every test set, that all cells of both groups have; ground truth apart.

    Args:
        name: what is compared, for the heading; where the cells share several test sets, each has its own heading.
        a: cell -> its rows.
        b: the other group's.

    Raises:
        ValueError: a group is empty, a cell is in both, a cell has two rows of one kind, judge and test set, or the
            cells were scored under different protocols or on other utterances.
    """
    if not a or not b or set(a) & set(b):
        raise ValueError(f"contrast {name!r}: give two groups of cells, none empty, no cell in both")
    tables = {cell: _by_kind(cell, rows) for cell, rows in [*a.items(), *b.items()]}
    shared = [key for key in next(iter(tables.values())) if all(key in table for table in tables.values())]
    test_sets = list(dict.fromkeys(test_set for _, _, test_set in shared))
    systems = systems_of(system for system, _, _ in shared)
    found = []
    for key in sorted(shared, key=lambda key: (test_sets.index(key[2]), systems.index(key[0]))):
        system, judge, test_set = key
        rows_a, rows_b = ([tables[cell][key] for cell in group] for group in (a, b))
        ids, words = _utterances(rows_a[0])
        errors_a, errors_b = ([_errors(row, rows_a[0], ids, words) for row in rows] for rows in (rows_a, rows_b))
        protocol, of_methods = rows_a[0].protocol, seeds_of_one_method(rows_a) and seeds_of_one_method(rows_b)
        speakers = speakers_of(protocol, rows_a[0].utterances)
        difference = pooled_bootstrap(
            errors_a,
            errors_b,
            words,
            of_methods=of_methods,
            speakers=speakers,
            samples=protocol.bootstrap_samples,
            seed=protocol.seed,
        )
        found.append(
            Contrast(
                name=f"{name}, {test_set}" if len(test_sets) > 1 else name,
                system=system,
                judge=judge,
                a=list(a),
                b=list(b),
                wers_a=difference.rates_a,
                wers_b=difference.rates_b,
                difference=difference.difference,
                interval=difference.interval,
                p_value=difference.p_value,
                smallest_detectable=smallest_detectable_difference(errors_a, errors_b, words, speakers=speakers),
                n_utterances=len(ids),
                n_words=sum(words),
                bootstrap_samples=protocol.bootstrap_samples,
                seed=protocol.seed,
                of_methods=of_methods,
                resampled=protocol.resampled,
            )
        )
    return found


def seeds_of_one_method(rows: Sequence[Row]) -> bool:
    """Whether rows differ in their seed alone, and there are two or more: they tell how much a seed matters."""
    seeds = [row.seed for row in rows]
    one = len({(row.method, row.frame_rate_hz) for row in rows}) == 1
    return one and None not in seeds and len(set(seeds)) == len(seeds) >= 2


def _by_kind(cell: str, rows: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
    """(system, judge, test set) -> row."""
    table: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if row.system == "ground_truth":
            continue
        key = (row.system, str(row.protocol.judge.get("name", "")), row.protocol.test_set.name)
        if key in table:
            raise ValueError(
                f"cell {cell} has two rows of kind {row.system} ({table[key].name!r}, {row.name!r}) by one judge on "
                f"{key[2]}: a contrast needs one; evaluate one tokenizer and one SLM in each cell, and give test sets "
                "names of their own"
            )
        table[key] = row
    return table


def _utterances(row: Row) -> tuple[list[str], list[int]]:
    return [u.id for u in row.utterances], [u.n_words for u in row.utterances]


def _errors(row: Row, first: Row, ids: Sequence[str], words: Sequence[int]) -> list[int]:
    """Word errors (U,) in the order of ``ids``. Raises ValueError where the row was scored on something else."""
    refuse_other_protocol(row, first)
    by_id = {u.id: u for u in row.utterances}
    if set(by_id) != set(ids) or [by_id[i].n_words for i in ids] != list(words):
        raise ValueError(f"rows {row.label!r} and {first.label!r} were not scored on the same utterances")
    return [by_id[i].errors for i in ids]


def reading(contrast: Contrast) -> str:
    """What the interval allows to say: of the methods where their seeds are in it, else of these models."""
    low, high = contrast.interval
    if not contrast.of_methods:
        return "these models differ" if high < 0 or low > 0 else "no difference shown"
    return "a is better" if high < 0 else "b is better" if low > 0 else "inconclusive"


def scope(contrast: Contrast) -> str:
    """What a contrast is about, in a line."""
    if contrast.of_methods:
        return f"of the methods, over {len(contrast.a)} and {len(contrast.b)} seeds"
    return "of these trained models; a verdict on methods takes two seeds of each"


def _wers(values: Sequence[float], each: bool) -> str:
    """``23.4``, or with several seeds their mean and each of them: ``23.4 (22.1, 24.7)``."""
    shown = f" ({', '.join(f'{100 * value:.1f}' for value in values)})" if each and len(values) > 1 else ""
    return f"{100 * float(np.mean(values)):.1f}{shown}"


def blocks(contrasts: Sequence[Contrast], each: bool = True) -> list[dict[str, object]]:
    """For tables: each name with its groups of cells, what it is about, and lines of text, one for each of COLUMNS.

    ``each``: every seed's WER beside the mean.
    """
    found = []
    for mine in by_groups(contrasts):
        lines = [
            [
                system_name(c.system),
                c.judge or "own transcript",
                _wers(c.wers_a, each),
                _wers(c.wers_b, each),
                f"{100 * c.difference:+.1f} [{100 * c.interval[0]:+.1f}, {100 * c.interval[1]:+.1f}]",
                f"{c.p_value:.3f}" if c.p_value >= 0.001 else "< 0.001",
                "n/a" if c.smallest_detectable is None else f"{100 * c.smallest_detectable:.1f}",
                reading(c),
            ]
            for c in mine
        ]
        one = mine[0]
        units = "" if one.resampled == "utterances" else f" over {one.resampled}"
        counts = f"{one.n_utterances} utterances, {one.n_words} words; {one.bootstrap_samples} resamples{units}"
        found.append(
            {
                "name": one.name,
                "a": ", ".join(one.a),
                "b": ", ".join(one.b),
                "scope": scope(one),
                "counts": counts,
                "lines": lines,
            }
        )
    return found


def contrasts_markdown(contrasts: Sequence[Contrast], title: str) -> str:
    """The tables as Markdown, ready for a document."""
    text = [f"# {title}", "", EXPLANATION, ""]
    for block in blocks(contrasts):
        text += [f"## {block['name']}", "", f"a: {block['a']}; b: {block['b']} ({block['counts']})", ""]
        text += [f"The difference is {block['scope']}.", ""]
        text += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        text += [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in block["lines"]]
        text.append("")
    return "\n".join(text)


def write_contrasts(contrasts: Sequence[Contrast], title: str, folder: Path | str) -> Path:
    """Write ``contrasts.md``, ``contrasts.svg`` and ``contrasts.png``; returns the first.

    Raises:
        ValueError: there is no contrast to write.
    """
    figure = contrast_figure(contrasts)
    if figure is None:
        raise ValueError("there are no contrasts to write")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("svg", "png"):
        save_figure(figure, folder / f"contrasts.{suffix}")
    target = folder / "contrasts.md"
    target.write_text(contrasts_markdown(contrasts, title), encoding="utf-8")
    return target
