"""`slm train-tokenizer`: trains an LM-SPT tokenizer by semantic speech-resynthesis distillation.

Features: the published losses and weights (all else as published too: `--config published/12.5hz`, see
docs/as-published.md), a frozen Whisper teacher by folder or hub name, discriminators that can be small, late or off,
quantizer dropout, dead-code revival, bf16 and fp16, averaged weights, activation checkpointing, gradient accumulation,
several processes (torchrun), exact resume, metrics.jsonl with TensorBoard and Weights & Biases.
The result, `run_dir/model`, is what `load_tokenizer` and AutoModel load.

Raises: ConfigError for settings that cannot work, ValueError for a teacher that cannot be loaded, DataError.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from recipes.config import ConfigError, Problems
from recipes.exporting.discriminators import discriminator_file
from recipes.runs.embedded import model_path
from recipes.runs.files import atomic_write_text, disk_errors
from recipes.runs.inputs import check_sources, digest, refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.machine import process_count, resolve_device, resolve_precision, seed_everything
from recipes.runs.progress import Progress
from recipes.runs.run_folder import ADJUSTABLE, RunFolder
from recipes.runs.tracking import Tracker, check_trackers, drop_metrics_after, make_trackers
from tokenizer import load_tokenizer
from tokenizer.data.augmentation import AugmentationConfig
from tokenizer.data.characters import COLUMN, N_CLASSES, read_spans
from tokenizer.data.crops import CropConfig, TrainingCrops, micro_batch_size, validation_crops
from tokenizer.data.manifest import read_source
from tokenizer.data.mixing import CACHE_BYTES, TrainingAudio, training_audio, validation_utterances
from tokenizer.data.utterances import DataError, DataSource
from tokenizer.model.configuration import LMSPTConfig, preset_config
from tokenizer.model.modeling import LMSPTModel
from tokenizer.model.presets import PRESETS
from tokenizer.teacher.contrastive import ContrastiveProjection
from tokenizer.teacher.default_weight import default_weight, target_variances
from tokenizer.teacher.distillation import DistillationConfig, FeatureProjection
from tokenizer.teacher.whisper import SpeechTeacher, TeacherConfig, teacher_width
from tokenizer.training.checkpoints import load_latest_state
from tokenizer.training.discriminator import Discriminator, DiscriminatorConfig
from tokenizer.training.initialisation import initialise_discriminators, initialise_from
from tokenizer.training.invariance import InvarianceConfig
from tokenizer.training.loop import fit, frames_per_step
from tokenizer.training.losses import LossWeights, MultiScaleMelLoss
from tokenizer.training.objective import Objective
from tokenizer.training.revival import CHANCE, LIVE_FRACTION, dead_rule, describe
from tokenizer.training.state import CodecTrainingConfig, TrainState, averaged
from tokenizer.training.stft import Padding
from tokenizer.training.validation import validate

SIZES = ("periods", "fft_sizes", "period_channels", "band_channels")  # keys that decide a discriminator's tensors


@dataclass
class Config:
    """Everything of one tokenizer training."""

    run_dir: str = field(default="runs/tokenizer", metadata={"help": "run folder; the model goes to run_dir/model"})
    data: list[DataSource] = field(
        default_factory=list, metadata={"help": "where training and valid recordings come from"}
    )
    preset: str = field(default="nano-12.5hz", metadata={"help": f"size and frame rate: {', '.join(sorted(PRESETS))}"})
    model: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "LMSPTConfig fields that differ from the preset"}
    )
    teacher: TeacherConfig | None = field(
        default_factory=TeacherConfig,
        metadata={"help": "speech encoder; null with distillation.kind=none or contrastive only"},
    )
    distillation: DistillationConfig = field(
        default_factory=DistillationConfig, metadata={"help": "what the teacher teaches"}
    )
    weights: LossWeights = field(default_factory=LossWeights, metadata={"help": "what each loss counts"})
    mel_padding: Padding = field(
        default="zeros", metadata={"help": "beyond a crop's ends in the mel loss: zeros, or (published) reflect"}
    )
    discriminator: DiscriminatorConfig = field(
        default_factory=DiscriminatorConfig, metadata={"help": "adversarial training"}
    )
    crops: CropConfig = field(
        default_factory=CropConfig, metadata={"help": "crops, quantizer dropout, semantic-only share"}
    )
    augmentation: AugmentationConfig = field(
        default_factory=lambda: AugmentationConfig(noise_probability=0.0), metadata={"help": "changes to the waveforms"}
    )
    invariance: InvarianceConfig = field(
        default_factory=InvarianceConfig,
        metadata={"help": "semantic codes that stay the same under noise and gain (off by default)"},
    )
    training: CodecTrainingConfig = field(
        default_factory=CodecTrainingConfig, metadata={"help": "steps, batch, optimizer"}
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "start from this tokenizer folder; at another frame rate what fits is reused. Optimizers start anew"
        },
    )
    init_discriminators: bool = field(
        default=False,
        metadata={
            "help": "take the discriminators of init_from too, all or none: those in its folder `discriminators/` (slm "
            "export discriminators=true), or in the last checkpoint of its run. Their optimizer starts anew"
        },
    )
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": "parts of the tokenizer that must not move, e.g. [auxiliary_decoder] with init_from"},
    )
    precision: str = field(
        default="auto",
        metadata={"help": "auto, fp32 (a GPU convolves it in TF32, as torch is set), bf16, or on a GPU fp16"},
    )
    trackers: list[Tracker] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={
            "help": "beside metrics.jsonl: tensorboard, wandb (project and mode from WANDB_*)",
            **ADJUSTABLE,
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of weights, order, crops and augmentation"})

    def __post_init__(self) -> None:
        if self.distillation.semantic_reconstruction and not self.crops.semantic_only:
            raise ValueError(
                "distillation.semantic_reconstruction: is the loss of the items that crops.semantic_only leaves book 0 "
                "alone, of which there are none; set crops.semantic_only=0.3 or so"
            )


def _model_config(config: Config) -> LMSPTConfig:
    try:
        sizes = preset_config(config.preset, **config.model)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"preset={config.preset}, model={config.model}: {error}") from None
    if config.invariance.weight and sizes.semantic_quantizer == "fsq":
        raise ConfigError("invariance.weight: needs a vector book's entries, which semantic_quantizer=fsq lacks")
    return sizes


def _micro_batch(config: Config) -> int:
    """Crops in one forward pass of one process. Raises ConfigError where a step's batch cannot be divided so."""
    try:
        return micro_batch_size(config.training.batch_size, config.training.accumulation, process_count())
    except ValueError as error:
        raise ConfigError(str(error)) from None


