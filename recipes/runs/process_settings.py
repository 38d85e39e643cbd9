"""Settings of the whole process that make training faster: compiled kernels and freed memory are kept."""

from __future__ import annotations

import ctypes
import os
import sys

CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
KERNELS = 8192  # a step at the published sizes: over 2,048
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # mallopt's numbers, malloc.h
# Larger blocks are mapped and given back, as glibc does by itself: in one heap with small ones the tables of a large
# vocabulary leave holes that the next does not fit (335 MB more each step). Older glibc takes half of a heap, 32 MiB.
_LARGEST_BLOCKS = (64 << 20, 32 << 20)


def keep_compiled_kernels() -> None:
    """Lets oneDNN keep every kernel that a training step of the tokenizer uses.

    oneDNN compiles a kernel for each shape, and by itself keeps the 1,024 last used. An adversarial step goes through
    more than those, in the same order each time, so that every one is dropped just before its turn: in bf16, whose
    kernels take up to 0.2 s to compile, half of the step. To be called before the first tensor is computed; a capacity
    that the environment names stays.
    """
    os.environ.setdefault(CAPACITY, str(KERNELS))


def keep_freed_memory() -> bool:
    """Tells malloc to reuse what tensors give back instead of returning it to the system.

    As it comes, glibc maps every block of more than some megabytes anew and unmaps it when it is freed; on a CPU each
    training step then pays thousands of page faults (10 to 20 % of a small tokenizer's). The peak stays what it was;
    the memory below it stays with the process. Blocks above 64 MiB are left to glibc's way.

    Returns:
        Whether the library took it; elsewhere (macOS, musl) nothing is done.
    """
    if sys.platform != "linux" or (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is None:
        return False
    # The other two end glibc's own tuning: with the first refused they would hold the threshold at its lowest, 128 KiB.
    if not any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST_BLOCKS):
        return False
    return all([mallopt(_TRIM_THRESHOLD, (1 << 31) - 1), mallopt(_TOP_PAD, 1 << 26)])
