"""``slm quickstart``: the embedded models at three frame rates, from a corpus to a scored comparison.

A small corpus is synthesised; at 25, 12.5 and 6.25 Hz the embedded tokenizer encodes it, the embedded LLM is fine-tuned
on its codes for ASR and TTS together, and all is scored by the embedded recogniser: recordings, the tokenizer's three
outputs, and the SLM. The fine-tuning takes as many steps as fit its budget of time on this machine, the same number
at every rate. With ``--train-tokenizer`` nothing embedded is used: a teacher, a tokenizer at 12.5 Hz and a text LM are
trained first (`quickstart/from-scratch`).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from eval.schema import Results, Row, is_task, load_results, system_name, systems_of
from eval.text.normalisers import get_normaliser
from recipes.commands import compare, finetune, prepare_corpus
from recipes.config import ConfigError, from_values
from recipes.finetuning.data import used_tasks
from recipes.runs.embedded import EmbeddedError
from recipes.runs.files import atomic_write_text, read_json
from recipes.runs.logs import log
from recipes.runs.machine import describe_machine, process_count, resolve_device, resolve_precision, seed_everything
from recipes.runs.pipeline import Step
from recipes.runs.run_folder import RunFolder
from recipes.runs.times import clock
from slm.modeling import extend_with_speech, load_llm
from slm.tasks.registry import UtteranceTokens
from slm.training.batches import SpeechSamples
from slm.training.trainer import train
from slm.vocabulary import add_marks, add_speech
from tokenizer import load_tokenizer

STAGES = ("prepare-corpus", "encode", "finetune")  # what a budget needs: texts, a speech tokenizer, steps
STEPS_FILE = "steps.json"
WARM_UP, TIMED = 3, 7  # steps: the first ones choose kernels and fill memory
SECONDS_PER_CHARACTER = 0.069  # of espeak-ng's speech at 165 words per minute: mean of the quickstart's corpus


@dataclass
class StepBudget:
    """How long the fine-tuning of all cells may take together, and how far the steps may go from that."""

    minutes: float = field(default=4.0, metadata={"help": "for the fine-tuning of all cells together"})
    min_steps: int = field(default=400, metadata={"help": "fewest steps of a cell, however long they take"})
    max_steps: int = field(default=2000, metadata={"help": "most steps of a cell, however much time is left"})
    reference_s: float | None = field(
        default=None,
        metadata={"help": "seconds of a step where the stages' rough_s were taken; the plan scales them by it"},
    )

    def __post_init__(self) -> None:
        if self.minutes <= 0 or not 1 <= self.min_steps <= self.max_steps:
            raise ValueError("minutes must be above 0, and 1 <= min_steps <= max_steps")
        if self.reference_s is not None and self.reference_s <= 0:
            raise ValueError(f"reference_s: {self.reference_s} must be above 0, or null where nobody knows")


@dataclass
class ChosenSteps:
    """The number of steps, and what it follows from."""

    steps: int
    tokens_per_step: int
    seconds_per_step: dict[str, float]  # cell -> median on the machine that chose
    minutes: float  # the budget
    fit: int  # what fits the budget, before the bounds
    machine: dict[str, Any]

    @property
    def wall_s(self) -> float:
        """Seconds that the fine-tuning of all cells takes on the machine that chose."""
        return self.steps * sum(self.seconds_per_step.values())

    @property
    def mean_s(self) -> float:
        """Seconds of a step, mean of the cells."""
        return sum(self.seconds_per_step.values()) / len(self.seconds_per_step)

    @property
    def why(self) -> str:
        """One sentence for people."""
        fits = f"{self.minutes:g} min for {len(self.seconds_per_step)} models"
        if self.fit < self.steps:
            reason = f"{fits} would be {self.fit}, fewer than the least that make a table (min_steps)"
        elif self.fit > self.steps:
            reason = f"{fits} would be {self.fit}, more than are worth it (max_steps)"
        else:
            reason = f"as many as fit {fits}"
        return (
            f"{self.steps} fine-tuning steps of {self.tokens_per_step} tokens for each model: a step takes "
            f"{self.mean_s:.2f} s here; {reason}"
        )


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
        cells = compare.make_cells(config)
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
    for position, stage in enumerate(config.stages):
        redone |= stage.name == config.redo
        steps = [some[position] for cell, some in cells.items() if config.runs(cell)][: 1 if stage.shared else None]
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


def choose_steps(budget: StepBudget, tokens_per_step: int, seconds: Mapping[str, float]) -> ChosenSteps:
    """The steps that fit the budget, in tens, within its bounds.

    >>> choose_steps(StepBudget(minutes=4, min_steps=400, max_steps=2000), 512, {"25hz": 0.12, "12.5hz": 0.08}).steps
    1200
    """
    fit = int(60 * budget.minutes / sum(seconds.values()) + 1e-6) // 10 * 10
    steps = min(max(fit, budget.min_steps), budget.max_steps)
    rounded = {cell: round(value, 4) for cell, value in seconds.items()}
    return ChosenSteps(steps, tokens_per_step, rounded, budget.minutes, fit, describe_machine())


def saved_steps(folder: RunFolder) -> ChosenSteps | None:
    """What an earlier start chose; None before the first."""
    values = read_json(folder.path(STEPS_FILE))
    try:
        return from_values(ChosenSteps, values) if values else None
    except ConfigError as error:
        raise ConfigError(f"{folder.path(STEPS_FILE)}: {error}\nStart over with --restart") from error


def save_steps(folder: RunFolder, chosen: ChosenSteps) -> None:
    """Keep what was chosen."""
    atomic_write_text(folder.path(STEPS_FILE), json.dumps(asdict(chosen), indent=2) + "\n")


class _Timer(TrainerCallback):
    """Seconds of each step, from one's end to the next one's."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return np.diff(self.ends).tolist()


