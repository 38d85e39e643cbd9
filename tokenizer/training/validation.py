"""Scores of the codec on the same crops of the valid split each time.

Shapes: B crops, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenizer.model.code_use import CodeCounts, count_codes
from tokenizer.model.modeling import LMSPTModel, LMSPTOutput
from tokenizer.teacher.distillation import distillation_losses, resynthesis_distillation
from tokenizer.teacher.whisper import at_teacher_rate
from tokenizer.training.objective import Objective


@torch.no_grad()
def validate(
    model: LMSPTModel, batches: Sequence[Tensor], objective: Objective, projection: nn.Module | None = None
) -> dict[str, float]:
    """Mel losses of reconstruction and semantic reconstruction, `normalized_mse` of teacher and probe, use of books.

    Args:
        model: the tokenizer.
        batches: of crops of one length, each (B, 1, S), the same each time, as `validation_crops` gives them.
        objective: for its mel loss, teacher and kind of distillation.
        projection: of pooled distillation.

    Returns:
        Means over crops, each counting the same.
    """
    model.eval()
    sums: dict[str, float] = {}
    counts, n_crops = CodeCounts(), sum(map(len, batches))
    for batch in batches:
        batch = batch.to(model.device)
        codes = model.encode(batch).audio_codes
        made = {
            "reconstruction": _reconstruct(model, codes, batch),
            "semantic_reconstruction": _reconstruct(model, codes[:, :1], batch),
        }
        scores = {
            "mel": objective.mel(made["reconstruction"], batch),
            "mel_semantic": objective.mel(made["semantic_reconstruction"], batch),
        }
        if objective.teacher is not None:
            output = LMSPTOutput(quantized_semantic=model.quantizer.look_up(codes[:, :1], None).transpose(1, 2))
            if objective.distillation.auxiliary != "skipped":
                output.auxiliary_values = model.resynthesize(codes).audio_values
            taught = distillation_losses(
                objective.distillation, objective.teacher, projection, output, batch, model.config
            )
            scores |= {name: taught[name] for name in ("distillation_share", "probe_share") if name in taught}
            for name, waveforms in made.items():
                if getattr(objective.distillation, name):
                    heard = [at_teacher_rate(w, model.config.sampling_rate) for w in (batch, waveforms)]
                    scores[f"{name}_share"] = resynthesis_distillation(objective.teacher, *heard)[1]
        for name, value in scores.items():
            sums[name] = sums.get(name, 0.0) + len(batch) * value.item()
        counts.add(count_codes(codes, model.config.codebook_sizes))
    model.train()
    metrics = {f"valid/{name}": total / n_crops for name, total in sums.items()}
    for book, use in enumerate(counts.take()):
        metrics |= {f"valid/perplexity_book_{book}": use.perplexity, f"valid/used_book_{book}": use.used}
    return metrics


def _reconstruct(model: LMSPTModel, codes: Tensor, crops: Tensor) -> Tensor:
    """What the main decoder makes of codes, as long as the crops (B, 1, S).

    Codes come in whole frames, and without `exact_lengths` in so many as the convolutions fill, which may be too few.
    """
    samples = model.decode(codes).audio_values[..., : crops.shape[-1]]
    return nn.functional.pad(samples, (0, crops.shape[-1] - samples.shape[-1]))
