"""What malloc is told: all of it, or nothing that would make it worse than untouched."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from recipes.runs import process_settings

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3


class Malloc:
    """A C library that takes a threshold up to `largest`; `held` is what it was told and took."""

    def __init__(self, largest: int) -> None:
        self.largest, self.held = largest, {}

    def mallopt(self, number: int, value: int) -> int:
        if number == MMAP_THRESHOLD and value > self.largest:
            return 0
        self.held[number] = value
        return 1


@pytest.mark.parametrize(
    ("largest", "threshold"),
    [(1 << 31, 64 << 20), (32 << 20, 32 << 20), (512 << 10, None)],
    ids=["new", "old", "32-bit"],
)
def test_the_other_settings_follow_only_where_the_threshold_was_raised(monkeypatch, largest, threshold):
    library = Malloc(largest)
    monkeypatch.setattr(process_settings, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr(process_settings, "ctypes", SimpleNamespace(CDLL=lambda name: library))
    assert process_settings.keep_freed_memory() == (threshold is not None)
    assert library.held.get(MMAP_THRESHOLD) == threshold
    assert (TRIM_THRESHOLD in library.held, TOP_PAD in library.held) == (threshold is not None,) * 2


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_library_without_mallopt_is_left_alone(monkeypatch):
    monkeypatch.setattr(process_settings, "ctypes", SimpleNamespace(CDLL=lambda name: SimpleNamespace()))
    assert process_settings.keep_freed_memory() is False


HOLES = """
import resource, torch
from recipes.runs.process_settings import keep_freed_memory
keep_freed_memory()
before, kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
for n in range(12):
    table = torch.ones((100 + n) << 18)  # 100 to 111 MiB, each larger than the hole that the last one left
    kept.append(torch.ones(100_000))
    del table
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_large_tables_leave_no_holes() -> None:
    """A hole as large as a table of an LLM (335 MB in bf16) in each step would fill any machine."""
    grown = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 300, f"{grown} MiB for tables of 111"
