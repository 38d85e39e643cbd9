"""Where training figures go: ``metrics.jsonl``, one JSON object per line, written by accelerate or the Trainer.

A tokenizer's training also writes TensorBoard's files and, where asked, to Weights & Biases.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import time
from pathlib import Path
from typing import Any, Literal

from accelerate.tracking import GeneralTracker, WandBTracker, on_main_process
from transformers import TrainerCallback

from recipes.config import ConfigError
from recipes.runs.files import atomic_write_text, text_lines
from recipes.runs.logs import log
from recipes.runs.machine import is_main_process
from recipes.runs.progress import Progress
from recipes.runs.run_folder import RunFolder

Tracker = Literal["tensorboard", "wandb"]
PROJECT = "lmspt-slm"
SHOWN = ("loss", "reward", "reward_margin")  # of what the Trainer logs, beside the progress


def append_metrics(path: str | Path, step: int, values: dict[str, Any]) -> None:
    """Append one line ``{"step": ..., "time": ..., name: value}``; numbers that are not finite become null."""
    row: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
    for name, value in values.items():
        value = value.item() if hasattr(value, "item") else value
        row[name] = None if isinstance(value, float) and not math.isfinite(value) else value
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def drop_metrics_after(path: str | Path, step: int) -> None:
    """Cut the lines past ``step`` (and a torn last line), so that a resumed run does not repeat them."""
    path = Path(path)
    if not path.is_file():
        return
    kept = []
    for line in text_lines(path):
        try:
            if json.loads(line).get("step", 0) <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    atomic_write_text(path, "".join(kept))


class JsonlTracker(GeneralTracker):
    """An accelerate tracker which writes ``metrics.jsonl``.

    Args:
        path: the file to append to.
    """

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Nothing: the run folder already holds ``config.yaml``."""

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Append one line."""
        append_metrics(self.path, step if step is not None else 0, values)


def check_trackers(names: list[Tracker]) -> None:
    """Raises ConfigError where one of the trackers' packages is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"trackers={names}: {name} is not installed: pip install {name}, or leave it out")


def make_trackers(names: list[Tracker], folder: RunFolder) -> list[GeneralTracker | str]:
    """What accelerate logs to: `metrics.jsonl` always, and the named ones.

    A resumed run goes on in the same run of Weights & Biases, which is called like the run folder; its project is
    `lmspt-slm` unless WANDB_PROJECT says otherwise.

    Raises:
        ConfigError: where a package is missing.
    """
    check_trackers(names)
    trackers: list[GeneralTracker | str] = [JsonlTracker(folder.metrics)]
    for name in dict.fromkeys(names):
        trackers.append(_wandb(folder) if name == "wandb" else name)
    return trackers


class _WandB(WandBTracker):
    """Accelerate's tracker, opened in the first process alone."""

    main_process_only = True


def _wandb(folder: RunFolder) -> WandBTracker:
    name = "-".join(folder.folder.parts[-3:])
    folder.folder.mkdir(parents=True, exist_ok=True)
    # The id lies in the folder, so that a training started over is another run there too.
    file, identity = folder.path("wandb_id.txt"), None
    if is_main_process():
        if not file.is_file():
            atomic_write_text(file, secrets.token_hex(8) + "\n")
        identity = file.read_text(encoding="utf-8").strip()
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return _WandB(project, name=name, id=identity, resume="allow", dir=str(folder.folder))


class MetricsCallback(TrainerCallback):
    """A Trainer callback which writes what the Trainer logs to ``metrics.jsonl``.

    Args:
        path: the file to append to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After a resume, forget what was logged past the checkpoint; without one, all: it will be logged again."""
        if state.is_world_process_zero:
            drop_metrics_after(self.path, state.global_step or -1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Append one line."""
        if state.is_world_process_zero and logs:
            append_metrics(self.path, state.global_step, logs)


class TrainerProgress(TrainerCallback):
    """How far transformers' Trainer is, with the newest loss.

    Use it with `disable_tqdm=True`; it takes the place of the PrinterCallback, which the Trainer then has.
    """

    def __init__(self, description: str) -> None:
        self.description = description
        self.progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start where a resumed run goes on."""
        if state.is_world_process_zero:
            self.progress = Progress(self.description, state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step further."""
        if self.progress is not None:
            self.progress.update(state.global_step - self.progress.done)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Show the loss, and rewards; scores of the valid split as a line of their own."""
        if self.progress is None or not logs:
            return
        self.progress.show(**{name: f"{logs[name]:.3f}" for name in SHOWN if name in logs})
        scores = {name: value for name, value in logs.items() if name.startswith(("valid", "eval_"))}
        if scores:
            line = ", ".join(f"{n} {v:.3f}" for n, v in scores.items() if isinstance(v, float))
            log.info("step %d: %s", state.global_step, line)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the full bar standing."""
        if self.progress is not None:
            self.progress.close()
            self.progress = None
