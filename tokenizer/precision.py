"""How far codes computed in a lower precision are those of fp32, so that a run can choose its arithmetic by it.

Shapes: B items, S samples, K books, F frames.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

LOWER = {"bf16": torch.bfloat16, "fp16": torch.float16}
MIN_AGREEMENT = 0.99  # share of frames whose book 0 must be fp32's


def autocast(precision: str, device: str | torch.device) -> contextlib.AbstractContextManager:
    """The context in which a tokenizer computes in `precision`: fp32 as it is, bf16 or fp16 by autocast.

    Quantizer, STFT and look-up stay fp32 inside it: the modules see to that themselves.
    """
    if precision not in LOWER:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, LOWER[precision])


@torch.inference_mode()
def precision_agreement(
    tokenizer: Any, input_values: Tensor, padding_mask: Tensor | None, precision: str
) -> list[float]:
    """The share of valid frames in which each book's code is the one of fp32.

    Args:
        tokenizer: any tokenizer behind the codec protocol.
        input_values: (B, 1, S), right-padded, on the tokenizer's device.
        padding_mask: (B, S), true on each item's samples; None where all are.
        precision: bf16 or fp16; fp32 agrees with itself.

    Returns:
        K shares from 0 to 1, book 0 (semantic) first.
    """
    full = tokenizer.encode(input_values, padding_mask)
    with autocast(precision, input_values.device):
        lower = tokenizer.encode(input_values, padding_mask).audio_codes
    equal = (lower == full.audio_codes) & full.audio_codes_mask[:, None]
    return (equal.sum(dim=(0, 2)) / full.audio_codes_mask.sum()).tolist()
