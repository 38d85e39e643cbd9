"""How far a stage is: a bar where the output is a terminal, elsewhere a line of the log every few per cent."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from recipes.runs.logs import log
from recipes.runs.machine import is_main_process
from recipes.runs.times import clock

T = TypeVar("T")
LOG_FRACTION = 0.05  # of the whole, after which the log gets another line
MIN_INTERVAL_S, MAX_INTERVAL_S = 10.0, 600.0  # between two lines of the log


class Progress:
    """Steps towards a total, shown by the main process alone.

    Args:
        description: what is being done; it opens every line.
        total: steps to take.
        done: steps that an earlier start took.
        terminal: whether to draw a bar; None: where standard error is a terminal.
    """

    def __init__(self, description: str, total: int, done: int = 0, terminal: bool | None = None) -> None:
        self.description, self.total, self.done = description, total, done
        self._bar: tqdm | None = None
        self._figures: dict[str, str] = {}
        self._silent = not is_main_process()
        self._began, self._first = time.perf_counter(), done
        self._logged_at, self._logged = self._began, done  # of the newest line, the start before there is one
        if not self._silent and (sys.stderr.isatty() if terminal is None else terminal):
            self._bar = tqdm(total=total, initial=done, desc=description, mininterval=0.2, dynamic_ncols=True)

    def update(self, steps: int = 1) -> None:
        """So many steps further."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(steps)
        elif not self._silent:
            self._log_if_due()

    def show(self, **figures: str) -> None:
        """The newest figures, such as the loss; they stand in the next line."""
        self._figures |= figures
        if self._bar is not None:
            self._bar.set_postfix(self._figures, refresh=False)

    def close(self) -> None:
        """The end, or as far as it came. The full bar is left standing."""
        if self._bar is not None:
            self._bar.close()

    def _log_if_due(self) -> None:
        now = time.perf_counter()
        begun = self._logged > self._first
        waited, fraction = now - self._logged_at, (self.done - self._logged) / self.total
        due = waited >= MIN_INTERVAL_S and (not begun or fraction >= LOG_FRACTION or waited >= MAX_INTERVAL_S)
        # A stage that was over before its first line was due needs none: its recipe says what came out.
        if due or (begun and self.done == self.total):
            self._logged, self._logged_at = self.done, now
            log.info("%s", self._line(now - self._began))

    def _line(self, elapsed: float) -> str:
        speed = (self.done - self._first) / elapsed
        parts = [f"{self.description}: {self.done} of {self.total} ({100 * self.done / self.total:.0f} %)"]
        parts += [f"{name} {value}" for name, value in self._figures.items()]
        parts.append(f"{speed:.2f} a second" if speed >= 1 else f"{1 / speed:.2f} s each")
        if self.done < self.total:
            parts.append(f"{clock((self.total - self.done) / speed)} left")
        return ", ".join(parts)


def progress(iterable: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Iterate and tell how far it is."""
    shown = Progress(description, total)
    try:
        for item in iterable:
            yield item
            shown.update()
    finally:
        shown.close()
