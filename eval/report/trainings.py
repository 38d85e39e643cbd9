"""Trainings for people: learning curves as figures, where each one ended as a table, and how configurations differ."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.report.plots import PAGE_GRID, PAGE_TEXT, page_figure, svg_of
from eval.report.tables import MeasureTable
from eval.trainings import Configuration, Curve, differing_keys, group_names, runs_stage

__all__ = ["DARK", "LIGHT", "curve_figures", "differences_table", "trainings_table"]

# The page's colours of lines, 4.5:1 and more against its cards by day and by night; each has a marker and dashes too.
LIGHT = ("#0b62b8", "#a84300", "#00695c", "#a11d5e", "#5b3fc4", "#4d5863")
DARK = ("#6cb4ff", "#f5a05c", "#4fd1b5", "#ff8fc0", "#b7a5ff", "#b6c2cd")
_STAND_INS = tuple(f"#0a0b{number:02x}" for number in range(1, len(LIGHT) + 1))  # until the page's colour takes over
_MARKERS, _DASHES = "osD^v", ("-", "--", ":", "-.")
_EVERY = 6  # markers along a curve
NOTE = (
    "Losses are means per answer token, so their level means something among cells of one tokenizer alone: a token of "
    "another frame rate or codebook is another event. Error rates on the valid split can be compared as far as their "
    "references are the same. Seeds of one method share a line's look."
)


def curve_figures(curves: Sequence[Curve]) -> list[tuple[str, str]]:
    """(caption, inline SVG) of each figure that trainings logged, a line for each cell.

    Shown are the loss in training, the loss over all tasks and the word error rates on the valid split.
    """
    names = _names(curves)
    looks = {name: number for number, name in enumerate(dict.fromkeys(names.values()))}
    panels: dict[tuple[str, str, str], list[Curve]] = {}
    for curve in curves:
        if curve.figure.endswith(("WER", "mel loss")) or curve.figure == "loss":
            panels.setdefault((curve.stage, curve.split, curve.figure), []).append(curve)
    found = []
    for number, ((stage, split, figure), some) in enumerate(sorted(panels.items(), key=_place)):
        caption = f"{stage}: {figure}{', %' if figure.endswith('WER') else ''} ({split})"
        title = f"{caption} by step, a line for each cell; where each ended stands in the table below"
        svg = svg_of(_figure_of(some, names, looks, figure), f"curve{number}", title)
        for stand_in, place in zip(_STAND_INS, itertools.count(1), strict=False):
            svg = svg.replace(stand_in, f"var(--curve-{place})")
        found.append((caption, svg))
    return found


def _names(curves: Sequence[Curve]) -> dict[str, str]:
    cells = {curve.cell: (curve.cell, curve.method, curve.frame_rate_hz, curve.seed) for curve in curves}
    return group_names(cells.values())


def _place(item: tuple[tuple[str, str, str], list[Curve]]) -> tuple[object, ...]:
    (stage, split, figure), _ = item
    return stage, figure.endswith("WER"), split, figure


def _figure_of(curves: Sequence[Curve], names: dict[str, str], looks: dict[str, int], figure: str) -> Figure:
    """One pair of axes with every cell's line, and what the lines stand for beneath."""
    shown = list(dict.fromkeys(names[curve.cell] for curve in curves))
    drawn, axes = page_figure(4.6, 2.7 + 0.17 * len(shown))
    scale = 100 if figure.endswith("WER") else 1
    for curve in curves:
        look = looks[names[curve.cell]]
        values = [scale * value for value in curve.values]
        axes.plot(
            *(curve.steps, values),
            color=_STAND_INS[look % len(_STAND_INS)],
            marker=_MARKERS[look % len(_MARKERS)],
            markevery=max(1, len(values) // _EVERY),
            linestyle=_DASHES[look % len(_DASHES)],
            linewidth=1.5,
            markersize=4.5,
            label=names[curve.cell],
        )
    axes.set_xlabel("step", color=PAGE_TEXT, fontsize=9)
    axes.set_ylabel(f"{figure}{', %' if scale > 1 else ''}", color=PAGE_TEXT, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", color=PAGE_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if scale > 1:
        axes.set_ylim(0, None)
    entries = {line.get_label(): line for line in axes.lines}
    drawn.legend(
        [entries[name] for name in shown],
        shown,
        loc="outside lower left",
        frameon=False,
        labelcolor=PAGE_TEXT,
        fontsize=9,
        handlelength=3.2,
    )
    return drawn


def trainings_table(curves: Sequence[Curve]) -> MeasureTable | None:
    """Where each cell's curves ended and, of the valid split, their best; None without curves."""
    if not curves:
        return None
    columns = list(dict.fromkeys((c.split, c.figure) for c in sorted(curves, key=lambda c: (c.split, c.figure))))
    trainings = list(dict.fromkeys((c.cell, c.stage) for c in curves))
    by_key = {(c.cell, c.stage, c.split, c.figure): c for c in curves}
    lines = []
    for cell, stage in trainings:
        own = [by_key.get((cell, stage, split, figure)) for split, figure in columns]
        steps = max(curve.steps[-1] for curve in own if curve is not None)
        lines.append([cell, stage, str(steps), *map(_ends, own)])
    return MeasureTable(
        title="Where the trainings ended",
        note=f"The last value; of the valid split also the best with its step, where that is another one. {NOTE}",
        headings=["cell", "stage", "steps", *(f"{split} {figure}{_unit(figure)}" for split, figure in columns)],
        lines=lines,
        names=2,
        narrow=[],
    )


def _unit(figure: str) -> str:
    return " %" if figure.endswith("WER") else ""


def _ends(curve: Curve | None) -> str:
    if curve is None:
        return ""
    scale, digits = (100, 1) if curve.figure.endswith("WER") else (1, 3)
    text = f"{scale * curve.values[-1]:.{digits}f}"
    best = min(range(len(curve.values)), key=lambda i: curve.values[i])
    if curve.split == "valid" and curve.values[best] < curve.values[-1]:
        text += f" (best {scale * curve.values[best]:.{digits}f}, step {curve.steps[best]})"
    return text + (f" ({curve.n_left_out} not finite)" if curve.n_left_out else "")


def differences_table(configurations: Sequence[Configuration]) -> MeasureTable | None:
    """The settings that are not the same in all methods; None where there are no two methods.

    Paths of a cell's own stages stand as ``${stage}``.
    """
    if len(configurations) < 2:
        return None
    keys = differing_keys(configurations)
    lines = [[key, *(_setting(one, key) for one in configurations)] for key in keys]
    return MeasureTable(
        title="What differs",
        note=f"{len(keys)} of {len(dict.fromkeys(k for one in configurations for k in one.values))} settings; the "
        "others are the same in all that run their stage (\u2013: it does not). Of several seeds each value; a folder "
        "of an earlier stage stands as ${stage}.",
        headings=["setting", *(one.name for one in configurations)],
        lines=lines,
        names=1 + len(configurations),
        narrow=[],
    )


def _setting(configuration: Configuration, key: str) -> str:
    return configuration.values.get(key, "(absent)" if runs_stage(configuration, key) else "\u2013")
