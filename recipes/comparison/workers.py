"""Cells of `slm compare` side by side: each worker is a process that takes one stage of one cell after the other.

A worker's stage is `run_steps` of that stage, as without workers. Two cells that share a stage never run it at once:
the second waits, or another cell goes first. What a stage says goes to a file of its own, ``logs/CELL-STAGE.log``.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from recipes.config import ConfigError
from recipes.runs.logs import log, setup_logging
from recipes.runs.pipeline import Stage, StageError, Step, run_steps
from recipes.runs.progress import Progress
from recipes.runs.run_folder import RunFolder
from recipes.runs.times import clock

LOGS = "logs"
_LAST_S = 10.0  # that a process may take to end when there are no more jobs
VISIBLE_GPUS, THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Job:
    """A step as it travels to a worker: a module does not, its name does."""

    stage: Stage
    recipe: str
    config: Any
    inputs: tuple[RunFolder, ...]
    label: str
    log_file: Path

    @classmethod
    def of(cls, step: Step, cell: str, logs: Path) -> Job:
        """The job of a cell's step."""
        file = logs / f"{cell}-{step.stage.name}.log"
        return cls(step.stage, step.recipe.__name__, step.config, step.inputs, f"{cell}: ", file)

    def run(self) -> float | None:
        """Run it here; returns the seconds it took, None where it was complete. Raises StageError."""
        step = Step(self.stage, importlib.import_module(self.recipe), self.config, self.inputs)
        return run_steps([step], label=self.label).get(self.stage.name)


@dataclass(frozen=True)
class Outcome:
    """What became of a job: the seconds it took, None where it was complete before, or why it failed."""

    seconds: float | None = None
    why: str | None = None
    trace: str = ""  # of what no user can have caused


