"""What the teacher teaches: by resynthesis (LM-SPT), by pooled features (its ablation), or nothing; and the probe.

Shapes: B batch, S samples, S' samples at the auxiliary rate, F code frames, E teacher frames (50 Hz), D latent
channels, W teacher width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from tokenizer.model.configuration import LMSPTConfig
from tokenizer.model.modeling import LMSPTOutput
from tokenizer.precision import full_precision
from tokenizer.teacher.whisper import SAMPLES_PER_ENCODER_FRAME, SpeechTeacher, at_teacher_rate

TEACHER_HZ = 50
Kind = Literal["resynthesis", "pooled", "contrastive", "none"]


@dataclass
class DistillationConfig:
    """How the teacher reaches the semantic book.

    `resynthesis` is LM-SPT's own (arXiv 2506.16738, section 3.2); `pooled` is the feature-level distillation that the
    paper ablates (TTS WER 13.97 against 4.94 at 25 Hz), in the manner of SpeechTokenizer (arXiv 2308.16692) and Mimi
    (arXiv 2410.00037). `contrastive` has no teacher: its targets are the corpus's aligned characters
    (:mod:`tokenizer.teacher.contrastive`).
    """

    kind: Kind = field(
        default="resynthesis",
        metadata={
            "help": "resynthesis: the teacher compares original and resynthesis; pooled: its features, averaged to "
            "the frame rate, are predicted from the semantic latents; contrastive: frames told apart by the aligned "
            "characters of the manifest's column `characters`, without a teacher; none: reconstruction alone"
        },
    )
    probe: bool = field(
        default=False,
        metadata={
            "help": "with pooled, contrastive or none: train the auxiliary decoder on detached semantic codes all the "
            "same, so that an evaluation's `resynthesis` row can be compared (moves nothing else; needs a teacher)"
        },
    )

    semantic_reconstruction: float = field(
        default=0.0,
        metadata={
            "help": "the same loss, with this weight over the distillation's, on what the main decoder makes of book 0 "
            "alone (ours; items of crops.semantic_only): its semantic reconstruction keeps the words and not the "
            "spectrum alone. Moves the main decoder only; costs half a teacher's pass more at crops.semantic_only=0.3"
        },
    )
    reconstruction: float = field(
        default=0.0,
        metadata={
            "help": "the same loss, with this weight, on what the main decoder makes of more books (ours; all other "
            "items). Moves encoders and books too where they are not in `freeze`"
        },
    )

    def __post_init__(self) -> None:
        for name in ("semantic_reconstruction", "reconstruction"):
            weight = getattr(self, name)
            if weight < 0:
                raise ValueError(f"distillation.{name}={weight}: not below 0")
            if weight and self.kind not in ("resynthesis", "none"):
                raise ValueError(
                    f"distillation.{name} goes with kind=resynthesis, whose loss it is, or with kind=none, where the "
                    "teacher then hears the main decoder alone"
                )

    @property
    def probes(self) -> bool:
        """Whether the auxiliary decoder learns beside the distillation; `resynthesis` trains it anyway."""
        return self.probe and self.kind != "resynthesis"

    @property
    def needs_teacher(self) -> bool:
        """Whether there is a teacher at all."""
        return self.kind in ("resynthesis", "pooled") or self.probe or self.hears_reconstructions

    @property
    def hears_reconstructions(self) -> bool:
        """Whether the teacher hears what the main decoder makes."""
        return bool(self.semantic_reconstruction or self.reconstruction)

    @property
    def auxiliary(self) -> Literal["attached", "detached", "skipped"]:
        """How LMSPTModel.forward is to run the auxiliary decoder."""
        if self.kind == "resynthesis":
            return "attached"
        return "detached" if self.probe else "skipped"


def signal_variance(encoding: Tensor, mask: Tensor | None = None) -> Tensor:
    """What an encoding (B, E, D) says, as a scalar: the variance of each channel around its own mean, their mean.

    A constant offset of a channel, of which trained encoders have large ones, says nothing of the speech.

    Args:
        encoding: of the teacher.
        mask: (B, E) bool, the frames that count; None where all do.
    """
    centred = encoding - _mean_over(encoding, mask)
    return _mean_over(centred.square(), mask).mean()


def normalized_mse(encoding: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean square error of an encoding (B, E, D) over `signal_variance` of the wanted one, over the same frames.

    1 is what each channel's mean would score, 0 is perfect. Comparable between teachers, where the error is not.
    """
    error = _mean_over((encoding.detach() - wanted).square(), mask).mean()
    return error / signal_variance(wanted, mask).clamp_min(1e-8)


