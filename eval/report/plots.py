"""The report's figures, as SVG that takes its text colour from the page (so that it reads in light and dark)."""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.codes import CodeStatistics
from eval.schema import Contrast, Row, by_groups
from eval.systems import system_name, systems_of

__all__ = [
    "PAGE_GRID",
    "PAGE_TEXT",
    "SYSTEM_COLOURS",
    "book_use_figure",
    "contrast_figure",
    "page_figure",
    "rate_figure",
    "save_figure",
    "svg_of",
    "wer_figure",
]

SYSTEM_COLOURS = {
    "ground_truth": "#7a8793",
    "reconstruction": "#3d8fd1",
    "semantic_reconstruction": "#2aa58b",
    "acoustic_stage": "#7fb53a",
    "resynthesis": "#8f7ae0",
    "tts": "#e0803c",
    "asr": "#d35d8a",
}
_TASK_COLOURS = ("#b39b2e", "#8a6a55", "#4f9da6", "#c75d5d")  # of further tasks, in their order
_METHOD_COLOURS = ("#3d8fd1", "#e0803c", "#2aa58b", "#d35d8a", "#8f7ae0", "#7a8793")
_MARKERS = "osD^v"
_TEXT = "#010203"  # stands for the page's own text colour
_GRID = "#88888844"
PAGE_TEXT, PAGE_GRID = _TEXT, _GRID  # for figures in files of their own


def _figure(width: float, height: float) -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    _bare(axes)
    return figure, axes


def page_figure(width: float, height: float) -> tuple[Figure, matplotlib.axes.Axes]:
    """An empty figure for :func:`svg_of`, with one pair of axes that let the page show through; inches."""
    return _figure(width, height)


def _bare(axes: matplotlib.axes.Axes) -> None:
    """Let the page show through, with a frame at two sides."""
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#888888")
    axes.tick_params(colors=_TEXT, length=0)


