"""Activation checkpointing, block by block, the way transformers switches it on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class CheckpointedModule(nn.Module):
    """A stack whose blocks may be recomputed in the backward pass instead of keeping their activations.

    `PreTrainedModel.activation_checkpointing_enable` (earlier `gradient_checkpointing_enable`) finds the flag and sets
    it together with the function that runs a block.
    """

    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Any]

    def run(self, block: nn.Module, *arguments: Any) -> Any:
        """Runs a block; in training with checkpointing on, without keeping what is inside it."""
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(block.__call__, *arguments)
        return block(*arguments)
