"""`slm plot-training RUN_DIR...`: the curves of one or several trainings, laid over each other.

Features: reads `metrics.jsonl` of any run folder (a tokenizer's, or a Trainer's), also of one that is still running;
the panels of a tokenizer's training by default, any figures by name; raw values pale behind their running mean; PNG,
SVG or PDF by the ending of `output`.

Raises: ConfigError for a folder without metrics, or figures that no run has.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from eval.report.plots import save_figure
from recipes.config import ConfigError, Problems
from recipes.runs.files import text_lines
from recipes.runs.logs import log
from recipes.runs.own_folders import refuse_unwritable

COLOURS = ("#3d8fd1", "#e0803c", "#2aa58b", "#8f7ae0", "#d35d8a", "#7a8793", "#b8a100", "#5b6b2f")
LINES = ("-", "--", ":", "-.")
PER_ROW = 3
MOST_PANELS = 12
FORMATS = (".png", ".svg", ".pdf")
Rows = list[dict[str, float]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its title, the figures that it shows with their labels, whether its scale is logarithmic."""

    title: str
    series: dict[str, str]
    log: bool = False


PANELS = [
    Panel(
        "mel loss",
        {"loss/mel": "training", "valid/mel": "valid", "valid/mel_semantic": "valid, book 0 alone"},
        log=True,
    ),
    Panel(
        "distillation: share of the teacher's variance",
        {
            "loss/distillation_share": "training",
            "valid/distillation_share": "valid",
            "loss/probe_share": "probe",
            "valid/probe_share": "probe, valid",
            "valid/reconstruction_share": "reconstruction, valid",
            "valid/semantic_reconstruction_share": "semantic reconstruction, valid",
        },
        log=True,
    ),
    Panel(
        "commitment loss", {"loss/semantic_commitment": "semantic", "loss/acoustic_commitment": "acoustic"}, log=True
    ),
    Panel(
        "perplexity of the books",
        {
            "codes/book_0/perplexity": "semantic",
            "codes/book_1/perplexity": "first acoustic",
            "valid/perplexity_book_0": "semantic, valid",
            "valid/perplexity_book_1": "first acoustic, valid",
        },
    ),
    Panel(
        "share of entries used",
        {
            "codes/book_0/used": "semantic",
            "codes/book_1/used": "first acoustic",
            "codes/book_0/dead": "semantic, dead",
            "codes/book_1/dead": "first acoustic, dead",
        },
    ),
    Panel("adversarial", {"loss/discriminator": "discriminators", "loss/adversarial": "generator"}),
    Panel(
        "gradient norm, before clipping",
        {"gradient_norm": "tokenizer", "gradient_norm/discriminator": "discriminators"},
        log=True,
    ),
    Panel("whole loss, weighted", {"loss/total": "training"}, log=True),
]


@dataclass
class Config:
    """What is drawn, and where to."""

    runs: list[str] = field(default_factory=list, metadata={"help": "run folders, each with a metrics.jsonl"})
    output: str = field(default="training.png", metadata={"help": "the figure: .png, .svg or .pdf"})
    labels: list[str] = field(
        default_factory=list, metadata={"help": "names of the runs; empty: how their paths differ"}
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={"help": "figures to draw, one panel each, e.g. [loss/mel]; empty: a tokenizer's panels"},
    )
    smooth: int = field(default=5, metadata={"help": "logged lines in the running mean; 1: raw values only"})

    def __post_init__(self) -> None:
        if self.smooth < 1:
            raise ValueError(f"smooth={self.smooth}: must be at least 1")


def plan(config: Config) -> dict[str, object]:
    """What would be drawn; raises what would stop it."""
    runs = _read(config)
    return {
        "runs": {name: f"{len(rows)} lines, to step {rows[-1]['step']}" for name, rows in runs.items()},
        "panels": [panel.title for panel in _panels(config, runs)],
        "output": config.output,
    }


