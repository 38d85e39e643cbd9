"""Whole and torn checkpoints of transformers' Trainer, whatever engine wrote them.

Trainer raises on a torn `checkpoint-N` instead of taking the one before. A list of files and sizes, written last, tells
the whole ones apart.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments

log = logging.getLogger(__name__)
MARKER = "checkpoint_files.json"
LAST = "last_checkpoint.json"  # beside the checkpoints: the step of the newest whole one


class CheckpointError(ValueError):
    """A training that had checkpoints has none that is whole; the message says where, and the way out."""


class CheckpointMarker(TrainerCallback):
    """Lists each checkpoint's files in it, once all processes have written theirs."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            dist.barrier()  # every process's files are there before they are listed
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            mark_whole(folder)
            _write(folder.parent / LAST, json.dumps({"step": state.global_step}))


def mark_whole(folder: Path) -> None:
    """Lists a folder's files in it, when the last of them is written."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MARKER]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    _write(folder / MARKER, json.dumps(sizes, indent=1))


def is_whole(folder: Path) -> bool:
    """Whether all files that a folder's list names are there in their size; not where there is no list."""
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, json.JSONDecodeError):
        return False


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


class SettingsOfThisRun(TrainerCallback):
    """After a resume, steps between checkpoints, evaluations and log lines, and the next learning rate, are as set now.

    The Trainer takes them from the checkpoint: the intervals as they were, and the rate that the next step would have
    had. Where the run has been extended since, that is the end of a shorter schedule: a cosine's is 0, and the step
    would be lost.
    """

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)
        optimizer, schedule = kwargs.get("optimizer"), kwargs.get("lr_scheduler")
        if not isinstance(schedule, LambdaLR):  # DeepSpeed's own
            return
        shares = [share(schedule.last_epoch) for share in schedule.lr_lambdas]
        schedule._last_lr = [base * share for base, share in zip(schedule.base_lrs, shares, strict=True)]
        for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint; torn ones, cut off while written, are renamed to `torn-checkpoint-N` and left alone.

    Args:
        folder: Where the Trainer's `checkpoint-N` folders lie.

    Raises:
        CheckpointError: There was a whole one, and none is left: a training would begin at step 0 without a word.
    """
    found = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)
    for path in found:
        if is_whole(path):
            return path
        number = 0
        while (aside := path.with_name(f"torn-{path.name}" + (f"-{number}" if number else ""))).exists():
            number += 1
        path.rename(aside)
        log.warning("%s was cut off while it was written: set aside as %s", path, aside.name)
    last = Path(folder) / LAST
    if last.is_file():
        step = json.loads(last.read_text(encoding="utf-8"))["step"]
        raise CheckpointError(
            f"{folder}: the training had saved step {step}, and no whole checkpoint is left of it; put "
            f"checkpoint-{step} back, or start over with --restart (sets the run's folder aside)"
        )
    return None
