"""Frame-level contrast of speech and text in place of a teacher, in the manner of VQ-CTAP (arXiv 2408.05758).

Shapes: B batch, D latent channels, F code frames, W width of the joint space.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tokenizer.precision import full_precision

WIDTH = 128
FIRST_TEMPERATURE, MOST_SCALE = 0.07, 100.0  # as CLIP (arXiv 2103.00020, section 2.5)


class ContrastiveProjection(nn.Module):
    """Semantic latents and characters in one space, and the scale of their similarities; all in fp32.

    It is trained with the tokenizer and kept in its checkpoints, but is no part of the saved tokenizer.

    Args:
        latent_dim: D.
        n_classes: how many characters there are.
    """

    def __init__(self, latent_dim: int, n_classes: int) -> None:
        super().__init__()
        self.speech = nn.Linear(latent_dim, WIDTH)
        self.text = nn.Embedding(n_classes, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / FIRST_TEMPERATURE)))

    def forward(self, quantized: Tensor, characters: Tensor) -> Tensor:
        """Scaled cosine similarities of every frame of (B, D, F) with every frame's character (B, F): (B, F, F)."""
        with full_precision(quantized):
            heard = nn.functional.normalize(self.speech(quantized.float().transpose(1, 2)), dim=-1)
            read = nn.functional.normalize(self.text(characters), dim=-1)
            return self.log_scale.exp().clamp(max=MOST_SCALE) * heard @ read.transpose(1, 2)


def contrastive_loss(similarities: Tensor, characters: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE between the frames of speech and those of text within each item, a mean over items.

    Frames of one character are one text: they share the target evenly, instead of being each other's negatives. Only
    frames of the same item are compared, so that no batch size, accumulation or process changes the loss, and a
    speaker's voice or a room cannot tell the negatives apart.

    Args:
        similarities: (B, F, F) of speech frames with text frames.
        characters: (B, F) classes.
        mask: (B, F) bool, the frames that count; None where all do.

    Returns:
        The loss, log F where the similarities are all alike; and its share between the least that it can be (0) and
        that chance (1), over the whole batch.
    """
    mask = torch.ones_like(characters, dtype=torch.bool) if mask is None else mask
    pairs = mask[:, :, None] & mask[:, None, :]
    same = (characters[:, :, None] == characters[:, None, :]) & pairs
    count = same.sum(-1).clamp_min(1)
    targets = same / count[..., None]
    hidden = similarities.float().masked_fill(~pairs, torch.finfo(torch.float32).min)
    frames = mask.sum(1).clamp_min(1)

    def direction(scores: Tensor) -> Tensor:
        errors = -(targets * scores.log_softmax(-1)).sum(-1)
        return errors.masked_fill(~mask, 0.0).sum(1) / frames

    losses = 0.5 * (direction(hidden) + direction(hidden.transpose(1, 2)))
    least = count.log().masked_fill(~mask, 0.0).sum(1) / frames
    excess = (losses.detach() - least).sum() / (frames.log() - least).sum().clamp_min(1e-6)
    return losses.mean(), excess