def _svg(figure: Figure, name: str, title: str) -> str:
    """Inline SVG; ``name`` keeps the ids of several figures on one page apart, ``title`` is what is read aloud."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(_TEXT, "currentColor")
    # Physical size goes, so that the page scales the figure by its viewBox; the page's font is used.
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"(<svg[^>]*)>", rf'\1 role="img"><title>{html.escape(title)}</title>', svg, count=1)
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)


def _colours_of(systems: Iterable[str]) -> dict[str, str]:
    """A colour for each kind of system."""
    further = [system for system in systems_of(systems) if system not in SYSTEM_COLOURS]
    return SYSTEM_COLOURS | dict(zip(further, itertools.cycle(_TASK_COLOURS), strict=False))


def wer_figure(rows: Sequence[Row], labels: Sequence[str], name: str) -> str | None:
    """Bars of WER with their intervals, one per row; None where no row has a rate."""
    shown = [(row, label) for row, label in zip(rows, labels, strict=True) if row.wer is not None]
    if not shown:
        return None
    figure, axes = _figure(6.4, 0.6 + 0.34 * len(shown))
    colours = _colours_of(row.system for row, _ in shown)
    for position, (row, _) in enumerate(shown):
        wer = 100 * row.wer
        axes.barh(position, wer, height=0.62, color=colours[row.system])
        end = wer
        if row.interval is not None:
            low, high = (100 * edge for edge in row.interval)
            axes.plot([low, high], [position, position], color=_TEXT, linewidth=1.3, solid_capstyle="butt")
            end = max(wer, high)
        axes.annotate(
            f"{wer:.1f}",
            (end, position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=_TEXT,
            fontsize=9,
        )
    axes.set_yticks(range(len(shown)), [label for _, label in shown], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, None)
    axes.margins(x=0.12)
    axes.set_xlabel("WER, % (line: interval)", color=_TEXT, fontsize=9)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return _svg(figure, name, "Word error rate of each row with its interval; the figures stand in the table above")


def rate_figure(rows: Sequence[Row]) -> Figure | None:
    """WER against the tokens that an LLM reads in a second; None with fewer than two rates.

    With one method there is one panel with a line for each system; with several a panel for each system, a line for
    each method. A point is the mean of its method's seeds: each of them is a tick, the bar spans them. An open point is
    one model with its 95 % interval. A ring marks a system's front: no other point of it has fewer errors for as few
    tokens. The reconstruction from all books is left out: no LLM reads those.
    """
    points = [row for row in rows if row.wer is not None and row.tokens_per_second is not None]
    points = [row for row in points if row.system != "reconstruction"]
    if len({row.tokens_per_second for row in points}) < 2:
        return None
    lines = _lines_of(points)
    systems = systems_of(row.system for row in points)
    methods = list(dict.fromkeys(method for _, method in lines))
    by_method = len(methods) > 1
    entries = methods if by_method else systems
    by_methods = dict(zip(methods, itertools.cycle(_METHOD_COLOURS), strict=False))
    colours = by_methods if by_method else _colours_of(systems)
    markers = dict(zip(entries, itertools.cycle(_MARKERS), strict=False))
    panels = systems if by_method else [""]
    legend_rows = -(-(len(entries) + 1) // 3)
    figure = Figure(figsize=(7.2, 2.9 + 0.2 * legend_rows), layout="constrained")
    figure.patch.set_alpha(0)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    ticks = sorted({row.tokens_per_second for row in points})
    front = _fronts(lines)
    for axes, panel in zip(grid, panels, strict=True):
        _bare(axes)
        for system, rate, mean in front:
            if panel in ("", system):
                axes.plot(rate, mean, "o", markersize=13, markerfacecolor="none", color=_TEXT, markeredgewidth=0.8)
        for (system, method), at in lines.items():
            if panel in ("", system):
                entry = method if by_method else system
                _rate_line(axes, at, colours[entry], markers[entry])
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.margins(x=0.15)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        if panel:
            axes.set_title(system_name(panel), color=_TEXT, fontsize=9, weight="bold")
    grid[0].set_ylim(0, None)  # of all panels, once all lines are there
    grid[0].set_ylabel("WER, %", color=_TEXT, fontsize=9)
    figure.supxlabel(
        "speech tokens per second (what the LLM reads)\n"
        "full point: mean of seeds, each a tick, the bar their range; open point: one model, 95 % interval",
        color=_TEXT,
        fontsize=9,
    )
    for entry in entries:
        label = entry or "no method stated" if by_method else system_name(entry)
        grid[0].plot([], [], color=colours[entry], marker=markers[entry], markersize=5, label=label)
    ring = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 0.8, "linestyle": "none"}
    grid[0].plot([], [], marker="o", color=_TEXT, label="front: fewest errors for as few tokens", **ring)
    # Above the panels, where it hides no point.
    figure.legend(loc="outside upper center", ncols=3, frameon=False, labelcolor=_TEXT, fontsize=9)
    return figure


def _lines_of(rows: Sequence[Row]) -> dict[tuple[str, str], dict[float, list[Row]]]:
    """(system, method) -> tokens per second -> the method's rows there, which differ in seed.

    Rows of one method at one rate that do not say in which seed they differ are of no common line: each is named.
    """
    lines: dict[tuple[str, str], dict[float, list[Row]]] = {}
    for row in rows:
        lines.setdefault((row.system, row.method), {}).setdefault(row.tokens_per_second, []).append(row)
    unclear = {
        key: at
        for key, at in lines.items()
        if any(len(some) > 1 and len({row.seed for row in some} - {None}) < len(some) for some in at.values())
    }
    for (system, _), at in unclear.items():
        del lines[system, _]
        for rate, some in at.items():
            for row in some:
                lines.setdefault((system, f"{row.label}, {row.model}".strip(", ")), {}).setdefault(rate, []).append(row)
    return lines


def _fronts(lines: dict[tuple[str, str], dict[float, list[Row]]]) -> list[tuple[str, float, float]]:
    """Of each system the points (system, tokens per second, mean WER in %) that no other of it beats.

    A point is beaten by one of as few tokens or fewer that has fewer errors, or as few for fewer tokens.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for (system, _), at in lines.items():
        for rate, rows in at.items():
            points.setdefault(system, []).append((rate, 100 * sum(row.wer for row in rows) / len(rows)))
    return [
        (system, rate, wer)
        for system, found in points.items()
        for rate, wer in found
        if not any(r <= rate and w <= wer and (r, w) != (rate, wer) for r, w in found)
    ]


def _rate_line(axes: matplotlib.axes.Axes, at: dict[float, list[Row]], colour: str, marker: str) -> None:
    """One method's line: means over its seeds, with what they spread."""
    rates = sorted(at)
    means = [100 * sum(row.wer for row in at[rate]) / len(at[rate]) for rate in rates]
    axes.plot(rates, means, color=colour, linewidth=1.6)
    for rate, mean in zip(rates, means, strict=True):
        wers = [100 * row.wer for row in at[rate]]
        ends = (100 * edge for edge in at[rate][0].interval or ()) if len(wers) == 1 else (min(wers), max(wers))
        axes.plot([rate] * len(ends := list(ends)), ends, color=colour, linewidth=1.2, alpha=0.7)
        if len(wers) > 1:
            axes.plot([rate] * len(wers), wers, "_", color=colour, markersize=7)
        face = "none" if len(wers) == 1 else colour
        axes.plot(rate, mean, marker=marker, color=colour, markerfacecolor=face, markersize=6, linestyle="none")


