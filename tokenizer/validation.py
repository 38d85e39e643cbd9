"""Scores of the codec on the same crops of the valid split each time.

Shapes: B crops, S samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenizer.code_use import CodeCounts
from tokenizer.distillation import distillation_losses
from tokenizer.modeling import LMSPTModel, LMSPTOutput
from tokenizer.objective import Objective


@torch.no_grad()
def validate(
    model: LMSPTModel, crops: Tensor, objective: Objective, projection: nn.Module | None = None
) -> dict[str, float]:
    """Mel losses of reconstruction and semantic reconstruction, the shares of teacher and probe, use of the books.

    Args:
        model: the tokenizer.
        crops: (B, 1, S), the same each time.
        objective: for its mel loss, teacher and kind of distillation.
        projection: of pooled distillation.
    """
    model.eval()
    codes, mels, semantic_mels, taught = [], [], [], []
    for chunk in crops.split(16):
        encoded = model.encode(chunk).audio_codes
        lengths = torch.full((len(chunk),), chunk.shape[-1])
        mels.append(objective.mel(model.decode(encoded, lengths).audio_values, chunk).item())
        semantic_mels.append(objective.mel(model.decode(encoded[:, :1], lengths).audio_values, chunk).item())
        if objective.teacher is not None:
            output = LMSPTOutput(quantized_semantic=model.quantizer.look_up(encoded[:, :1], None).transpose(1, 2))
            if objective.distillation.auxiliary != "skipped":
                output.auxiliary_values = model.resynthesize(encoded).audio_values
            taught.append(
                distillation_losses(objective.distillation, objective.teacher, projection, output, chunk, model.config)
            )
        codes.append(encoded)
    model.train()
    metrics = {"valid/mel": mean(mels), "valid/mel_semantic": mean(semantic_mels)}
    for name in ("distillation_share", "probe_share"):
        if taught and name in taught[0]:
            metrics[f"valid/{name}"] = mean([losses[name].item() for losses in taught])
    counts = CodeCounts()
    for part in codes:
        counts.add(part, model.config.codebook_sizes)
    for book, use in enumerate(counts.take()):
        metrics |= {f"valid/perplexity_book_{book}": use.perplexity, f"valid/used_book_{book}": use.used}
    return metrics


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
