"""Scores of the codec on the same crops of the valid split each time.

Shapes: B crops, S samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.modeling import LMSPTModel
from tokenizer.objective import Objective
from tokenizer.teacher import at_teacher_rate, resynthesis_distillation


@torch.no_grad()
def validate(model: LMSPTModel, crops: Tensor, objective: Objective) -> dict[str, float]:
    """Mel losses of reconstruction and semantic reconstruction, the resynthesis' distillation share, use of the books.

    Args:
        model: the tokenizer.
        crops: (B, 1, S), the same each time.
        objective: for its mel loss and teacher.
    """
    model.eval()
    codes, mels, semantic_mels, shares = [], [], [], []
    for chunk in crops.split(16):
        encoded = model.encode(chunk).audio_codes
        lengths = torch.full((len(chunk),), chunk.shape[-1])
        mels.append(objective.mel(model.decode(encoded, lengths).audio_values, chunk).item())
        semantic_mels.append(objective.mel(model.decode(encoded[:, :1], lengths).audio_values, chunk).item())
        if objective.teacher is not None:
            heard = at_teacher_rate(model.resynthesize(encoded).audio_values, model.config.auxiliary_sampling_rate)
            wanted = at_teacher_rate(chunk, model.config.sampling_rate)
            shares.append(resynthesis_distillation(objective.teacher, wanted, heard)[1].item())
        codes.append(encoded)
    model.train()
    metrics = {"valid/mel": mean(mels), "valid/mel_semantic": mean(semantic_mels)}
    if shares:
        metrics["valid/distillation_share"] = mean(shares)
    books = torch.cat(codes).transpose(0, 1).flatten(1)
    for book in (0, 1)[: len(books)]:
        counts = torch.bincount(books[book]).float()
        probabilities = counts[counts > 0] / counts.sum()
        metrics[f"valid/perplexity_book_{book}"] = float((-(probabilities * probabilities.log()).sum()).exp())
    return metrics


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
