"""Contrasts for people: what their intervals allow to say, as tables, Markdown and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.report.plots import contrast_figure, save_figure
from eval.schema import Contrast, by_groups
from eval.stats import holm
from eval.systems import system_name

__all__ = [
    "COLUMNS",
    "EXPLANATION",
    "blocks",
    "contrasts_markdown",
    "reading",
    "scope",
    "shows_difference",
    "write_contrasts",
]

COLUMNS = (
    "row",
    "judge",
    "WER % a",
    "WER % b",
    "a - b, points [95 %]",
    "p",
    "p, Holm",
    "p, MAPSSWE",
    "smallest detectable",
    "reading",
)
EXPLANATION = (
    "a - b is the difference of the groups' mean corpus WER; below zero, a is better. Intervals and p: paired "
    "bootstrap over utterances (or speakers). Where each side has two or more seeds of one method at one frame rate, "
    "Student's t of the spread between seeds is added, and the verdict is about the methods. Otherwise it is about "
    "these trained models alone: trained anew with other seeds they may differ otherwise. Smallest detectable: the "
    "true difference that this test set would show in four of five draws of its utterances (95 % confidence, 80 % "
    "power), seeds apart. p, Holm: p corrected for the number of lines in all these tables (Holm's step-down). Of "
    "twenty pairs that are equal in truth one looks different by p alone; a reading that does not outlast the "
    "correction says so. p, MAPSSWE: the matched-pairs test of Gillick and Cox (1989), beside the bootstrap where each "
    "side is one model; not corrected."
)
LEVEL, LOST = 0.05, ", not after Holm"


def reading(contrast: Contrast) -> str:
    """What the interval allows to say: of the methods where their seeds are in it, else of these models."""
    if not contrast.of_methods:
        return "these models differ" if shows_difference(contrast) else "no difference shown"
    better = "a" if contrast.interval[1] < 0 else "b"
    return f"{better} is better" if shows_difference(contrast) else "inconclusive"


def shows_difference(contrast: Contrast) -> bool:
    """Whether the interval leaves zero out."""
    low, high = contrast.interval
    return high < 0 or low > 0


def p_text(p_value: float | None) -> str:
    """A p-value for tables; empty where there is none."""
    return "" if p_value is None else f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"


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

    ``each``: every seed's WER beside the mean, and what a reading loses by the correction in words.
    """
    found = []
    corrected = dict(zip(map(id, contrasts), holm([c.p_value for c in contrasts]), strict=True))
    for mine in by_groups(contrasts):
        lines = [
            [
                system_name(c.system),
                c.judge or "own transcript",
                _wers(c.wers_a, each),
                _wers(c.wers_b, each),
                f"{100 * c.difference:+.1f} [{100 * c.interval[0]:+.1f}, {100 * c.interval[1]:+.1f}]",
                p_text(c.p_value),
                p_text(corrected[id(c)]),
                p_text(c.mapsswe_p),
                "n/a" if c.smallest_detectable is None else f"{100 * c.smallest_detectable:.1f}",
                reading(c) + (LOST if each and corrected[id(c)] > LEVEL and shows_difference(c) else ""),
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