def run_with_workers(
    cells: Mapping[str, Sequence[Step]], n_workers: int, logs: Path
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Run the cells' steps, as many cells at once as there are workers; each cell's own stay in their order.

    Each worker sees one of the GPUs (two share one where there are more workers than GPUs) and has its part of the
    CPU's threads, so that a training's rounding on a CPU is that of so many threads.

    Args:
        cells: cell -> its steps. Steps of one folder are one: it runs once.
        n_workers: processes.
        logs: folder of what the stages say.

    Returns:
        cell -> stage -> seconds of what ran, and cell -> why it failed.

    Raises:
        ConfigError: a shared stage failed, without which no cell can run.
    """
    waiting = {cell: list(steps) for cell, steps in cells.items() if steps}
    seconds: dict[str, dict[str, float]] = {cell: {} for cell in cells}
    failed: dict[str, str] = {}
    busy: dict[Worker, str] = {}
    left = {step.folder.folder for steps in waiting.values() for step in steps if not step.folder.complete}
    with contextlib.closing(Progress("stages", len(left))) as shown, _workers(n_workers) as workers:
        while waiting:
            for worker in workers:
                if worker not in busy and (cell := _next(waiting, busy.values())) is not None:
                    worker.give(Job.of(waiting[cell][0], cell, logs))
                    busy[worker] = cell
            shown.show(now=", ".join(f"{cell} {waiting[cell][0].stage.name}" for cell in busy.values()))
            for worker in Worker.answered(list(busy)):
                cell, outcome = busy.pop(worker), worker.outcome()
                step = waiting[cell].pop(0)
                _tell(cell, step, outcome, logs)
                if outcome.why is not None and step.stage.shared:
                    raise ConfigError(outcome.why)
                if outcome.why is not None:
                    failed[cell] = outcome.why
                    waiting[cell] = []
                elif outcome.seconds is not None:
                    seconds[cell][step.stage.name] = outcome.seconds
                    shown.update()
                if not waiting[cell]:
                    del waiting[cell]
    return {cell: seconds[cell] for cell in cells if cell not in failed}, failed


def _next(waiting: Mapping[str, Sequence[Step]], busy: Collection[str]) -> str | None:
    """The first cell whose next step nobody is at; None where there is none."""
    taken = [waiting[cell][0].folder.folder for cell in busy]
    return next((c for c, steps in waiting.items() if c not in busy and steps[0].folder.folder not in taken), None)


def _tell(cell: str, step: Step, outcome: Outcome, logs: Path) -> None:
    if outcome.why is not None:
        log.error("%s failed, %s (%s)%s", cell, outcome.why, logs / f"{cell}-{step.stage.name}.log", outcome.trace)
    elif outcome.seconds is not None:
        log.info("%s: %s: done in %s", cell, step.stage.name, clock(outcome.seconds))


class Worker:
    """A process that runs jobs; where it is ended from outside, the next job gets a new one.

    Args:
        environment: variables that it has beside ours.
        n_threads: of torch on a CPU.
    """

    def __init__(self, environment: Mapping[str, str], n_threads: int) -> None:
        self._environment, self._n_threads = dict(environment), n_threads
        self._process: multiprocessing.process.BaseProcess | None = None
        self._jobs: Connection | None = None
        self._job: Job | None = None

    def give(self, job: Job) -> None:
        """Let it run a job."""
        if self._process is None or not self._process.is_alive():
            self._start()
        self._job = job
        with contextlib.suppress(ConnectionError):  # it has just died: its outcome says so
            self._jobs.send(job)

    @staticmethod
    def answered(busy: Sequence[Worker]) -> list[Worker]:
        """Those of the busy ones that are through with their job, or dead; waits for the first."""
        ready = wait([item for worker in busy for item in (worker._jobs, worker._process.sentinel)])
        return [worker for worker in busy if worker._jobs in ready or worker._process.sentinel in ready]

    def outcome(self) -> Outcome:
        """What became of its job."""
        job, self._job = self._job, None
        with contextlib.suppress(EOFError, ConnectionError):
            return self._jobs.recv()
        self._process.join()
        code = self._process.exitcode
        how = f"signal {-code}, as by the system where memory ran out" if code < 0 else f"exit status {code}"
        return Outcome(why=f"stage {job.stage.name}: its process was ended from outside ({how})")

    def end(self) -> None:
        """End it, whatever it is at; an idle one ends by itself, and leaves nothing behind."""
        if self._process is None:
            return
        self._jobs.close()
        if self._job is None:
            self._process.join(_LAST_S)
        self._process.terminate()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        self._jobs, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self._n_threads))
        with _environment(self._environment):
            self._process.start()
        theirs.close()


@contextlib.contextmanager
def _workers(n: int) -> Iterator[list[Worker]]:
    import torch

    n_gpus = torch.cuda.device_count()
    gpus = os.environ.get(VISIBLE_GPUS) or ",".join(map(str, range(n_gpus)))
    n_threads = max(1, torch.get_num_threads() // n)
    workers = []
    for number in range(n):
        environment = {THREADS: str(n_threads)}
        if n_gpus:
            environment[VISIBLE_GPUS] = gpus.split(",")[number % n_gpus]
        workers.append(Worker(environment, n_threads))
    try:
        yield workers
    finally:
        for worker in workers:
            worker.end()


@contextlib.contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _work(jobs: Connection, n_threads: int) -> None:
    """The life of a worker: a job, its outcome, the next."""
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # no more jobs
        while True:
            job: Job = jobs.recv()
            _write_to(job.log_file)
            setup_logging()
            torch.set_num_threads(n_threads)
            jobs.send(_outcome(job))


def _outcome(job: Job) -> Outcome:
    try:
        return Outcome(job.run())
    except StageError as error:
        known = isinstance(error.cause, ValueError | OSError)
        return Outcome(why=str(error), trace="" if known else f"\n{traceback.format_exc()}")


def _end_with_parent() -> None:
    """A comparison that is killed is started again at once: nobody may still be writing in its folders."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _write_to(file: Path) -> None:
    """Send both outputs of this process to the end of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with file.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
