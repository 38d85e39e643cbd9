"""Keeps freed memory for the next tensor, where the C library is glibc."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # mallopt's numbers, malloc.h


def keep_freed_memory() -> bool:
    """Tells malloc to reuse what tensors give back instead of returning it to the system.

    As it comes, glibc maps every block of more than some megabytes anew and unmaps it when it is freed; on a CPU each
    training step then pays thousands of page faults (10 to 20 % of a small tokenizer's). The peak stays what it was;
    the memory below it stays with the process.

    Returns:
        Whether the library took it; elsewhere (macOS, musl) nothing is done.
    """
    if sys.platform != "linux" or (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is None:
        return False
    return all([mallopt(_MMAP_THRESHOLD, 1 << 30), mallopt(_TRIM_THRESHOLD, (1 << 31) - 1), mallopt(_TOP_PAD, 1 << 26)])