def plan(config: Config) -> dict[str, object]:
    """What the run would do; raises all that would stop it, together."""
    problems = Problems("slm train-tokenizer")
    problems.attempt(RunFolder(config.run_dir).check, config)
    taught_by = problems.attempt(teacher_config, config)
    teacher = problems.attempt(SpeechTeacher.from_pretrained, taught_by) if taught_by else None
    model_config = problems.attempt(_model_config, config)
    if model_config is not None:
        model = problems.attempt(_new_model, config)
        audio = problems.attempt(_training_audio, config)
    elif config.init_from is not None:
        problems.attempt(_read_init_from, config)
    if problems.errors:
        check_sources(problems, config.data, ["train"], needs_text=False)
    problems.attempt(check_trackers, config.trackers)
    precision = problems.attempt(resolve_precision, config.precision)
    micro_batch = problems.attempt(_micro_batch, config)
    problems.raise_all()
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    if teacher and config.crops.crop_s > teacher.window_s:
        raise ConfigError(
            f"crops.crop_s={config.crops.crop_s:g} is longer than the teacher's window, {teacher.window_s:g} s"
        )
    discriminator = _new_discriminator(config) or torch.nn.Module()
    judges = sum(p.numel() for p in discriminator.parameters())
    hours = audio.hours
    seen = config.training.steps * config.training.batch_size * config.crops.crop_s / 3600
    return {
        "training recordings": audio.describe(),
        "frame rate (Hz)": model_config.frame_rate,
        "codebooks": model_config.codebook_sizes,
        "parameters": f"{sum(parameters.values()):,} ({', '.join(f'{n} {p:,}' for n, p in parameters.items() if p)})",
        "discriminator parameters": judges,
        "teacher": f"{taught_by.name}, window {teacher.window_s:g} s" if teacher else "none is heard",
        "distillation": config.distillation.kind + (", with a probe" if config.distillation.probes else ""),
        "steps": config.training.steps,
        "hours of crops seen": round(seen, 2),
        "passes over the data": round(seen / hours, 1) if hours else "unknown (no durations)",
        "crops per step": f"{config.training.batch_size}, {micro_batch} in one forward pass of one process",
        "dead entries": _revival(config, model_config),
        "precision": precision,
        "memory of weights, gradients and optimizer (MiB)": round(16 * (sum(parameters.values()) + judges) / 2**20),
        "result": str(RunFolder(config.run_dir).path("model")),
    }


