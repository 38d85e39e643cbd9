"""Times that a run records, how long it took, and durations for people."""

from __future__ import annotations

import contextlib
import json
from datetime import datetime, timezone
from pathlib import Path

from recipes.runs.files import text_lines

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"


def read_time(text: str) -> datetime | None:
    """A recorded time, of whatever offset (earlier ones are local); None where the text is none."""
    try:
        return datetime.strptime(text, TIME_FORMAT)
    except ValueError:
        return None


def wall_seconds(starts: list[str], metrics: Path, finished: str) -> float | None:
    """Seconds that a run took, over all its starts; None where that is not recorded.

    A start that was interrupted counts up to the last line of metrics that it left.

    Args:
        starts: when it was started, each time (`TIME_FORMAT`).
        metrics: its metrics.jsonl, if it has one.
        finished: when it was done.
    """
    try:
        began = [datetime.strptime(start, TIME_FORMAT).timestamp() for start in starts]
        end = datetime.strptime(finished, TIME_FORMAT).timestamp()
    except ValueError:
        return None
    if not began:
        return None
    times = []
    if len(began) > 1 and metrics.is_file():
        for line in text_lines(metrics):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                times.append(float(json.loads(line)["time"]))
    total = end - began[-1]
    for start, after in zip(began, began[1:], strict=False):
        total += max((time for time in times if start <= time <= after), default=start) - start
    return total


def now() -> str:
    """This moment, as a run records it: in UTC, for machines that share a disk."""
    return datetime.now(timezone.utc).strftime(TIME_FORMAT)


def clock(seconds: float) -> str:
    """``135`` -> ``2 min 15 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
