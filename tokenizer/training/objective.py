"""What a codec training step minimises: reconstruction, distillation, quantizer and adversarial losses.

Shapes: B batch, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tokenizer.model.configuration import LMSPTConfig
from tokenizer.model.modeling import LMSPTOutput
from tokenizer.teacher.contrastive import contrastive_loss
from tokenizer.teacher.distillation import DistillationConfig, distillation_losses
from tokenizer.teacher.whisper import SpeechTeacher
from tokenizer.training.discriminator import Discriminator
from tokenizer.training.invariance import InvarianceConfig
from tokenizer.training.losses import LossWeights, MultiScaleMelLoss, generator_losses


@dataclass
class Objective:
    """What the step minimises: mel loss, weights, the frozen teacher (None: not used), what it teaches."""

    weights: LossWeights
    mel: MultiScaleMelLoss
    teacher: SpeechTeacher | None
    distillation_weight: float
    discriminator_start: int = 0
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    probe_weight: float = 0.0
    invariance: InvarianceConfig = field(default_factory=InvarianceConfig)


def loss_weights(objective: Objective) -> dict[str, float]:
    """What each of `codec_losses` counts; those without a weight are only logged."""
    w = objective.weights
    return {
        "mel": w.mel,
        "adversarial": w.adversarial,
        "feature_matching": w.feature_matching,
        "semantic_commitment": w.commitment,
        "acoustic_commitment": w.commitment,
        "semantic_codebook": w.codebook,
        "acoustic_codebook": w.codebook,
        "distillation": objective.distillation_weight,
        "probe": objective.probe_weight,
        "invariance": objective.invariance.weight,
        "semantic_reconstruction": objective.distillation_weight * objective.distillation.semantic_reconstruction,
        "reconstruction": objective.distillation_weight * objective.distillation.reconstruction,
    }


def codec_losses(
    objective: Objective,
    output: LMSPTOutput,
    target: Tensor,
    config: LMSPTConfig,
    discriminator: Discriminator | None,
    projection: nn.Module | None = None,
    semantic_only: Tensor | None = None,
    characters: Tensor | None = None,
) -> dict[str, Tensor]:
    """All losses of the generator, unweighted scalars.

    Args:
        objective: teacher, mel loss and weights.
        output: of the model's forward pass on `target`.
        target: original waveforms (B, 1, S).
        config: the tokenizer's sizes.
        discriminator: None where the adversarial losses are off.
        projection: of the semantic latents, for pooled and contrastive distillation.
        semantic_only: (B,) bool, the items that the main decoder made of book 0 alone.
        characters: (B, F) classes of the frames, for contrastive distillation.
    """
    losses = {
        "mel": objective.mel(output.audio_values, target),
        "semantic_commitment": output.semantic_commitment_loss,
        "acoustic_commitment": output.acoustic_commitment_loss,
        "semantic_codebook": output.semantic_codebook_loss,
        "acoustic_codebook": output.acoustic_codebook_loss,
    }
    if objective.teacher is not None:
        losses |= distillation_losses(
            objective.distillation, objective.teacher, projection, output, target, config, semantic_only
        )
    if objective.distillation.kind == "contrastive":
        characters = characters[:, : output.quantized_semantic.shape[-1]]  # published lengths may lack a last frame
        similarities = projection(output.quantized_semantic, characters)
        losses["distillation"], losses["distillation_share"] = contrastive_loss(
            similarities, characters, output.audio_codes_mask
        )
    if discriminator is not None:
        with discriminator.frozen():
            with torch.no_grad():
                real = discriminator(target)
            fake = discriminator(output.audio_values)
        losses["adversarial"], losses["feature_matching"] = generator_losses(real, fake)
    return losses


def split_real_and_generated(features: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Feature maps (2 B, ...) of B real crops and the B generated ones behind them, parted into (B, ...) of each."""
    pairs = [[layer.chunk(2) for layer in part] for part in features]
    return [[a for a, _ in part] for part in pairs], [[b for _, b in part] for part in pairs]