def time_step(config: finetune.Config, speech_tokenizer: str, texts: Sequence[str]) -> float:
    """Median seconds of a fine-tuning step: the configuration's model, rows and arithmetic, on texts like the corpus's.

    The corpus need not be there yet: codes are drawn at random, as many as speech of such a text has. Adapters are left
    out, the model is trained in full.

    Args:
        config: what is to be trained.
        speech_tokenizer: whose codes; decides the vocabulary and how many codes a text has.
        texts: what is said.
    """
    speech = load_tokenizer(speech_tokenizer).config
    seed_everything(config.seed)
    model, text_tokenizer, vocabulary = load_llm(config.model, config.weights)
    tasks = used_tasks(config)
    marks = [mark for task in tasks for mark in task.marks]
    if vocabulary is None:
        vocabulary = add_speech(text_tokenizer, speech.codebook_sizes, n_codebooks=config.n_codebooks, marks=marks)
        extend_with_speech(model, vocabulary, config.seed)
    elif (larger := add_marks(text_tokenizer, vocabulary, marks)).size > vocabulary.size:
        extend_with_speech(model, larger, config.seed, first_id=vocabulary.size)
        vocabulary = larger
    rng, normalise = np.random.default_rng(config.seed), get_normaliser(config.normaliser)
    shortest = min(vocabulary.codebook_sizes)
    frames = [max(1, round(len(text) * SECONDS_PER_CHARACTER * speech.frame_rate)) for text in texts]
    columns = {name for task in tasks for name in task.columns}
    utterances = []
    for text, n in zip(texts, frames, strict=True):
        ids = vocabulary.encode_text(text_tokenizer, normalise(text))
        codes = rng.integers(0, shortest, (vocabulary.n_codebooks, n))
        utterances.append(UtteranceTokens(codes, ids, dict.fromkeys(columns, ids)))  # as long, for want of better
    samples = SpeechSamples(vocabulary, utterances, config.task_weights, config.noise)
    timer, device = _Timer(), resolve_device(config.device)
    settings = dataclasses.replace(config.training, steps=WARM_UP + TIMED, eval_steps=0, keep="last")
    with TemporaryDirectory() as folder:
        train(
            model,
            samples,
            None,
            settings,
            folder,
            seed=config.seed,
            device=device,
            precision=resolve_precision(config.precision, device),
            processes=process_count(),
            callbacks=[timer],
        )
    return median(timer.seconds[WARM_UP - 1 :])


def bounds_text(budget: StepBudget) -> str:
    """For a plan before anything was measured."""
    return (
        f"as many as fit {budget.minutes:g} min for all models together, measured at the start; at least "
        f"{budget.min_steps}, at most {budget.max_steps}"
    )
