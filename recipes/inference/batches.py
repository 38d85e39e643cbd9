"""A run's utterances in batches: dealt to the processes, kept as they are done, the same for any number of processes.

What is kept outlives a kill: the same command does the other batches, the same utterances in each as before, so its
result is that of a run without a kill, whatever the number of processes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.config import ConfigError
from recipes.runs.files import atomic_write_text, disk_errors, read_json
from recipes.runs.logs import log
from recipes.runs.machine import process_count
from recipes.runs.processes import Processes
from recipes.runs.progress import Progress
from recipes.runs.run_folder import RunFolder

# Batches of the model that one of ours holds, at most, so that the next prompts take the places of those that have
# ended; and how many of ours there are at least, for the processes to share and for what a kill loses.
MOST_TOGETHER, LEAST_PARTS = 8, 8


@dataclass
class Times:
    """Seconds of each part of the work, of all processes together, and the tokens that the LLM wrote meanwhile."""

    encode_s: float = 0.0
    generate_s: float = 0.0
    decode_s: float = 0.0
    n_tokens: int = 0

    def __add__(self, other: Times) -> Times:
        mine, its = dataclasses.astuple(self), dataclasses.astuple(other)
        return Times(*(a + b for a, b in zip(mine, its, strict=True)))


@dataclass
class Outcome:
    """What became of a batch: the row of each utterance, by its number, and how long it took."""

    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    times: Times = field(default_factory=Times)

    def save(self, path: Path) -> None:
        """Writes it, whole or not at all."""
        content = {"rows": list(self.rows.items()), "times": dataclasses.asdict(self.times)}
        atomic_write_text(path, json.dumps(content, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> Outcome | None:
        """Reads it; None where there is none."""
        content = read_json(path)
        return cls({i: row for i, row in content["rows"]}, Times(**content["times"])) if content else None


def make_batches(lengths: Sequence[Any], sizes: Sequence[int], batch_size: int) -> list[list[int]]:
    """The numbers of the utterances, in batches of like length; the longest come first, which need the most memory.

    Args:
        lengths: what each is sorted by.
        sizes: how many answers each needs, which is more than one where it is cut. One that needs more than a batch
            holds is alone.
        batch_size: answers of a batch, at most.
    """
    batches: list[list[int]] = []
    room = 0
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number], reverse=True):
        if not batches or sizes[number] > room:
            batches.append([])
            room = batch_size
        batches[-1].append(number)
        room -= sizes[number]
    return batches


def answers_together(n_answers: int, batch_size: int) -> int:
    """How many answers a batch of the run holds: several of the model's batches where there are many of them."""
    return batch_size * min(MOST_TOGETHER, max(1, n_answers // (LEAST_PARTS * batch_size)))


def join_processes(config: Any) -> Processes:
    """This process's place among those that were started.

    Raises:
        ConfigError: there are several, and no run_dir where they could put their parts together.
    """
    if process_count() > 1 and not config.run_dir:
        raise ConfigError("run_dir: needed with several processes; that is where they put their parts together")
    return Processes(config.device, Path(config.run_dir))


def begin_together(begin: Callable[[], RunFolder | None], config: Any, processes: Processes) -> RunFolder | None:
    """Opens the run folder in the main process, for all; None where none is set."""

    def open_folder() -> None:
        folder = begin()
        if folder is not None:
            folder.checkpoints  # noqa: B018 - makes the folder
            processes.forget_failures()

    processes.together(lambda: open_folder() if processes.is_main else None)
    return RunFolder(config.run_dir) if config.run_dir else None


def work_through(
    batches: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Outcome],
    folder: RunFolder | None,
    processes: Processes,
    description: str,
) -> Outcome:
    """Does this process's part of the batches that are not done yet, and waits for the others.

    Args:
        batches: numbers of utterances.
        work: does one of them.
        folder: where what is done is kept; None keeps it in memory.
        processes: those of the run.
        description: what is being done, for the line of progress.

    Returns:
        In the main process all rows and times together; in the others nothing.

    Raises:
        Exception: what `work` raises; ProcessError where it was in another process.
    """
    kept: list[Outcome] = []

    def path(number: int) -> Path:
        return folder.path("checkpoints", f"batch-{number:06d}-of-{len(batches):06d}.json")

    def todo() -> list[int]:
        return [number for number in range(len(batches)) if folder is None or not path(number).is_file()]

    def my_part(numbers: Sequence[int]) -> None:
        # The others' batches count as this process's do, so that the line of progress tells of the whole.
        bar = Progress(description, len(batches), len(batches) - len(numbers))
        for place, number in enumerate(numbers[processes.rank :: processes.count]):
            outcome = work(batches[number])
            if folder is None:
                kept.append(outcome)
            else:
                with disk_errors(folder.folder):
                    outcome.save(path(number))
            bar.update(min(processes.count, len(numbers) - place * processes.count))
            processes.halt_if_one_failed()
        bar.close()

    left = processes.together(lambda: todo() if processes.is_main else None)[0]
    if processes.is_main and len(left) < len(batches):
        log.info("going on: %d of %d batches are done", len(batches) - len(left), len(batches))
    processes.together(lambda: my_part(left))
    if folder is not None and processes.is_main:
        kept = [Outcome.load(path(number)) for number in range(len(batches))]
    whole = Outcome()
    for outcome in kept if processes.is_main else ():
        whole.rows |= outcome.rows
        whole.times += outcome.times
    return whole


def forget_batches(folder: RunFolder) -> None:
    """Takes the kept batches away, once the run's result is written."""
    for path in folder.path("checkpoints").glob("batch-*.json"):
        path.unlink()
