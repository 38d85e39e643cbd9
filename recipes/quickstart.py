"""``slm quickstart``: the whole road, small: corpus, teacher, tokenizer, codes, LLM, ASR and TTS, scores."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from recipes.pipeline import PipelineConfig, clock, describe, make_steps, results_folders, run_steps
from recipes.runtime import RunFolder, log


@dataclass
class Config(PipelineConfig):
    """The stages of the quickstart."""

    run_dir: str = "runs/quickstart"


def plan(config: Config) -> dict[str, object]:
    """The stages and where they stand; raises what is wrong in any stage's configuration."""
    return describe(make_steps(config)) | {"result": str(Path(config.run_dir))}


def run(config: Config) -> Path:
    """Run every stage that is not complete; print the table; returns the report."""
    started = time.perf_counter()
    steps = make_steps(config)
    folder = RunFolder(config.run_dir).start(config)
    seconds = run_steps(steps, config.redo)
    report = folder.folder
    for place in results_folders(steps):
        # An evaluation that has just run has printed its table.
        report = place / "report.html" if place.name in seconds else show_results(place)
    folder.mark_complete({"seconds": seconds})
    log.info("%d stages in %s", len(steps), clock(time.perf_counter() - started))
    return report


def show_results(place: Path) -> Path:
    """Print the table of a folder's results.json; returns its report."""
    from eval.report import format_table
    from eval.schema import load_results

    table = format_table(load_results(place))
    Console(soft_wrap=True).print(table, markup=False, highlight=False)
    log.info("report: %s", place / "report.html")
    return place / "report.html"