def _revival(config: Config, sizes: LMSPTConfig) -> list[str] | str:
    """When entries of each size of book are revived; warns where that takes live ones too, or never happens."""
    training = config.training
    if not training.revive_steps:
        return "are left as they are"
    frames = frames_per_step(training, round(config.crops.crop_s * sizes.sampling_rate), sizes)
    learnt = sizes.codebook_sizes[1:] if sizes.semantic_quantizer == "fsq" else sizes.codebook_sizes
    for size in dict.fromkeys(learnt):
        rule = dead_rule(size, frames, training.usage_decay)
        if rule.chance(LIVE_FRACTION) > CHANCE:
            log.warning(
                "training.usage_decay=%g: of the %d entries, those chosen at %.0f %% of even use are taken for dead at "
                "%.0f %% of the looks, with %d frames a step; usage_decay=null derives it from these",
                training.usage_decay, size, 100 * LIVE_FRACTION, 100 * rule.chance(LIVE_FRACTION), frames,
            )  # fmt: skip
        if rule.trial_steps > training.revive_until * training.schedule_length:
            log.warning(
                "no entry of a book of %d is revived: it takes %.0f steps of %d frames to tell a dead one, and revival "
                "ends at step %.0f; raise training.steps or batch_size, or take a smaller book",
                size, rule.trial_steps, frames, training.revive_until * training.schedule_length,
            )  # fmt: skip
    return [describe(size, frames, training.usage_decay) for size in dict.fromkeys(learnt)]


def run(config: Config) -> Path:
    """Trains the tokenizer, or goes on where a killed run stopped; returns the model folder."""
    folder = RunFolder(config.run_dir)
    folder.check(config)
    fingerprint = _inputs(config)
    refuse_other_inputs(folder, fingerprint, "data, teacher or init_from")
    if folder.done(config):
        log.info("%s is complete: skipped", config.run_dir)
        return folder.path("model")
    precision = resolve_precision(config.precision)
    _micro_batch(config)
    check_trackers(config.trackers)
    folder.start(config, fingerprint)
    trackers = make_trackers(config.trackers, folder)  # after the start: they write into the folder
    seed_everything(config.seed)
    AcceleratorState._reset_state()  # an earlier stage of this process may have computed in another precision
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(precision, precision),
        cpu=resolve_device() == "cpu",
        log_with=trackers,
        project_dir=str(folder.folder),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.training.process_timeout_s))],
    )
    state = _new_state(config, accelerator)
    crops, objective = _crops(config), _objective(config, accelerator)
    state.audio = crops.audio
    if load_latest_state(state, folder.checkpoints, accelerator):
        log.info("resumed at step %d", state.step)
    if accelerator.is_main_process:
        drop_metrics_after(folder.metrics, state.step)
    if objective.teacher is not None:
        with accelerator.main_process_first():  # it measures, the others read
            weights = _distillation_weights(config, state.model_config, crops, objective.teacher, folder)
        objective.distillation_weight, objective.probe_weight = weights
    accelerator.init_trackers("tensorboard")  # the name of TensorBoard's folder in the run's
    validation = _validation(config, state.model.min_samples) if accelerator.is_main_process else None
    shown = Progress("train-tokenizer", config.training.steps, state.step)
    fit(state, crops, validation, objective, config.training, accelerator, folder.checkpoints, shown)

    crops.audio.close()

    model: LMSPTModel = state.result.eval()
    scores = {}
    if validation is not None and accelerator.is_main_process:
        scores = validate(model, validation, objective, state.projection)
    if accelerator.is_main_process:
        model.config.trained = True
        with disk_errors(folder.path("model")):
            model.save_pretrained(folder.path("model"))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    folder.mark_complete(
        {
            "steps": state.step,
            # workers and other processes count apart, some of them the same recordings: no figure then, but the log
            **({} if config.training.num_workers or process_count() > 1 else {"n_failed": crops.audio.n_failed}),
            "fingerprint": model.fingerprint(),
            "distillation_weight": objective.distillation_weight,
            "probe_weight": objective.probe_weight,
            "non_finite_steps": state.health.non_finite_steps,
            "skipped_discriminator_steps": state.health.skipped_discriminator_steps,
            "warnings": list(state.health.warnings.values()),
            **{name: round(value, 4) for name, value in scores.items()},
        }
    )
    return folder.path("model")


