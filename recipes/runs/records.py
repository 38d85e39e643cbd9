"""What a run folder records of the machine it ran on and of the time it took."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"


def read_time(text: str) -> datetime | None:
    """A recorded time, of whatever offset (earlier ones are local); None where the text is none."""
    try:
        return datetime.strptime(text, TIME_FORMAT)
    except ValueError:
        return None


def text_lines(path: Path) -> list[str]:
    """The lines of a text file, of JSONL above all: only a newline ends one, as U+2028 or U+0085 stand in texts."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return lines if lines[-1] else lines[:-1]


def describe_machine(cpuinfo: str | Path = "/proc/cpuinfo") -> dict[str, Any]:
    """CPU, cores and threads in use, memory (GiB) and GPU, as far as they can be read without loading anything."""
    facts: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    with contextlib.suppress(OSError):
        lines = Path(cpuinfo).read_text("utf-8", errors="replace").splitlines()
        named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line]
        facts["cpu"] = named[0] if named else facts["cpu"]
    with contextlib.suppress(AttributeError, OSError):  # fewer where the process may not use them all
        facts["cores"] = len(os.sched_getaffinity(0))
    with contextlib.suppress(AttributeError, OSError, ValueError):
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if (torch := sys.modules.get("torch")) is not None:
        facts["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return facts


def machine_text(record: dict[str, Any]) -> str:
    """One line for people, from a run.json; of an older one that knows the number of CPUs alone, that."""
    machine = record.get("machine") or {}
    if not machine:
        return f"{record.get('cpus', '?')} CPU cores"
    parts = [machine["gpu"]] if machine.get("gpu") else []
    parts += [str(machine.get("cpu", "?")), f"{machine.get('cores', '?')} cores"]
    parts += [f"{machine['threads']} torch threads"] if machine.get("threads") else []
    return ", ".join(parts)


def wall_seconds(starts: list[str], metrics: Path, finished: str) -> float | None:
    """Seconds that a run took, over all its starts; None where that is not recorded.

    A start that was cut off counts up to the last line of metrics that it left.

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
