"""`slm train-tokenizer`: trains an LM-SPT tokenizer by semantic speech-resynthesis distillation.

Features: the published losses and weights, a frozen Whisper teacher by folder or hub name, discriminators that can be
small, late or off, quantizer dropout, dead-code revival, bf16, checkpoints, exact resume, TensorBoard, metrics.jsonl.
The result, `run_dir/model`, is what `load_tokenizer` and AutoModel load.

Raises: ConfigError for settings that cannot work, ValueError for a teacher that cannot be loaded, DataError.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, Subset

from recipes.config import ConfigError
from recipes.inputs import digest, refuse_other_inputs
from recipes.runtime import (
    JsonlTracker,
    RunFolder,
    atomic_write_text,
    log,
    resolve_device,
    resolve_precision,
    seed_everything,
)
from recipes.tracking import drop_metrics_after
from tokenizer.augmentation import AugmentationConfig
from tokenizer.configuration import LMSPTConfig, preset_config
from tokenizer.crops import CropConfig, TrainingCrops, validation_crops
from tokenizer.data import AudioStore, DataError, DataSource, read_sources
from tokenizer.discriminator import Discriminator, DiscriminatorConfig
from tokenizer.losses import LossWeights, MultiScaleMelLoss
from tokenizer.modeling import LMSPTModel
from tokenizer.objective import Objective
from tokenizer.state_files import load_latest_state
from tokenizer.teacher import SpeechTeacher, TeacherConfig, at_teacher_rate
from tokenizer.training import CodecTrainingConfig, TrainState, fit
from tokenizer.validation import validate

DISTILLATION_PER_VARIANCE = 100.0
VARIANCE_CROPS = 32


@dataclass
class Config:
    """Everything of one tokenizer training."""

    run_dir: str = field(default="runs/tokenizer", metadata={"help": "run folder; the model goes to run_dir/model"})
    data: list[DataSource] = field(
        default_factory=list, metadata={"help": "where training and valid recordings come from"}
    )
    preset: str = field(
        default="nano-12.5hz", metadata={"help": "size and frame rate: nano-25hz, nano-12.5hz, nano-6.25hz"}
    )
    model: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "LMSPTConfig fields that differ from the preset"}
    )
    teacher: TeacherConfig | None = field(
        default_factory=TeacherConfig, metadata={"help": "speech encoder; null: no distillation"}
    )
    weights: LossWeights = field(default_factory=LossWeights, metadata={"help": "what each loss counts"})
    discriminator: DiscriminatorConfig = field(
        default_factory=DiscriminatorConfig, metadata={"help": "adversarial training"}
    )
    crops: CropConfig = field(
        default_factory=CropConfig, metadata={"help": "crops, quantizer dropout, semantic-only share"}
    )
    augmentation: AugmentationConfig = field(
        default_factory=lambda: AugmentationConfig(noise_probability=0.0), metadata={"help": "changes to the waveforms"}
    )
    training: CodecTrainingConfig = field(
        default_factory=CodecTrainingConfig, metadata={"help": "steps, batch, optimizer"}
    )
    init_from: str | None = field(default=None, metadata={"help": "start from this tokenizer folder of the same size"})
    precision: str = field(default="auto", metadata={"help": "auto, fp32 or bf16"})
    seed: int = field(default=0, metadata={"help": "seed of weights, order, crops and augmentation"})


def _model_config(config: Config) -> LMSPTConfig:
    try:
        return preset_config(config.preset, **config.model)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"preset={config.preset}, model={config.model}: {error}") from None


def _precision(config: Config) -> str:
    """fp32 or bf16, in one process: what this loop is tested in."""
    precision = resolve_precision(config.precision)
    if precision == "fp16":
        raise ConfigError("precision=fp16: this loop has no loss scaling; take bf16 or fp32")
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(f"train-tokenizer runs in one process, {processes} were started: codebooks would drift apart")
    return precision


def plan(config: Config) -> dict[str, object]:
    """What the run would do; raises what would stop it."""
    RunFolder(config.run_dir).check(config)
    utterances = read_sources(config.data, "train")
    model_config = _model_config(config)
    model = LMSPTModel(model_config)
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    teacher = SpeechTeacher.from_pretrained(config.teacher) if config.teacher else None
    if teacher and config.crops.crop_s > teacher.window_s:
        raise ConfigError(
            f"crops.crop_s={config.crops.crop_s:g} is longer than the teacher's window, {teacher.window_s:g} s"
        )
    discriminator = Discriminator(config.discriminator) if config.discriminator.enabled else torch.nn.Module()
    judges = sum(p.numel() for p in discriminator.parameters())
    hours = sum(u.duration or 0 for u in utterances) / 3600
    seen = config.training.steps * config.training.batch_size * config.crops.crop_s / 3600
    return {
        "training recordings": f"{len(utterances)}, {hours:.2f} h",
        "frame rate (Hz)": model_config.frame_rate,
        "codebooks": model_config.codebook_sizes,
        "parameters": f"{sum(parameters.values()):,} ({', '.join(f'{n} {p:,}' for n, p in parameters.items() if p)})",
        "discriminator parameters": judges,
        "teacher": f"{config.teacher.name}, window {teacher.window_s:g} s" if teacher else "none: no distillation",
        "steps": config.training.steps,
        "hours of crops seen": round(seen, 2),
        "passes over the data": round(seen / hours, 1) if hours else "unknown (no durations)",
        "precision": _precision(config),
        "memory of weights, gradients and optimizer (MiB)": round(16 * (sum(parameters.values()) + judges) / 2**20),
        "result": str(RunFolder(config.run_dir).path("model")),
    }


def run(config: Config) -> Path:
    """Trains the tokenizer, or goes on where a killed run stopped; returns the model folder."""
    folder = RunFolder(config.run_dir)
    folder.check(config)
    fingerprint = _inputs(config)
    refuse_other_inputs(folder, fingerprint, "data, teacher or init_from")
    if folder.complete:
        log.info("%s is complete: skipped", config.run_dir)
        return folder.path("model")
    _precision(config)
    folder.start(config, fingerprint)
    seed_everything(config.seed)
    AcceleratorState._reset_state()  # an earlier stage of this process may have computed in another precision
    accelerator = Accelerator(
        mixed_precision={"fp32": "no", "bf16": "bf16"}[_precision(config)],
        cpu=resolve_device() == "cpu",
        log_with=[JsonlTracker(folder.metrics), "tensorboard"],
        project_dir=str(folder.folder),
    )
    state = _new_state(config, accelerator)
    crops, objective = _crops(config, accelerator.num_processes), _objective(config, accelerator)
    if load_latest_state(state, folder.checkpoints, accelerator):
        log.info("resumed at step %d", state.step)
    if accelerator.is_main_process:
        drop_metrics_after(folder.metrics, state.step)
    if objective.teacher is not None:
        objective.distillation_weight = _distillation_weight(config, crops, objective.teacher, folder)
    accelerator.init_trackers("tensorboard")
    validation = _validation(config)
    fit(state, crops, validation, objective, config.training, accelerator, folder.checkpoints)

    model: LMSPTModel = accelerator.unwrap_model(state.model).eval()
    scores = validate(model, validation.to(accelerator.device), objective) if validation is not None else {}
    if accelerator.is_main_process:
        model.config.trained = True
        model.save_pretrained(folder.path("model"))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    folder.mark_complete(
        {
            "steps": state.step,
            "n_failed": crops.store.n_failed,
            "fingerprint": model.fingerprint(),
            "distillation_weight": objective.distillation_weight,
            **{name: round(value, 4) for name, value in scores.items()},
        }
    )
    return folder.path("model")


def _new_state(config: Config, accelerator: Accelerator) -> TrainState:
    model = LMSPTModel(_model_config(config))
    if config.init_from is not None:
        try:
            model.load_state_dict(LMSPTModel.from_pretrained(config.init_from).state_dict())
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"init_from={config.init_from}: not a tokenizer folder of this size ({error})") from None
    settings = config.training

    def optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            module.parameters(), settings.learning_rate, settings.betas, weight_decay=settings.weight_decay
        )

    state = TrainState(model=model, optimizer=optimizer(model))
    state.model, state.optimizer = accelerator.prepare(state.model, state.optimizer)
    if config.discriminator.enabled:
        discriminator = Discriminator(config.discriminator)
        state.discriminator, state.discriminator_optimizer = accelerator.prepare(
            discriminator, optimizer(discriminator)
        )
    return state


def _inputs(config: Config) -> str:
    """A hash of what decides the weights beside the configuration: training recordings, teacher, initial weights."""
    rows = (json.dumps([u.id, u.speaker, u.duration]) for u in read_sources(config.data, "train"))
    teacher = Path(config.teacher.name).expanduser() if config.teacher else ""
    return digest(rows, teacher, Path(config.init_from).expanduser() if config.init_from else "")


def _crops(config: Config, processes: int = 1) -> TrainingCrops:
    model_config = _model_config(config)
    store = AudioStore(read_sources(config.data, "train"), model_config.sampling_rate)
    length = config.training.steps * config.training.batch_size * processes
    return TrainingCrops(
        store, config.crops, config.augmentation, len(model_config.codebook_sizes), length, config.seed
    )


def _objective(config: Config, accelerator: Accelerator) -> Objective:
    teacher = None
    if config.teacher is not None:
        teacher = SpeechTeacher.from_pretrained(config.teacher).to(accelerator.device)
        if accelerator.device.type == "cpu":
            # On CPUs the backward of fused attention costs more than all the rest of a small encoder.
            teacher.encoder.set_attn_implementation("eager")
    return Objective(
        weights=config.weights,
        mel=MultiScaleMelLoss(_model_config(config).sampling_rate).to(accelerator.device),
        teacher=teacher,
        distillation_weight=config.weights.distillation or 0.0,
        discriminator_start=config.discriminator.start_step,
    )


def _validation(config: Config) -> torch.Tensor | None:
    try:
        utterances = read_sources(config.data, "valid")
    except DataError as error:
        log.warning("training without validation: %s", error)
        return None
    store = AudioStore(utterances, _model_config(config).sampling_rate)
    return validation_crops(store, config.crops.crop_s, config.training.validate_crops)


@torch.no_grad()
def _distillation_weight(config: Config, crops: TrainingCrops, teacher: SpeechTeacher, folder: RunFolder) -> float:
    """The configured weight, or one that suits this teacher: a weight means something for one teacher only.

    The MSE is divided by the variance of the teacher's encoding of the first crops; the figure stays in the run folder,
    so that a resumed run uses the same.
    """
    if config.weights.distillation is not None:
        return config.weights.distillation
    record = folder.path("teacher_variance.json")
    if not record.is_file():
        first = next(iter(DataLoader(Subset(crops, range(min(VARIANCE_CROPS, len(crops)))), VARIANCE_CROPS)))
        values = first["input_values"].to(next(teacher.parameters()).device)
        heard = at_teacher_rate(values, _model_config(config).sampling_rate)
        atomic_write_text(record, json.dumps({"variance": float(teacher(heard).float().var())}) + "\n")
    variance = json.loads(record.read_text())["variance"]
    # Silence that pads the teacher's window adds terms to the mean that cost nothing: the weight makes up for them.
    padding = max(1.0, (config.teacher.pad_to_seconds or 0.0) / config.crops.crop_s)
    weight = padding * DISTILLATION_PER_VARIANCE / variance
    log.info(
        "distillation weight %.3g: %g / variance %.3g of the teacher's encoding",
        weight,
        DISTILLATION_PER_VARIANCE,
        variance,
    )
    return weight