def _mean_over(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of each channel of (B, E, D) over the frames of a mask (B, E): (D,)."""
    if mask is None:
        return values.mean(dim=(0, 1))
    return values.masked_fill(~mask[..., None], 0.0).sum(dim=(0, 1)) / mask.sum().clamp_min(1)


def resynthesis_distillation(
    teacher: SpeechTeacher,
    target: Tensor,
    resynthesis: Tensor,
    encoding: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Semantic speech-resynthesis distillation (arXiv 2506.16738, section 3.2).

    Args:
        teacher: the frozen encoder.
        target: original waveforms (B, S) at 16 kHz.
        resynthesis: the auxiliary decoder's waveforms (B, S') from semantic codes alone, 16 kHz; the longer is cut.
        encoding: the teacher's of the whole `target` (B, E, D), where it is at hand.
        mask: (B, E) bool, the teacher's frames that hold a recording; None where the whole target is one.

    Returns:
        The MSE between the two encodings, over the teacher's whole window, and the `normalized_mse` over
        the recordings' own frames.
    """
    # A resynthesis ends with its last frame, the original may end inside it.
    samples = min(target.shape[-1], resynthesis.shape[-1])
    with torch.no_grad():
        whole = encoding is not None and samples == target.shape[-1]
        wanted = (encoding if whole else teacher(target[..., :samples])).float()
    made = teacher(resynthesis[..., :samples]).float()
    frames = -(-samples // SAMPLES_PER_ENCODER_FRAME)  # the rest of the window is padding
    mask = None if mask is None else mask[:, :frames]
    return nn.functional.mse_loss(made, wanted), normalized_mse(made[:, :frames], wanted[:, :frames], mask)


class FeatureProjection(nn.Module):
    """Predicts the teacher's features from quantized semantic latents: one linear map D -> W, in fp32.

    It is trained with the tokenizer and kept in its checkpoints, but is no part of the saved tokenizer.
    """

    def __init__(self, latent_dim: int, teacher_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(latent_dim, teacher_width)

    def forward(self, quantized: Tensor) -> Tensor:
        """Maps quantized semantic latents (B, D, F) to predicted features (B, F, W)."""
        with full_precision(quantized):
            return self.linear(quantized.float().transpose(1, 2))


def pool_to_frames(features: Tensor, n_frames: int, config: LMSPTConfig) -> Tensor:
    """Averages teacher features (B, E, W) over the time of each code frame: (B, F, W).

    Each teacher frame counts by how long it overlaps the code frame, in integer arithmetic, so that any ratio of rates
    is exact (50 to 6.25 Hz: the plain mean of 8). A last code frame that the features fill in part is averaged over
    that part.

    Args:
        features: the teacher's hidden states at 50 Hz; those past the last code frame are not read.
        n_frames: F.
        config: for hop and sampling rate, whose ratio is the frame rate.
    """
    weights = _overlaps(features.shape[1], n_frames, config.sampling_rate, config.hop_length, features.device)
    with full_precision(features):  # a mean of targets, which the loss reads in fp32
        return weights @ features.float()


@lru_cache(maxsize=16)
def _overlaps(n_features: int, n_frames: int, sampling_rate: int, hop: int, device: torch.device) -> Tensor:
    """What each teacher frame counts in each code frame, (F, E) in fp32; kept, because a copy to a GPU waits for it."""
    with torch.inference_mode(False):
        # time in units of 1 / (50 * sampling_rate) s: both kinds of frame begin at integers
        teacher_frames = torch.arange(n_features) * sampling_rate
        code_frames = torch.arange(n_frames)[:, None] * (TEACHER_HZ * hop)
        starts = torch.maximum(code_frames, teacher_frames)
        ends = torch.minimum(code_frames + TEACHER_HZ * hop, teacher_frames + sampling_rate)
        overlap = (ends - starts).clamp_min(0).double()
        # rounding when resampling may leave less than a sample of a last code frame: it takes the nearest features
        overlap[overlap.sum(1) == 0, -1] = 1.0
        return (overlap / overlap.sum(1, keepdim=True)).to(device, torch.float32)


def pooled_distillation(predicted: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Feature-level distillation: MSE of predicted and pooled features (B, F, W), a mean over items.

    Args:
        predicted: by FeatureProjection.
        target: by `pool_to_frames`.
        mask: (B, F) bool, the frames that count; None where all do.

    Returns:
        The MSE, and the error over the target's variance, in the frames that count (`normalized_mse`).
    """
    target = target.float()
    errors = (predicted - target).square().mean(dim=-1)
    mask = torch.ones_like(errors, dtype=torch.bool) if mask is None else mask
    loss = (errors.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp_min(1)).mean()
    return loss, normalized_mse(predicted, target, mask)


def teacher_frames(lengths: Tensor, n_features: int, sampling_rate: int) -> Tensor:
    """Which of the teacher's frames begin within each item's `lengths` (B,) samples: (B, E) bool."""
    starts = torch.arange(n_features, device=lengths.device) * sampling_rate
    return starts < lengths[:, None] * TEACHER_HZ


def distillation_losses(
    distillation: DistillationConfig,
    teacher: SpeechTeacher,
    projection: nn.Module | None,
    output: LMSPTOutput,
    target: Tensor,
    config: LMSPTConfig,
    semantic_only: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms that a teacher gives, unweighted: `distillation` of the kind in use and `probe`, each with a `_share`;
    `semantic_reconstruction` and `reconstruction` where they have a weight.

    Args:
        distillation: which terms.
        teacher: the frozen encoder.
        projection: FeatureProjection, for `pooled`.
        output: of the tokenizer: `auxiliary_values` (B, 1, S') for resynthesis and probe, `quantized_semantic`
            (B, D, F) for pooled; `audio_values` (B, 1, S') for what the main decoder makes, None where that is not
            asked for; `audio_codes_mask` (B, F), None where every crop is whole.
        target: original waveforms (B, 1, S).
        config: the tokenizer's sizes.
        semantic_only: (B,) bool, the items that the main decoder made of book 0 alone; None where there are none.
    """
    losses: dict[str, Tensor] = {}
    resampled = at_teacher_rate(target, config.sampling_rate)
    with torch.no_grad():
        wanted = teacher(resampled)
    if distillation.kind == "pooled":
        quantized = output.quantized_semantic
        losses["distillation"], losses["distillation_share"] = pooled_distillation(
            projection(quantized), pool_to_frames(wanted, quantized.shape[-1], config), output.audio_codes_mask
        )
    if distillation.auxiliary != "skipped":
        name = "probe" if distillation.probes else "distillation"
        resynthesis = at_teacher_rate(output.auxiliary_values, config.auxiliary_sampling_rate)
        mask = output.audio_codes_mask
        if mask is not None:
            mask = teacher_frames(mask.sum(1) * config.hop_length, wanted.shape[1], config.sampling_rate)
        losses[name], losses[f"{name}_share"] = resynthesis_distillation(teacher, resampled, resynthesis, wanted, mask)
    if semantic_only is None:
        semantic_only = torch.zeros(len(target), dtype=torch.bool, device=target.device)
    chosen = {
        name: items
        for name, items in (("semantic_reconstruction", semantic_only), ("reconstruction", ~semantic_only))
        if getattr(distillation, name)
    }
    if chosen and output.audio_values is not None:
        made = at_teacher_rate(output.audio_values, config.sampling_rate)
        errors = _encoding_errors(teacher, made, wanted, torch.stack(list(chosen.values())).any(0))
        # Over the whole batch, so that micro-batches of equal size add up to it, whichever items they hold.
        losses |= {name: (errors * items).mean() for name, items in chosen.items()}
    return losses


def _encoding_errors(teacher: SpeechTeacher, made: Tensor, wanted: Tensor, chosen: Tensor) -> Tensor:
    """MSE between the encodings of waveforms (B, S') and those `wanted` (B, E, D) of the chosen items; 0 for others.

    Returns:
        (B,), in the graph of `made` even where none is chosen: processes reduce the same gradients.
    """
    errors = made.flatten(1).sum(1).float() * 0.0
    items = chosen.nonzero()[:, 0]
    if not len(items):
        return errors
    encoded = teacher(made[items]).float()
    frames = min(encoded.shape[1], wanted.shape[1])
    squares = (encoded[:, :frames] - wanted[items][:, :frames].float()).square()
    return errors.index_add(0, items, squares.mean(dim=(1, 2)))


def clip_groups(model: nn.Module, projection: nn.Module | None, probes: bool) -> list[list[nn.Parameter]]:
    """The generator's parameters in the groups whose gradient norms are clipped: the probe's decoder apart.

    In one group, the probe's gradients would shorten those of the tokenizer: it would no longer be a mere listener.
    """
    own = {id(p) for p in model.auxiliary_decoder.parameters()} if probes else set()
    rest = [p for p in model.parameters() if id(p) not in own]
    rest += [] if projection is None else projection.parameters()
    return [rest, [p for p in model.parameters() if id(p) in own]] if own else [rest]
