"""How one of several scores is drawn: what they go through before, and the noise whose sum's maximum is a draw.

Shapes: B rows, C scores of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def warpers(temperature: float, top_k: int = 0, top_p: float = 1.0) -> list[LogitsProcessor]:
    """What scores go through before one is drawn.

    Args:
        temperature: Above 0.
        top_k: Draw from the k likeliest; 0 for all.
        top_p: Draw from the likeliest that make up this share.
    """
    found: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
    if top_k:
        found.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        found.append(TopPLogitsWarper(top_p))
    return found


def gumbel_noise(like: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Noise of the shape of scores (B, C), each row's from its own generator."""
    uniform = torch.stack([torch.rand(like.shape[1], generator=generator) for generator in generators])
    return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7))).to(like)
