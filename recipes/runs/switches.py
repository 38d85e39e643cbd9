"""The switches of a tokenizer training that are no sizes: who teaches and what, at which weight, and what is frozen."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from recipes.config import ConfigError
from recipes.runs.discriminators import discriminator_file
from recipes.runs.runtime import RunFolder, atomic_write_text, log
from tokenizer.data.crops import TrainingCrops
from tokenizer.model.configuration import LMSPTConfig
from tokenizer.model.modeling import LMSPTModel
from tokenizer.teacher.distillation import FeatureProjection, pool_to_frames, teacher_frames
from tokenizer.teacher.whisper import SpeechTeacher, TeacherConfig, at_teacher_rate, signal_variance, teacher_width
from tokenizer.training.discriminator import Discriminator
from tokenizer.training.surgery import take_discriminators

if TYPE_CHECKING:
    from recipes.commands.train_tokenizer import Config

DISTILLATION_PER_VARIANCE = 100.0
VARIANCE_CROPS = 32
SIZES = ("periods", "fft_sizes", "period_channels", "band_channels")  # keys that decide a discriminator's tensors


def teacher_config(config: Config) -> TeacherConfig | None:
    """The teacher to load, None where nothing hears it.

    Raises:
        ConfigError: if one is needed and none is given.
    """
    if not config.distillation.needs_teacher:
        return None
    if config.teacher is None:
        probe = " with distillation.probe" if config.distillation.probes else ""
        raise ConfigError(
            f"distillation.kind={config.distillation.kind}{probe} needs a teacher, and teacher is null: give "
            "teacher.name=..., or take distillation.kind=none with distillation.probe=false"
        )
    return config.teacher


def start_discriminators(config: Config, discriminator: Discriminator | None) -> None:
    """Fills the discriminators with those of `init_from`.

    Raises:
        ConfigError: there is nothing to take them from or to put them in, or they are of other sizes.
    """
    if config.init_from is None or discriminator is None:
        missing = "init_from" if config.init_from is None else "discriminator.enabled=true"
        raise ConfigError(f"init_discriminators=true needs {missing}: it starts the discriminators from init_from's")
    file, made = discriminator_file(config.init_from)
    try:
        take_discriminators(discriminator, file)
    except ValueError as error:
        now = dataclasses.asdict(config.discriminator)
        keys = [f"discriminator.{key}={json.dumps(made[key])}" for key in SIZES if made.get(key, now[key]) != now[key]]
        sizes = f"set {' '.join(keys)} as there" if keys else "set discriminator.* as there"
        raise ConfigError(
            f"init_discriminators: {error}; {sizes}, or init_discriminators=false to start anew"
        ) from None
    if made.get("padding", "zeros") != config.discriminator.padding:
        log.warning("the discriminators of %s were trained with discriminator.padding=%s", file, made.get("padding"))
    log.info("discriminators start from %s; their optimizer starts anew", file)


def feature_projection(config: Config, sizes: LMSPTConfig) -> FeatureProjection | None:
    """For pooled distillation; drawn from a generator of its own, so that cells share all their other first weights."""
    if config.distillation.kind != "pooled":
        return None
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return FeatureProjection(sizes.latent_dim, teacher_width(teacher_config(config)))


def freeze_parts(config: Config, model: LMSPTModel) -> None:
    """Takes the gradient from what is not to move: `freeze`, and an auxiliary decoder that nothing hears.

    Raises:
        ConfigError: for names that are no part of this tokenizer, where nothing is left to train, or for a probe that
            has no decoder of its own.
    """
    for name in config.freeze:
        try:
            model.get_submodule(name).requires_grad_(False)
        except AttributeError:
            parts = ", ".join(part for part, module in model.named_children() if list(module.parameters()))
            raise ConfigError(f"freeze: {name!r} is no part of this tokenizer; its parts: {parts}") from None
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"freeze={config.freeze} leaves nothing to train")
    auxiliary = model.auxiliary_decoder
    if config.distillation.probes and (auxiliary is None or not any(p.requires_grad for p in auxiliary.parameters())):
        raise ConfigError(
            "distillation.probe trains an auxiliary decoder: model.auxiliary_decoder=decoupled, and not in `freeze`"
        )
    if config.distillation.auxiliary == "skipped" and auxiliary is not None:
        auxiliary.requires_grad_(False)


@torch.no_grad()
def distillation_weights(
    config: Config, sizes: LMSPTConfig, crops: TrainingCrops, teacher: SpeechTeacher, folder: RunFolder
) -> tuple[float, float]:
    """Weights of distillation and probe: as configured, or what suits this teacher (a weight means something for one).

    An MSE is divided by the variance of its target's signal (`signal_variance`), measured on the first crops: the
    teacher's encoding, or its features pooled to the frame rate. The figures stay in the run folder, so that a resumed
    run uses the same. The probe always counts what resynthesis would.
    """
    kind, given = config.distillation.kind, config.weights.distillation
    weights: dict[str, float] = {} if given is None else {kind: given}
    wanted = {kind, *(["probe"] if config.distillation.probes else [])} - {"none", *weights}
    record = folder.path("teacher_variance.json")
    if wanted and not record.is_file():
        first = next(iter(DataLoader(Subset(crops, range(min(VARIANCE_CROPS, len(crops)))), VARIANCE_CROPS)))
        atomic_write_text(record, json.dumps(_variances(kind == "pooled", sizes, first, teacher)) + "\n")
    # Silence that pads the teacher's window adds terms to the mean that cost nothing: the weight makes up for them.
    # Pooled features past the crop are left out.
    padding = max(1.0, (config.teacher.pad_to_seconds or 0.0) / config.crops.crop_s)
    for name in sorted(wanted):
        variance = json.loads(record.read_text(encoding="utf-8"))["pooled_variance" if name == "pooled" else "variance"]
        weights[name] = (1.0 if name == "pooled" else padding) * DISTILLATION_PER_VARIANCE / variance
        log.info("%s weight %.3g: %g / variance %.3g", name, weights[name], DISTILLATION_PER_VARIANCE, variance)
    return weights.get(kind, 0.0), weights.get("probe", 0.0)


def _variances(pooled: bool, sizes: LMSPTConfig, batch: dict[str, Tensor], teacher: nn.Module) -> dict[str, float]:
    """Variance of the teacher's encoding of a batch, and for pooled distillation that of the pooled features.

    Both without what pads a short recording or the teacher's window.
    """
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
