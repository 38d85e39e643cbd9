"""Transformer parts of the text-aligned model, from torch's own layers, with norms in front.

Shapes: B items, T positions, L positions of what is read beside, D width; masks (B, T) bool, false in padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slm.text_aligned.configuration import TextAlignedConfig


def _settings(config: TextAlignedConfig) -> dict[str, object]:
    return {
        "d_model": config.hidden_size,
        "nhead": config.heads,
        "dim_feedforward": config.intermediate_size,
        "dropout": config.dropout,
        "activation": "gelu",
        "batch_first": True,
        "norm_first": True,
    }


class Positions(nn.Module):
    """Learnt positions, added."""

    def __init__(self, config: TextAlignedConfig, longest: int) -> None:
        super().__init__()
        self.table = nn.Embedding(longest, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same, T no more than the table has."""
        return self.dropout(x + self.table.weight[: x.shape[1]])


class Reader(nn.Module):
    """Layers that read a sequence in both directions."""

    def __init__(self, config: TextAlignedConfig, n_layers: int, longest: int) -> None:
        super().__init__()
        self.positions = Positions(config, longest)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(**_settings(config)) for _ in range(n_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> list[Tensor]:
        """(B, T, D) -> what the layers read and what each makes of it, `n_layers` + 1 of (B, T, D), the last normed."""
        states = [self.positions(x)]
        for layer in self.layers:
            states.append(layer(states[-1], src_key_padding_mask=~mask))
        return [*states[:-1], self.norm(states[-1])]


class CausalDecoder(nn.Module):
    """Layers that read a sequence from its beginning on, and all of another one."""

    def __init__(self, config: TextAlignedConfig, longest: int) -> None:
        super().__init__()
        self.positions = Positions(config, longest)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(**_settings(config)) for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """(B, T, D), beside it memory (B, L, D) and its mask (B, L) -> (B, T, D)."""
        length = x.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        x = self.positions(x)
        for layer in self.layers:
            x = layer(x, memory, tgt_mask=later, memory_key_padding_mask=~memory_mask)
        return self.norm(x)
