"""Whether a model keeps packed sequences apart: what a row of several sequences relies on, asked of the model itself.

Shapes: R rows, L tokens of a sequence, V ids; `input_ids`, `position_ids` (R, 2L) packed, (1, L) alone; logits
(R, L, V).

transformers' attention tells sequences apart by position ids that start again. State-space and convolution layers
(hybrid models) and a model's own remote code may read on across the border, with no error.

A plan asks it of a copy of the architecture with few layers and random weights, the training of the model itself.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from slm.training.config import TrainingError

LONGEST = 16  # tokens of each sequence: what leaks shows at the border
# Largest difference that rounding explains, as a share of the logits' spread: other shapes, other order of sums.
ROUNDING = {torch.float32: 1e-2, torch.float64: 1e-2}
HALF_ROUNDING = 0.15
MOST_PARAMETERS = 300_000_000  # of a copy: some seconds and a GiB
COPY_ROWS = 64  # of its vocabulary


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


def refuse_leaks(model: nn.Module) -> TrainingError:
    """What is said of a model that reads across the border."""
    return TrainingError(
        f"{type(model).__name__} does not keep packed sequences apart: the second of a row "
        "gives other logits than alone, so it would learn from what it cannot know. Set training.pack_length=0 (a "
        "row for each sequence), or take a model whose layers are all attention, in transformers' own code (Qwen2, "
        "Llama, ...)"
    )


def check_architecture(skeleton: PreTrainedModel) -> None:
    """Asks it of an architecture, which needs no weights; one that cannot be copied small is left to the training.

    Args:
        skeleton: The model on the meta device, with the attention that it will have.

    Raises:
        TrainingError: It reads across the borders of packed sequences.
    """
    attention = skeleton.config._attn_implementation
    if "flash" in attention:  # asked of a GPU alone
        return
    try:
        config = _few_layers(skeleton.config)
        with torch.device("meta"):
            size = sum(p.numel() for p in type(skeleton)._from_config(config).parameters())
        if size > MOST_PARAMETERS:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = type(skeleton)._from_config(config, attn_implementation=attention, dtype=torch.float32)
            with torch.no_grad():
                for parameter in small.parameters():
                    # As large as trained ones: with those of a new model hardly anything gets through a convolution.
                    if parameter.ndim > 1:
                        parameter.normal_(0, 2 / math.sqrt(parameter[0].numel()))
        ids = np.arange(1, 1 + 2 * LONGEST)
        leaks = packing_leaks(small, ids[:LONGEST], ids[LONGEST:])
    except Exception:  # noqa: BLE001 - each architecture has errors of its own, and the training asks again
        return
    if leaks:
        raise refuse_leaks(skeleton)


def _few_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same with few rows, and as few layers as hold one of each kind."""
    config = copy.deepcopy(config)
    sizes = config.get_text_config()
    layers, kinds = sizes.num_hidden_layers, getattr(sizes, "layer_types", None) or []
    few = min(layers, max([2, *(1 + kinds.index(kind) for kind in set(kinds))]))
    for name, value in list(vars(sizes).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(sizes, name, value[:few])
    sizes.num_hidden_layers, sizes.vocab_size, sizes.pad_token_id = few, COPY_ROWS, None
    return config


def _logits(model: nn.Module, sequences: list[np.ndarray], device: torch.device, rows: int = 1) -> torch.Tensor:
    """(sum of L, V) fp32 logits of the last of equal rows of sequences, called just as the training calls the model."""
    ids = torch.from_numpy(np.concatenate(sequences).astype(np.int64))[None].to(device)
    positions = torch.from_numpy(np.concatenate([np.arange(len(ids)) for ids in sequences]))[None].to(device)
    ids, positions = ids.expand(rows, -1), positions.expand(rows, -1)
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits[-1].float()
