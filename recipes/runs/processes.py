"""The processes of one run, each with its own part of the work: who am I, on which device, how an error ends all.

They share nothing but the run folder and a gloo group of a few bytes. The group is made apart from accelerate's own,
whose collectives give up after minutes: a process may wait for hours until the others' parts are done.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from recipes.config import ConfigError
from recipes.runs.machine import process_count, resolve_device

T = TypeVar("T")
PATIENCE = timedelta(days=30)


class ProcessError(ValueError):
    """Another process of this run failed; the message is its own."""


class _Halted(Exception):
    """Another process failed, and this one has nothing to add."""


class Processes:
    """Rank, number and device of the processes that torchrun or accelerate launch started; one without a launcher.

    Args:
        device: auto, cpu, cuda or cuda:N. With several processes auto and cuda give each its own GPU.
        folder: the run's folder, which all processes see; a process that fails leaves a sign there for the others.

    Raises:
        ConfigError: more processes than GPUs, or processes that do not find each other.
    """

    def __init__(self, device: str, folder: Path) -> None:
        self.count, self.rank, self.device = process_count(), 0, resolve_device(device)
        self._sign = folder / "checkpoints" / "stop"
        if self.count == 1:
            return
        import torch
        from accelerate import PartialState

        on_gpu = self.device.startswith("cuda")
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if on_gpu and here > torch.cuda.device_count():
            raise ConfigError(
                f"{here} processes were started on a machine with {torch.cuda.device_count()} GPUs: start one for each"
            )
        state = PartialState(cpu=not on_gpu, timeout=PATIENCE)
        if state.num_processes != self.count:
            raise ConfigError(
                f"WORLD_SIZE={self.count}, but accelerate found {state.num_processes} process: start them with "
                "torchrun --nproc_per_node N -m recipes.cli COMMAND ..."
            )
        self.rank = state.process_index
        if self.device == "cuda":
            self.device = str(state.device)
        self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """Does `work` in each process and returns the results of all, by rank.

        Raises:
            Exception: in the process whose work raised, what it raised; in the others ProcessError with its message.
        """
        if self.count == 1:
            return [work()]
        outcome: tuple[Any, str | None] = (None, None)
        error: Exception | None = None
        try:
            outcome = (work(), None)
        except _Halted:
            outcome = (None, "")
        except Exception as caught:
            error, outcome = caught, (None, str(caught) or type(caught).__name__)
            if self._sign.parent.is_dir():
                with contextlib.suppress(OSError):  # on a full disk the others learn of it at the end of their work
                    self._sign.touch()
        try:
            outcomes = self._gather(outcome)
        except RuntimeError as lost:
            raise error or ProcessError(f"another process ended without a message ({lost})") from lost
        if error is not None:
            raise error
        messages = {rank: message for rank, (_, message) in enumerate(outcomes) if message is not None}
        if messages:
            rank = min(messages, key=lambda rank: (messages[rank] == "", rank))
            raise ProcessError(f"process {rank} of {self.count} stopped: {messages[rank]}")
        return [result for result, _ in outcomes]

    def halt_if_one_failed(self) -> None:
        """Called now and then within `together`: ends this process's part of the work if another's has failed."""
        if self.count > 1 and self._sign.exists():
            raise _Halted

    def forget_failures(self) -> None:
        """Takes away the sign of an earlier failure; the main process does so before the work starts."""
        self._sign.unlink(missing_ok=True)

    def _gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._group)
        return found