def book_use_figure(codes: Sequence[CodeStatistics], name: str) -> str | None:
    """Perplexity of each book as a share of its size, a group of bars for each tokenizer."""
    if not codes:
        return None
    figure, axes = _figure(6.4, 2.4)
    palette = list(SYSTEM_COLOURS.values())[1:]
    n_books = max(len(c.books) for c in codes)
    width = 0.8 / len(codes)
    for i, statistics in enumerate(codes):
        x = [book + (i - (len(codes) - 1) / 2) * width for book in range(len(statistics.books))]
        colour = palette[i % len(palette)]
        axes.bar(x, [100 * b.use for b in statistics.books], width, color=colour, alpha=0.35)
        share = [100 * b.perplexity / b.size for b in statistics.books]
        axes.bar(x, share, width, color=colour, label=statistics.label or f"tokenizer {i + 1}")
    axes.set_xticks(range(n_books), ["0\nsemantic", *(str(book) for book in range(1, n_books))], fontsize=9)
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylabel("% of the book", color=_TEXT, fontsize=9)
    axes.set_xlabel("book (pale: entries seen; full: perplexity)", color=_TEXT, fontsize=9)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if len(codes) > 1:
        axes.legend(frameon=False, labelcolor=_TEXT, fontsize=9)
    return _svg(figure, name, "Perplexity and use of each codebook; the figures stand in the table")


def contrast_figure(contrasts: Sequence[Contrast]) -> Figure | None:
    """A forest plot: each contrast's difference with its interval beside the zero line, a block for each name.

    A colour for each kind of row, a marker for each judge, open where the contrast is about these trained models and
    not about the methods; the pale bar ends at the smallest detectable difference. None where there are no contrasts.
    """
    if not contrasts:
        return None
    judges = list(dict.fromkeys(c.judge for c in contrasts))
    ticks: list[tuple[float, str]] = []
    lines: list[tuple[float, Contrast]] = []
    headings: list[tuple[float, str]] = []
    spans: list[tuple[float, float]] = []
    y = 0.0
    for block in by_groups(contrasts):
        about = "" if block[0].of_methods else " (these models, not the methods)"
        headings.append((y, block[0].name + about))
        y += 1
        for system in systems_of(c.system for c in block):
            found = [c for c in block if c.system == system]
            height = 0.55 * len(found)
            lines += [(y + 0.55 * i, contrast) for i, contrast in enumerate(found)]
            ticks.append((y + (height - 0.55) / 2, system_name(system)))
            y += height + 0.35
        spans.append((headings[-1][0] + 0.6, y - 0.3))
        y += 0.4
    figure, axes = _figure(7.2, 1.2 + 0.24 * y)
    axes.use_sticky_edges = False  # a pale bar ends before the frame does
    colours = _colours_of(contrast.system for contrast in contrasts)
    for at, contrast in lines:
        colour = colours[contrast.system]
        if contrast.smallest_detectable is not None:
            bound = 100 * contrast.smallest_detectable
            axes.barh(at, 2 * bound, left=-bound, height=0.46, color="#88888833")
        low, high = (100 * edge for edge in contrast.interval)
        axes.plot([low, high], [at, at], color=colour, linewidth=1.6, solid_capstyle="butt")
        marker = _MARKERS[judges.index(contrast.judge) % len(_MARKERS)]
        face = colour if contrast.of_methods else "white"
        style = {"marker": marker, "markersize": 5, "markerfacecolor": face, "linestyle": "none"}
        axes.plot(100 * contrast.difference, at, color=colour, **style)
    for top, bottom in spans:  # the zero line leaves the headings free
        axes.plot([0, 0], [top, bottom], color=_TEXT, linewidth=1)
    for judge, marker in zip(judges, _MARKERS, strict=False):
        label = judge or "own transcript"
        axes.plot([], [], marker=marker, color=_TEXT, markersize=5, linestyle="none", label=label)
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=9)
    axes.set_ylim(y, -0.8)
    for at, text in headings:
        axes.annotate(
            text, (0.01, at), xycoords=("axes fraction", "data"), va="center", color=_TEXT, fontsize=9, weight="bold"
        )
    axes.set_xlabel(
        "difference in WER, points (line: 95 % interval; pale: below smallest detectable;\n"
        "full point: of methods, seeds in the interval; open point: of these trained models)",
        color=_TEXT,
    )
    axes.xaxis.label.set_fontsize(9)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper right", ncols=len(judges), frameon=False, labelcolor=_TEXT, fontsize=9)
    return figure


def svg_of(figure: Figure | None, name: str, title: str) -> str | None:
    """A figure as inline SVG in the page's own text colour.

    Args:
        figure: what is shown; None: nothing.
        name: keeps the ids of several figures on one page apart.
        title: what it shows, for those who do not see it.
    """
    return None if figure is None else _svg(figure, name, title)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure to a file of its own (.png or .svg), dark text on white; the same bytes for the same figure."""
    figure.patch.set_alpha(1)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.family": "sans-serif"}):
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=130, facecolor="white", metadata=metadata)
    figure.patch.set_alpha(0)
    return path