def run(config: Config) -> Path:
    """Draws the figure; returns its path."""
    runs = _read(config)
    panels = _panels(config, runs)
    columns = min(PER_ROW, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.5 * columns, 2.4 * lines + 0.3), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel, runs, config.smooth)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    if len(runs) > 1:
        handles = [Line2D([], [], color=_colour(index), linewidth=3) for index in range(len(runs))]
        columns = min(3, len(runs))
        figure.legend(handles, list(runs), loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    log.info("%s: %d panels of %d runs", path, len(panels), len(runs))
    return path


def _read(config: Config) -> dict[str, Rows]:
    """Lines of each run by its label, in the order of steps."""
    if not config.runs:
        raise ConfigError("no runs: slm plot-training RUN_DIR... (folders with a metrics.jsonl)")
    problems = Problems("slm plot-training")
    problems.attempt(_check_output, config.output)
    lines = [problems.attempt(_lines, Path(run)) for run in config.runs]
    problems.raise_all()
    labels = config.labels or _labels(config.runs)
    if len(labels) != len(config.runs) or len(set(labels)) != len(labels):
        raise ConfigError(f"labels: {len(config.runs)} different names are needed, one per run, not {labels}")
    return dict(zip(labels, lines, strict=True))


def _check_output(output: str) -> None:
    if Path(output).suffix not in FORMATS:
        raise ConfigError(f"output={output}: its ending must be one of {', '.join(FORMATS)}")
    refuse_unwritable(Path(output).parent, "the folder of output")


def _lines(run: Path) -> Rows:
    file = run if run.suffix == ".jsonl" else run / "metrics.jsonl"
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; name the folder of a training")
    rows = []
    for line in text_lines(file):
        try:
            row = json.loads(line)
            rows.append({name: value for name, value in row.items() if isinstance(value, (int, float))})
        except (ValueError, AttributeError):  # the last line of a run that is being written, or was cut off
            continue
    rows = [row for row in rows if "step" in row]
    if not rows:
        raise ConfigError(f"{file}: no figures in it yet")
    return sorted(rows, key=lambda row: row["step"])


def _labels(runs: list[str]) -> list[str]:
    """The parts of the paths that are not common to all, so `a/tokenizer` and `b/tokenizer` become `a` and `b`."""
    parts = [Path(run).parts for run in runs]
    if len(runs) == 1:
        return ["/".join(parts[0][-2:])]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return ["/".join(p) for p in parts]


def _panels(config: Config, runs: dict[str, Rows]) -> list[Panel]:
    known = {name for rows in runs.values() for row in rows for name in row} - {"step", "time"}
    if config.metrics:
        if missing := [name for name in config.metrics if name not in known]:
            raise ConfigError(f"no run has {', '.join(missing)}; there are: {', '.join(sorted(known))}")
        return [Panel(name, {name: name}) for name in config.metrics]
    panels = [Panel(p.title, {n: label for n, label in p.series.items() if n in known}, p.log) for p in PANELS]
    if panels := [panel for panel in panels if panel.series]:
        return panels
    if not known:
        raise ConfigError("the runs hold no figures beside steps")
    return [Panel(name, {name: name}) for name in sorted(known)[:MOST_PANELS]]


def _draw(axes: Axes, panel: Panel, runs: dict[str, Rows], smooth: int) -> None:
    many, legend = len(runs) > 1, {}
    for r, rows in enumerate(runs.values()):
        for s, (name, label) in enumerate(panel.series.items()):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if panel.log:
                points = [point for point in points if point[1] > 0]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            few = len(points) <= 2 * smooth or name.startswith("valid/")
            style = {"linestyle": LINES[s % len(LINES)], "linewidth": 1.4} | ({"marker": "o"} if few else {})
            colour = _colour(r if many else s)
            legend[label] = Line2D([], [], color="#555555" if many else colour, markersize=3, **style)
            if not few and smooth > 1:
                axes.plot(steps, values, linewidth=0.6, alpha=0.3, color=colour)
                values = _running_mean(values, smooth)
            axes.plot(steps, values, color=colour, markersize=3, **style)
    axes.set_title(panel.title, fontsize=9, loc="left")
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        low, high = axes.get_ylim()
        digits = (2, 3, 4, 5, 7) if high / low < 5 else (2, 5) if high / low < 50 else ()
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if _digit(value) in digits else ""))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelsize=7, which="both", length=2)
    axes.grid(color="#88888833", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if list(panel.series) != [panel.title]:
        axes.legend(legend.values(), legend, frameon=False, fontsize=7)


def _digit(value: float) -> int:
    """The first digit of a tick's value."""
    return round(value / 10 ** math.floor(math.log10(value) + 1e-9))


def _running_mean(values: tuple[float, ...], width: int) -> list[float]:
    """The mean of up to `width` values around each."""
    half = width // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
