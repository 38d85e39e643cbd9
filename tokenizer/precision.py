"""What fp32 means, and how far codes computed in a lower precision are those of fp32.

Shapes: B items, S samples, K books, F frames.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

LOWER = {"bf16": torch.bfloat16, "fp16": torch.float16}
MIN_AGREEMENT = 0.99  # fraction of frames whose book 0 must be fp32's


class exact_fp32(contextlib.ContextDecorator):  # noqa: N801 - used like a function
    """Inside, fp32 is fp32: no TF32 on a GPU, no bf16 on a CPU; afterwards torch's switches stand as they did.

    cuDNN computes fp32 convolutions in TF32 (10 bits of mantissa) unless it is told not to, and
    `torch.set_float32_matmul_precision` extends that to products. Codes near a border then differ from those of
    another machine under one and the same fingerprint. The switches are the process's: threads that are inside at once
    share them, the last one out sets them back. Also a decorator: `@exact_fp32()`.
    """

    _lock = threading.Lock()
    _inside = 0
    _before: list[tuple[Callable[[Any], None], Any]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not exact_fp32._inside:
                exact_fp32._before = [(write, _read(read)) for read, write, _ in _switches()]
                for _, write, exact in _switches():
                    write(exact)
            exact_fp32._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            exact_fp32._inside -= 1
            if not exact_fp32._inside:
                for write, value in exact_fp32._before:
                    if value is not None:
                        write(value)


@cache
def _switches() -> list[tuple[Callable[[], Any], Callable[[Any], None], Any]]:
    """How each switch is read and written, and its value for exact fp32.

    The older ones come first: to write one writes the newer ones (since torch 2.9) that it stands for, and torch raises
    where an older one is read that contradicts them.
    """

    def of(module: Any, name: str, exact: Any) -> tuple[Callable[[], Any], Callable[[Any], None], Any]:
        return (lambda: getattr(module, name)), (lambda value: setattr(module, name, value)), exact

    backends = torch.backends
    found = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        of(backends.cudnn, "allow_tf32", False),
    ]
    if hasattr(backends.cudnn, "conv"):
        operations = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
        operations += (backends.mkldnn.conv, backends.mkldnn.rnn, backends.mkldnn.matmul)
        found += [of(operation, "fp32_precision", "ieee") for operation in operations]
    return found


def _read(read: Callable[[], Any]) -> Any:
    """A switch's value; None for an older one that contradicts the newer ones somebody set."""
    try:
        return read()
    except RuntimeError:
        return None


def autocast(precision: str, device: str | torch.device) -> contextlib.AbstractContextManager:
    """The context in which a tokenizer computes in `precision`: fp32 as it is, bf16 or fp16 by autocast.

    Quantizer, STFT and look-up stay fp32 inside it: the modules see to that themselves, and to exact fp32 in all that
    encodes and decodes.
    """
    if precision not in LOWER:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, LOWER[precision])


def working_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """In which precision a layer with this weight multiplies: autocast's, or the weight's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def without_autocast(x: Tensor) -> torch.autocast:
    """Context in which autocast is off on x's device: enough where no product or convolution is computed."""
    return torch.autocast(x.device.type, enabled=False)


@contextlib.contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """Context in which what is computed on x's device is fp32, exactly: mel, quantizers, losses."""
    with without_autocast(x), exact_fp32():
        yield


@torch.inference_mode()
def precision_agreement(
    tokenizer: Any, input_values: Tensor, padding_mask: Tensor | None, precision: str
) -> list[float]:
    """The fraction of valid frames in which each book's code is the one of fp32.

    Args:
        tokenizer: any tokenizer behind the codec protocol.
        input_values: (B, 1, S), right-padded, on the tokenizer's device.
        padding_mask: (B, S), true on each item's samples; None where all are.
        precision: bf16 or fp16; fp32 agrees with itself.

    Returns:
        K fractions from 0 to 1, book 0 (semantic) first.
    """
    full = tokenizer.encode(input_values, padding_mask)
    with autocast(precision, input_values.device):
        lower = tokenizer.encode(input_values, padding_mask).audio_codes
    equal = (lower == full.audio_codes) & full.audio_codes_mask[:, None]
    return (equal.sum(dim=(0, 2)) / full.audio_codes_mask.sum()).tolist()
