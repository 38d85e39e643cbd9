"""The same semantic codes for a crop that came louder, softer or noisy: a loss that asks for them.

After "Augmentation Invariant Discrete Representation for Generative Spoken Language Modeling" (Gat et al. 2022, arXiv
2209.15483), which trains a quantizer to give a changed recording the tokens that it gives the recording as it was.
There the two are aligned by CTC, since changes of speed are among them; here the changes keep every frame in its place,
and the loss is a cross-entropy for each frame.

Shapes: B crops, F frames, E dimensions of the semantic book, N its entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.data.augmentation import AugmentationConfig
from tokenizer.precision import full_precision


@dataclass
class InvarianceConfig:
    """Whether the semantic codes are to stay as they are under changes of the waveform, and under which."""

    weight: float = field(
        default=0.0,
        metadata={"help": "of the cross-entropy between the codes of a crop and those of its changed copy; 0: off"},
    )
    temperature: float = field(
        default=0.1, metadata={"help": "divides the cosines between latents and entries: small asks for wider margins"}
    )
    changes: AugmentationConfig = field(
        default_factory=lambda: AugmentationConfig(speed=0.0, noise_probability=0.7, noise_snr_db=(10.0, 30.0)),
        metadata={"help": "what is changed, as augmentation; speed stays 0, or frames would hold other sounds"},
    )

    def __post_init__(self) -> None:
        problems = []
        if self.weight < 0:
            problems.append(f"weight={self.weight}: must not be negative; 0 turns it off")
        if self.temperature <= 0:
            problems.append(f"temperature={self.temperature}: must be above 0")
        if self.changes.speed:
            problems.append(f"changes.speed={self.changes.speed}: must be 0, or a frame would hold another sound")
        if problems:
            raise ValueError("invariance: " + "; ".join(problems))


def invariance_loss(
    projected: Tensor, entries: Tensor, codes: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the changed crops' latents with the codes of the crops as they were, a mean over items.

    The entries are not moved by it: the book follows the crops as they were.

    Args:
        projected: latents (B, F, E) of the changed crops, as the semantic book looks them up.
        entries: of that book (N, E).
        codes: (B, F) of the crops as they were; -1 where the mask is false.
        mask: (B, F) bool, the frames that count.
        temperature: as `InvarianceConfig`.

    Returns:
        The loss, and the share of the frames that keep their code.
    """
    with full_precision(projected):
        cosines = F.normalize(projected.float(), dim=-1) @ F.normalize(entries.detach().float(), dim=-1).T
        each = F.cross_entropy((cosines / temperature).transpose(1, 2), codes.clamp(min=0), reduction="none")
        loss = (each.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()
        kept = (cosines.argmax(dim=-1) == codes) & mask
        return loss, kept.sum() / mask.sum().clamp(min=1).to(torch.float32)