def _new_model(config: Config) -> LMSPTModel:
    """The tokenizer as the first step finds it. Raises ConfigError for an `init_from` or `freeze` that cannot work."""
    model = LMSPTModel(_model_config(config))
    if config.init_from is not None:
        try:
            initialise_from(model, config.init_from)
        except ValueError as error:
            raise ConfigError(f"init_from={error}") from None
    freeze_parts(config, model)
    return model


def _read_init_from(config: Config) -> None:
    """Whether `init_from` is a tokenizer at all. Raises ConfigError."""
    try:
        load_tokenizer(config.init_from)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"init_from={config.init_from}: not a tokenizer folder ({error})") from None


def _new_discriminator(config: Config) -> Discriminator | None:
    """The discriminators as the first step finds them, None for none. Raises ConfigError where they cannot be had."""
    discriminator = Discriminator(config.discriminator) if config.discriminator.enabled else None
    if config.init_discriminators:
        start_discriminators(config, discriminator)
    return discriminator


def _new_state(config: Config, accelerator: Accelerator) -> TrainState:
    model, settings = _new_model(config), config.training

    def optimizer(*modules: torch.nn.Module) -> torch.optim.Optimizer:
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        # fused: one pass over memory instead of ten; a loss scale (fp16) it would take off itself, and skip unseen
        fused = accelerator.scaler is None
        return torch.optim.AdamW(
            trained, settings.learning_rate, settings.betas, weight_decay=settings.weight_decay, fused=fused
        )

    projection = feature_projection(config, model.config)
    # Networks go to their device as they are, not into DistributedDataParallel: see tokenizer/training/parallel.py.
    model.to(accelerator.device)
    state = TrainState(model=model, optimizer=None, ema=averaged(model, settings.ema_decay))
    if projection is not None:
        state.projection = projection.to(accelerator.device)
    state.optimizer = accelerator.prepare(optimizer(model, *filter(None, [projection])))
    if (discriminator := _new_discriminator(config)) is not None:
        state.discriminator = discriminator.to(accelerator.device)
        state.discriminator_optimizer = accelerator.prepare(optimizer(state.discriminator))
    return state


def _inputs(config: Config) -> str:
    """A hash of what decides the weights beside the configuration: training recordings, teacher, initial weights."""
    sources = training_sources(config)
    tables = [read_source(source, "train", needs_text=False) for source in sources if not source.stream]
    listed = [utterance for table in tables for utterance in table]
    rows = (json.dumps([u.id, u.speaker, u.duration, *u.columns.values()]) for u in listed)
    taught_by = teacher_config(config)
    judges = [discriminator_file(config.init_from)[0]] if config.init_discriminators and config.init_from else []
    return digest(rows, model_path(taught_by.name if taught_by else None), model_path(config.init_from), *judges)


