"""Keeps compiled kernels for the next step, where oneDNN computes."""

from __future__ import annotations

import os

CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
KERNELS = 8192  # a step at the published sizes: over 2,048


def keep_compiled_kernels() -> None:
    """Lets oneDNN keep every kernel that a training step of the tokenizer uses.

    oneDNN compiles a kernel for each shape, and by itself keeps the 1,024 last used. An adversarial step goes through
    more than those, in the same order each time, so that every one is dropped just before its turn: in bf16, whose
    kernels take up to 0.2 s to compile, half of the step. To be called before the first tensor is computed; a capacity
    that the environment names stays.
    """
    os.environ.setdefault(CAPACITY, str(KERNELS))
