"""The weight of a distillation loss where none is configured: what suits the teacher, since a weight means something
for one teacher alone.

An MSE is divided by the variance of its target's signal, so that every teacher's term weighs as much as any other's.

Shapes: B batch, S samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from tokenizer.model.configuration import LMSPTConfig
from tokenizer.teacher.distillation import pool_to_frames, signal_variance, teacher_frames
from tokenizer.teacher.whisper import at_teacher_rate

PER_VARIANCE = 100.0
CROPS = 32  # the first ones are measured


def default_weight(kind: str, variances: dict[str, float], crop_s: float, pad_to_seconds: float | None = None) -> float:
    """The weight of a term over the variance of its target.

    Args:
        kind: `pooled`, or one whose target is the teacher's encoding (`resynthesis`, `probe`).
        variances: of `target_variances`.
        crop_s: seconds of a crop.
        pad_to_seconds: the teacher's window. Silence that pads it adds terms to the mean that cost nothing: the weight
            makes up for them. Pooled features past the crop are left out.
    """
    if kind == "pooled":
        return PER_VARIANCE / variances["pooled_variance"]
    return max(1.0, (pad_to_seconds or 0.0) / crop_s) * PER_VARIANCE / variances["variance"]


@torch.no_grad()
def target_variances(
    crops: Dataset[dict[str, Tensor]], teacher: nn.Module, sizes: LMSPTConfig, pooled: bool
) -> dict[str, float]:
    """The `signal_variance` of the teacher's encoding of the first crops, and that of its features pooled to frames.

    Both without what pads a short recording or the teacher's window.

    Args:
        crops: items of `input_values` (1, S) and `padding_mask` (S,).
        teacher: waveforms (B, S) at 16 kHz to hidden states.
        sizes: of the tokenizer.
        pooled: whether the second is measured.

    Returns:
        `variance`, and where it is measured `pooled_variance`.
    """
    batch = next(iter(DataLoader(Subset(crops, range(min(CROPS, len(crops)))), CROPS)))
    device = next(teacher.parameters()).device
    encoding = teacher(at_teacher_rate(batch["input_values"].to(device), sizes.sampling_rate)).float()
    ends = batch["padding_mask"].sum(1).to(device)
    frames = teacher_frames(ends, encoding.shape[1], sizes.sampling_rate)
    found = {"variance": float(signal_variance(encoding, frames))}
    if pooled:
        starts = torch.arange(0, batch["padding_mask"].shape[1], sizes.hop_length, device=device)
        features = pool_to_frames(encoding, len(starts), sizes)
        found["pooled_variance"] = float(signal_variance(features, starts < ends[:, None]))
    return found
