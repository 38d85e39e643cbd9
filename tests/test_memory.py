"""What malloc is told: all of it, or nothing that would make it worse than untouched."""

from __future__ import annotations

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
    [(1 << 31, 1 << 30), (32 << 20, 32 << 20), (512 << 10, None)],
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
