"""Checkpoints of DeepSpeed's ZeRO: each process writes its part of the optimizer, which as many have to read again."""

from __future__ import annotations

from pathlib import Path

from slm.training.config import TrainingError

LATEST = "latest"  # DeepSpeed's file with the name of the folder that its parts lie in
PARTS = "*_optim_states.pt"  # one of each process


def processes_of(checkpoint: Path) -> int | None:
    """How many processes wrote a checkpoint's optimizer in parts; None where DeepSpeed did not write it."""
    latest = checkpoint / LATEST
    if not latest.is_file():
        return None
    return len(list((checkpoint / latest.read_text(encoding="utf-8").strip()).glob(PARTS)))


def check_processes(checkpoint: Path, processes: int) -> None:
    """Refuses a checkpoint whose parts were written by another number of processes.

    Raises:
        TrainingError: It was; the message says by how many.
    """
    written_by = processes_of(checkpoint)
    if written_by not in (None, processes):
        raise TrainingError(
            f"{checkpoint}: DeepSpeed wrote it in {written_by} processes and cannot go on from it in {processes}; "
            f"start {written_by} (torchrun --nproc_per_node {written_by} ...). Without an engine "
            "(training.deepspeed=null, in a run_dir of its own) a training goes on in any number"
        )
