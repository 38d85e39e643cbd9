"""Which teacher is heard, what a training minimises, and what the distillation counts."""

from __future__ import annotations

import json

from accelerate import Accelerator

from recipes.config import ConfigError
from recipes.runs.files import atomic_write_text
from recipes.runs.logs import log
from recipes.runs.run_folder import RunFolder
from recipes.tokenizer_training.config import Config, model_sizes
from tokenizer.data.crops import TrainingCrops
from tokenizer.model.configuration import LMSPTConfig
from tokenizer.teacher.default_weight import default_weight, target_variances
from tokenizer.teacher.whisper import SpeechTeacher, TeacherConfig
from tokenizer.training.losses import MultiScaleMelLoss
from tokenizer.training.objective import Objective


def make_objective(config: Config, accelerator: Accelerator) -> Objective:
    """What a step minimises, with its teacher on the accelerator's device. Raises as `teacher_config` does."""
    teacher = None
    if (taught_by := teacher_config(config)) is not None:
        teacher = SpeechTeacher.from_pretrained(taught_by).to(accelerator.device)
    return Objective(
        weights=config.weights,
        mel=MultiScaleMelLoss(model_sizes(config).sampling_rate, padding=config.mel_padding).to(accelerator.device),
        teacher=teacher,
        distillation_weight=_contrastive_weight(config) or config.weights.distillation or 0.0,
        discriminator_start=config.discriminator.start_step,
        distillation=config.distillation,
        invariance=config.invariance,
    )


def teacher_config(config: Config) -> TeacherConfig | None:
    """The teacher to load, None where nothing hears it.

    Raises:
        ConfigError: if one is needed and none is given.
    """
    if not config.distillation.needs_teacher:
        return None
    if config.teacher is None:
        names = ("probe", "semantic_reconstruction", "reconstruction")
        asks = "".join(f" with distillation.{name}" for name in names if getattr(config.distillation, name))
        raise ConfigError(
            f"distillation.kind={config.distillation.kind}{asks} needs a teacher, and teacher is null: give "
            f"teacher.name=..., or take distillation.kind=none (or contrastive) without distillation.{names[0]}, "
            f"{names[1]} and {names[2]}"
        )
    return config.teacher


def _contrastive_weight(config: Config) -> float | None:
    """What InfoNCE counts, where contrastive distillation is on; it is no MSE, so no teacher's variance tells."""
    if config.distillation.kind != "contrastive":
        return None
    return 1.0 if config.weights.distillation is None else config.weights.distillation


def distillation_weights(
    config: Config, sizes: LMSPTConfig, crops: TrainingCrops, teacher: SpeechTeacher, folder: RunFolder
) -> tuple[float, float]:
    """Weights of distillation and probe: as configured, or what suits this teacher.

    What was measured for the latter stays in the run folder, so that a resumed run uses the same. The probe always
    counts what resynthesis would.
    """
    kind, given = config.distillation.kind, _contrastive_weight(config) or config.weights.distillation
    if kind == "none" and config.distillation.hears_reconstructions:
        kind = "resynthesis"  # the same loss, on the main decoder alone
    weights: dict[str, float] = {} if given is None else {kind: given}
    wanted = {kind, *(["probe"] if config.distillation.probes else [])} - {"none", *weights}
    record = folder.path("teacher_variance.json")
    if wanted and not record.is_file():
        atomic_write_text(record, json.dumps(target_variances(crops, teacher, sizes, kind == "pooled")) + "\n")
    for name in sorted(wanted):
        variances = json.loads(record.read_text(encoding="utf-8"))
        weights[name] = default_weight(name, variances, config.crops.crop_s, config.teacher.pad_to_seconds)
        log.info("%s weight %.3g, by the variances %s", name, weights[name], variances)
    return weights.get(kind, 0.0), weights.get("probe", 0.0)
