"""How many fine-tuning steps fit a budget of time on this machine, found by timing a few; chosen once and kept."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import TrainerCallback

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError, from_values
from recipes.finetuning.config import Config
from recipes.finetuning.corpora import used_tasks
from recipes.runs.files import atomic_write_text, read_json
from recipes.runs.machine import describe_machine, process_count, resolve_device, resolve_precision, seed_everything
from recipes.runs.run_folder import RunFolder
from slm.model.modeling import load_llm
from slm.model.multi_token import set_multi_token_heads
from slm.model.speech_rows import extend_with_speech
from slm.tasks.registry import UtteranceTokens
from slm.training.objectives import finetuning_objective
from slm.training.samples import SpeechSamples
from slm.training.train import train
from slm.vocabulary import add_marks, add_speech
from tokenizer import load_tokenizer

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
    """What an earlier start chose; None before the first.

    Raises:
        ConfigError: Its file does not hold what one writes there.
    """
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


def time_step(config: Config, speech_tokenizer: str, texts: Sequence[str]) -> float:
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
        vocabulary = add_speech(
            text_tokenizer,
            speech.codebook_sizes,
            n_codebooks=config.n_codebooks,
            marks=marks,
            pattern=config.pattern,
        )
        extend_with_speech(model, vocabulary, config.seed)
    elif (larger := add_marks(text_tokenizer, vocabulary, marks)).size > vocabulary.size:
        extend_with_speech(model, larger, config.seed, first_id=vocabulary.size)
        vocabulary = larger
    set_multi_token_heads(model, config.training.multi_token)
    rng, normalise = np.random.default_rng(config.seed), get_normaliser(config.normaliser)
    shortest = min(vocabulary.book_sizes)
    frames = [max(1, round(len(text) * SECONDS_PER_CHARACTER * speech.frame_rate)) for text in texts]
    columns = {name for task in tasks for name in task.columns}
    utterances = []
    for text, n in zip(texts, frames, strict=True):
        ids = vocabulary.encode_text(text_tokenizer, normalise(text))
        codes = rng.integers(0, shortest, (vocabulary.n_codebooks, n))
        # A column is as long as the text, and so are the words of a task by word, each a token: for want of better.
        frames_of = [len(part) for part in np.array_split(np.arange(n), min(n, len(ids)) or 1)]
        words = [ids[k : k + 1] for k in range(len(frames_of))]
        further = {"words": words, "word_frames": frames_of}
        utterances.append(UtteranceTokens(codes, ids, dict.fromkeys(columns, ids), **further))
    samples = SpeechSamples(vocabulary, utterances, config.task_weights, config.noise)
    timer, device = _Timer(), resolve_device(config.device)
    settings = dataclasses.replace(config.training, steps=WARM_UP + TIMED, epochs=None, eval_steps=0, keep="last")
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
            objective=finetuning_objective(vocabulary, config.training, config.further_weight),
        )
    return median(timer.seconds[WARM_UP - 1 :])


def bounds_text(budget: StepBudget) -> str:
    """For a plan before anything was measured."""
    return (
        f"as many as fit {budget.minutes:g} min for all models together, measured at the start; at least "
        f"{budget.min_steps}, at most {budget.max_steps}"
    )
