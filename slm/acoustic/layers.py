"""What the stages of every objective share: a transformer over frames that reads in both directions.

Shapes: B items, T frames (a prompt's, then a target's, then padding), D width, H heads. `prompt` and `frames` (B, T)
bool mark the voice's frames and all that are no padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from slm.acoustic.configuration import AcousticConfig


@dataclass
class AcousticOutput(ModelOutput):
    """The loss, averaged over all that is to be predicted."""

    loss: Tensor | None = None


class AcousticLayer(nn.Module):
    """Attention over all frames with rotary positions, then a gated feed-forward part; norms in front of both."""

    def __init__(self, config: AcousticConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, frames: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, D) to the same; no frame reads padding."""
        batch, length, width = x.shape
        parts = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(
            _rotate(query, cos, sin), _rotate(key, cos, sin), value, attn_mask=frames[:, None, None]
        )
        x = x + self.dropout(self.attention_out(read.transpose(1, 2).reshape(batch, length, width)))
        gate, up = self.gate_up(self.feed_forward_norm(x)).chunk(2, dim=-1)
        return x + self.dropout(self.down(F.silu(gate) * up))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of (B, H, T, d), d even."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class FrameTransformer(PreTrainedModel):
    """The layers of a stage; a subclass makes vectors of what it knows of each frame, and reads the layers' output."""

    config_class = AcousticConfig
    base_model_prefix = "acoustic"
    main_input_name = "audio_codes"
    _no_split_modules = ["AcousticLayer"]

    def add_layers(self) -> None:
        """Makes the layers; a subclass's `__init__` calls it where their random weights are to be drawn."""
        config = self.config
        self.part = nn.Embedding(2, config.hidden_size)  # target, prompt
        self.layers = nn.ModuleList(AcousticLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def through_layers(self, x: Tensor, prompt: Tensor, frames: Tensor) -> Tensor:
        """(B, T, D) to the same; no frame reads padding."""
        x = x + self.part(prompt.long())
        cos, sin = _rotations(x.shape[1], self.config.hidden_size // self.config.heads // 2, x.device)
        for layer in self.layers:
            x = layer(x, frames, cos, sin)
        return self.norm(x)


def _rotations(length: int, half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, half) of positions 0, 1, ..."""
    rates = 10_000.0 ** (-torch.arange(half, device=device) / half)
    angles = torch.arange(length, device=device)[:, None] * rates
    return angles.cos(), angles.sin()
