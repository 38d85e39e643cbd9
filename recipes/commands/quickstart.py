"""``slm quickstart``: the embedded models at three frame rates, from a corpus to a scored comparison.

A small corpus is synthesised; at 25, 12.5 and 6.25 Hz the embedded tokenizer encodes it, the embedded SLM of that rate
is fine-tuned on its codes for ASR and TTS together, and all is scored by the embedded recogniser: recordings, the
tokenizer's three outputs, and the SLM. The fine-tuning takes as many steps as fit its budget of time on this machine,
the same number at every rate. With ``--train-tokenizer`` nothing embedded is used: a teacher, a tokenizer at 12.5 Hz
and a text LM are trained first (`quickstart/from-scratch`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from eval.results_file import load_results
from eval.schema import Results, Row
from eval.systems import is_task, system_name, systems_of
from recipes.commands import compare, prepare_corpus
from recipes.comparison.running import make_cells
from recipes.config import ConfigError
from recipes.finetuning.step_budget import (
    ChosenSteps,
    StepBudget,
    bounds_text,
    choose_steps,
    save_steps,
    saved_steps,
    time_step,
)
from recipes.runs.embedded import EmbeddedError
from recipes.runs.logs import log
from recipes.runs.pipeline import Step
from recipes.runs.run_folder import RunFolder
from recipes.runs.times import clock

STAGES = ("prepare-corpus", "encode", "finetune")  # what a budget needs: texts, a speech tokenizer, steps


@dataclass
class Config(compare.Config):
    """A comparison like any other, with a folder of its own and steps that fit the machine."""

    run_dir: str = "runs/quickstart"
    budget: StepBudget | None = field(
        default=None,
        metadata={"help": "choose finetune.training.steps by time, once; null (or steps given in `set`): as they are"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and (missing := set(STAGES) - {stage.name for stage in self.stages}):
            raise ValueError(f"budget: needs the stages {', '.join(STAGES)}; not there: {', '.join(sorted(missing))}")

    @property
    def chooses(self) -> bool:
        """Whether the steps are to be chosen: a budget is given, and nobody set them."""
        given = [*self.set, *(item for cell in self.cells for item in cell.set)]
        return self.budget is not None and not any(item.startswith("finetune.training.steps=") for item in given)

    def with_steps(self, chosen: ChosenSteps) -> Config:
        """The same with the steps that were chosen, so that `config.yaml` runs again as it is."""
        return replace(self, set=[*self.set, f"finetune.training.steps={chosen.steps}"])


def plan(config: Config) -> dict[str, object]:
    """The stages of each frame rate and where they stand; raises what is wrong in any stage's configuration."""
    chosen = saved_steps(RunFolder(config.run_dir)) if config.chooses else None
    try:
        facts = compare.plan(config if chosen is None else config.with_steps(chosen))
    except EmbeddedError as error:
        raise _with_way_out(error) from error
    if config.chooses:
        facts["fine-tuning steps"] = bounds_text(config.budget) if chosen is None else chosen.why
    return facts


def run(config: Config) -> Path:
    """Print the plan, run every stage that is not complete, print what came out; returns the report."""
    try:
        cells = make_cells(config)
        RunFolder(config.run_dir).check(config)
        chosen = _chosen(config, cells) if config.chooses else None
        show_opening(config, cells, chosen)
        notes = [] if chosen is None else [f"chosen on this machine: {chosen.why}"]
        failed = compare.make_table(config if chosen is None else config.with_steps(chosen), notes)
    except EmbeddedError as error:
        raise _with_way_out(error) from error
    console = Console(soft_wrap=True)
    for line in headlines(load_results(config.run_dir)):
        console.print(Text(line))
    console.print()
    return compare.end_with(config, failed)


def _with_way_out(error: EmbeddedError) -> ConfigError:
    return ConfigError(f"{error}\n`slm quickstart --train-tokenizer` needs none of them: it trains its own.")


