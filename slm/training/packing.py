"""Whether a model keeps packed sequences apart: what a row of several sequences relies on, asked of the model itself.

Shapes: R rows, L tokens of a sequence, V ids; `input_ids`, `position_ids` (R, 2L) packed, (1, L) alone; logits
(R, L, V).

transformers' attention tells sequences apart by position ids that start again. State-space and convolution layers
(hybrid models) and a model's own remote code may read on across the border, with no error.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

LONGEST = 16  # tokens of each sequence: what leaks shows at the border
# Largest difference that rounding explains, as a share of the logits' spread: other shapes, other order of sums.
ROUNDING = {torch.float32: 1e-2, torch.float64: 1e-2}
HALF_ROUNDING = 0.15


def packing_leaks(model: nn.Module, first: np.ndarray, second: np.ndarray, rows: int = 2) -> bool:
    """Whether the second sequence's logits depend on the first's lying before it in the row.

    Modes of all modules are put back and no random stream moves, so a training goes on as if this had not been.

    Args:
        model: A causal LM or a PeftModel around one, not sharded.
        first: (L,) ids; those past LONGEST are left out.
        second: (L',) ids likewise.
        rows: Rows of the packed batch: attention may keep apart what lies in one and not what lies in several.
    """
    first, second = first[:LONGEST], second[:LONGEST]
    weight = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    devices = [weight.device] if weight.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            alone = _logits(model, [second], weight.device)
            packed = _logits(model, [first, second], weight.device, rows)[len(first) :]
    finally:
        for module, mode in modes.items():
            module.training = mode
    # The worst position: a short convolution forgets within a few tokens.
    error = (packed - alone).square().mean(-1).sqrt().max()
    spread = (alone - alone.mean(-1, keepdim=True)).square().mean().sqrt()
    return bool(error > ROUNDING.get(weight.dtype, HALF_ROUNDING) * spread)


def _logits(model: nn.Module, sequences: list[np.ndarray], device: torch.device, rows: int = 1) -> torch.Tensor:
    """(sum of L, V) fp32 logits of the last of equal rows of sequences, called just as the training calls the model."""
    ids = torch.from_numpy(np.concatenate(sequences).astype(np.int64))[None].to(device)
    positions = torch.from_numpy(np.concatenate([np.arange(len(ids)) for ids in sequences]))[None].to(device)
    ids, positions = ids.expand(rows, -1), positions.expand(rows, -1)
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits[-1].float()