def _training_audio(config: Config) -> TrainingAudio:
    # Each process of this machine that decodes, a loader's worker or a training itself, keeps its part of the whole.
    decoding = max(1, config.training.num_workers) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    audio = training_audio(
        training_sources(config),
        _model_config(config).sampling_rate,
        config.seed,
        needs_text=False,
        cache_bytes=CACHE_BYTES // decoding,
    )
    if config.distillation.kind == "contrastive":
        for utterance in (row for part in audio.parts for row in part.utterances):
            read_spans(utterance)
    return audio


def training_sources(config: Config) -> list[DataSource]:
    """The sources, for contrastive distillation with the column of aligned characters.

    Raises:
        ConfigError: one of them is streamed, and what it holds is not known beforehand.
    """
    if config.distillation.kind != "contrastive":
        return config.data
    if streamed := [source.path for source in config.data if source.stream]:
        raise ConfigError(
            f"distillation.kind=contrastive reads aligned characters, which a stream has not: give {streamed[0]} as a "
            "manifest.jsonl with the column `characters` (stream=false), or take another distillation.kind"
        )
    return [
        dataclasses.replace(source, columns=list(dict.fromkeys([*source.columns, COLUMN]))) for source in config.data
    ]


def _crops(config: Config) -> TrainingCrops:
    model_config, audio = _model_config(config), _training_audio(config)
    length = config.training.steps * config.training.batch_size
    hop = model_config.hop_length if config.distillation.kind == "contrastive" else None
    changes = config.invariance.changes if config.invariance.weight else None
    n_books = len(model_config.codebook_sizes)
    return TrainingCrops(audio, config.crops, config.augmentation, n_books, length, config.seed, hop, changes)


def _objective(config: Config, accelerator: Accelerator) -> Objective:
    teacher = None
    if (taught_by := teacher_config(config)) is not None:
        teacher = SpeechTeacher.from_pretrained(taught_by).to(accelerator.device)
    return Objective(
        weights=config.weights,
        mel=MultiScaleMelLoss(_model_config(config).sampling_rate, padding=config.mel_padding).to(accelerator.device),
        teacher=teacher,
        distillation_weight=_contrastive_weight(config) or config.weights.distillation or 0.0,
        discriminator_start=config.discriminator.start_step,
        distillation=config.distillation,
        invariance=config.invariance,
    )


def _validation(config: Config, min_samples: int) -> list[torch.Tensor] | None:
    limit = config.training.validate_crops
    try:
        sources = validation_utterances(config.data, limit)
    except DataError as error:
        log.warning("training without validation: %s", error)
        return None
    return validation_crops(sources, _model_config(config).sampling_rate, config.crops.crop_s, limit, min_samples)


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
            "teacher.name=..., or take distillation.kind=none (or contrastive) with distillation.probe=false"
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
        initialise_discriminators(discriminator, file)
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


def feature_projection(config: Config, sizes: LMSPTConfig) -> torch.nn.Module | None:
    """For pooled and contrastive distillation.

    Drawn from a generator of its own, so that cells share all their other first weights.
    """
    if config.distillation.kind not in ("pooled", "contrastive"):
        return None
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if config.distillation.kind == "contrastive":
            return ContrastiveProjection(sizes.latent_dim, N_CLASSES)
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


def _contrastive_weight(config: Config) -> float | None:
    """What InfoNCE counts, where contrastive distillation is on; it is no MSE, so no teacher's variance tells."""
    if config.distillation.kind != "contrastive":
        return None
    return 1.0 if config.weights.distillation is None else config.weights.distillation


def _distillation_weights(
    config: Config, sizes: LMSPTConfig, crops: TrainingCrops, teacher: SpeechTeacher, folder: RunFolder
) -> tuple[float, float]:
    """Weights of distillation and probe: as configured, or what suits this teacher.

    What was measured for the latter stays in the run folder, so that a resumed run uses the same. The probe always
    counts what resynthesis would.
    """
    kind, given = config.distillation.kind, _contrastive_weight(config) or config.weights.distillation
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