def _chosen(config: Config, cells: Mapping[str, Sequence[Step]]) -> ChosenSteps:
    """The steps as an earlier start chose them, or chosen now and kept."""
    folder = RunFolder(config.run_dir)
    if (chosen := saved_steps(folder)) is not None:
        return chosen
    log.info("timing a few fine-tuning steps of each model on this machine")
    seconds = {}
    for cell, steps in cells.items():
        by_name = {step.stage.name: step.config for step in steps}
        corpus, speech, training = (by_name[name] for name in STAGES)
        texts = [line.text for line in prepare_corpus.make_lines(corpus) if line.split == "train"]
        seconds[cell] = time_step(training, speech.tokenizer, texts)
    chosen = choose_steps(config.budget, training.training.tokens_per_step, seconds)
    save_steps(folder, chosen)
    return chosen


def show_opening(config: Config, cells: Mapping[str, Sequence[Step]], chosen: ChosenSteps | None) -> None:
    """Print the plan: what each stage does, and about how long it takes here."""
    scale = chosen.mean_s / config.budget.reference_s if chosen and config.budget.reference_s else None
    table = Table("stage", "what it does", "about", title=escape(config.title), title_justify="left")
    total, known, redone = 0.0, True, False
    for stage in config.stages:
        redone |= stage.name == config.redo
        steps = [step for cell, some in cells.items() if config.runs(cell) for step in some if step.stage is stage]
        steps = steps[: 1 if stage.shared else None]
        open_steps = [step for step in steps if redone or not step.folder.complete]
        if not open_steps:
            table.add_row(stage.name, what_it_does(steps), "done before" if steps else "")
            continue
        seconds, source = stage.rough_s, "rough"
        if stage.name == "finetune" and chosen is not None:
            seconds, source = chosen.wall_s / len(cells), "measured"
        elif seconds is not None and scale is not None:
            seconds *= scale
        times = f"{len(open_steps)} x " if len(open_steps) > 1 else ""
        table.add_row(
            stage.name, what_it_does(steps), "unknown" if seconds is None else f"{times}{clock(seconds)} ({source})"
        )
        known &= seconds is not None
        total += (seconds or 0.0) * len(open_steps)
    console = Console()
    console.print(table)
    if chosen is not None:
        console.print(Text(f"{chosen.why}."))
    if total and known:
        where = "on this machine" if scale is not None else "on one core with AVX-512"
        console.print(Text(f"All together about {clock(total)} {where}."))


def what_it_does(steps: Sequence[Step]) -> str:
    """The first line of a stage's recipe, without the command."""
    about = steps[0].recipe.__doc__ if steps else None
    return (about or "").partition("\n")[0].partition(": ")[2].replace("``", "")


def headlines(results: Results) -> list[str]:
    """The lines that matter first: each task's best rate, TTS and ASR before others, and what each rate costs."""
    lines = []
    for system in systems_of(row.system for row in results.rows if is_task(row.system)):
        rows = [row for row in results.rows if row.system == system and row.frame_rate_hz]
        rows = sorted((row for row in rows if row.protocol.key() == rows[0].protocol.key()), key=lambda row: row.wer)
        if rows:
            best, *others = rows
            low, high = best.interval or (best.wer, best.wer)
            beside = "".join(f", {_rate(row)} {100 * row.wer:.1f} %" for row in others)
            head = f"{system_name(system)}: " + (f"best at {_rate(best)}, WER" if others else f"{_rate(best)}, WER")
            lines.append(f"{head} {100 * best.wer:.1f} % [{100 * low:.1f}, {100 * high:.1f}]{beside}")
    costs = {_rate(row): row.tokens_per_second for row in results.rows if is_task(row.system)}
    shown = ", ".join(f"{rate} {tokens:g}" for rate, tokens in costs.items() if tokens)
    if shown:
        lines.append(f"Cost in tokens per second of speech: {shown}")
    if len(costs) > 1:
        lines.append("One seed a rate: this is what these models did; several seeds tell which rate is better.")
    return lines


def _rate(row: Row) -> str:
    return f"{row.frame_rate_hz:g} Hz"
