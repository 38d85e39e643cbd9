"""`slm train-tokenizer`: trains an LM-SPT tokenizer by semantic speech-resynthesis distillation.

Features: the published losses and weights (all else as published too: `--config published/12.5hz`, see
docs/as-published.md), a frozen Whisper teacher by folder or hub name, discriminators that can be small, late or off,
quantizer dropout, dead-code revival, bf16 and fp16, averaged weights, activation checkpointing, gradient accumulation,
several processes (torchrun), exact resume, metrics.jsonl with TensorBoard and Weights & Biases.
The result, `run_dir/model`, is what `load_tokenizer` and AutoModel load.

Raises: ConfigError for settings that cannot work, ValueError for a teacher that cannot be loaded, DataError.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import InitProcessGroupKwargs

from recipes.config import ConfigError, Problems
from recipes.runs.files import disk_errors
from recipes.runs.inputs import check_sources, refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.machine import process_count, resolve_device, resolve_precision, seed_everything
from recipes.runs.progress import Progress
from recipes.runs.run_folder import RunFolder
from recipes.runs.tracking import check_trackers, drop_metrics_after, make_trackers
from recipes.tokenizer_training.config import Config, model_sizes
from recipes.tokenizer_training.data import inputs_digest, items_at_once, make_crops, read_audio, valid_crops
from recipes.tokenizer_training.networks import check_init_from, new_discriminator, new_model, new_state
from recipes.tokenizer_training.objective import distillation_weights, make_objective, teacher_config
from tokenizer.model.configuration import LMSPTConfig
from tokenizer.model.modeling import LMSPTModel
from tokenizer.teacher.whisper import SpeechTeacher
from tokenizer.training.checkpoints import load_latest_state
from tokenizer.training.loop import fit, frames_per_step
from tokenizer.training.objective import Objective
from tokenizer.training.revival import CHANCE, LIVE_FRACTION, dead_rule, describe
from tokenizer.training.state import TrainState
from tokenizer.training.validation import validate


def plan(config: Config) -> dict[str, object]:
    """What the run would do; raises all that would stop it, together."""
    problems = Problems("slm train-tokenizer")
    problems.attempt(RunFolder(config.run_dir).check, config)
    taught_by = problems.attempt(teacher_config, config)
    teacher = problems.attempt(SpeechTeacher.from_pretrained, taught_by) if taught_by else None
    model_config = problems.attempt(model_sizes, config)
    if model_config is not None:
        model = problems.attempt(new_model, config)
        audio = problems.attempt(read_audio, config)
    elif config.init_from is not None:
        problems.attempt(check_init_from, config)
    if problems.errors:
        check_sources(problems, config.data, ["train"], needs_text=False)
    problems.attempt(check_trackers, config.trackers)
    precision = problems.attempt(resolve_precision, config.precision)
    micro_batch = problems.attempt(items_at_once, config.training)
    problems.raise_all()
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    if teacher and config.crops.crop_s > teacher.window_s:
        raise ConfigError(
            f"crops.crop_s={config.crops.crop_s:g} is longer than the teacher's window, {teacher.window_s:g} s"
        )
    discriminator = new_discriminator(config) or torch.nn.Module()
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
    fingerprint = inputs_digest(config)
    refuse_other_inputs(folder, fingerprint, "data, teacher or init_from")
    if folder.done(config):
        log.info("%s is complete: skipped", config.run_dir)
        return folder.path("model")
    precision = resolve_precision(config.precision)
    items_at_once(config.training)
    check_trackers(config.trackers)
    folder.start(config, fingerprint)
    trackers = make_trackers(config.trackers, folder)  # after the start: they write into the folder
    seed_everything(config.seed)
    accelerator = _accelerator(config, folder, precision, trackers)
    state = new_state(config, accelerator)
    crops, objective = make_crops(config), make_objective(config, accelerator)
    state.audio = crops.audio
    if load_latest_state(state, folder.checkpoints, accelerator):
        log.info("resumed at step %d", state.step)
    if accelerator.is_main_process:
        drop_metrics_after(folder.metrics, state.step)
    if objective.teacher is not None:
        with accelerator.main_process_first():  # it measures, the others read
            weights = distillation_weights(config, state.model_config, crops, objective.teacher, folder)
        objective.distillation_weight, objective.probe_weight = weights
    accelerator.init_trackers("tensorboard")  # the name of TensorBoard's folder in the run's
    validation = valid_crops(config, state.model.min_samples) if accelerator.is_main_process else None
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
    # workers and other processes count apart, some of them the same recordings: no figure then, but the log
    alone = not config.training.num_workers and process_count() == 1
    failed = {"n_failed": crops.audio.n_failed} if alone else {}
    folder.mark_complete({"steps": state.step, **failed, **_summary(state, model, objective, scores)})
    return folder.path("model")


def _accelerator(
    config: Config, folder: RunFolder, precision: str, trackers: list[GeneralTracker | str]
) -> Accelerator:
    """Devices and processes of the training, which computes in this precision."""
    AcceleratorState._reset_state()  # an earlier stage of this process may have computed in another precision
    return Accelerator(
        mixed_precision={"fp32": "no"}.get(precision, precision),
        cpu=resolve_device() == "cpu",
        log_with=trackers,
        project_dir=str(folder.folder),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.training.process_timeout_s))],
    )


def _summary(state: TrainState, model: LMSPTModel, objective: Objective, scores: dict[str, float]) -> dict[str, object]:
    """What the run folder keeps of a training that is over."""
    return {
        "fingerprint": model.fingerprint(),
        "distillation_weight": objective.distillation_weight,
        "probe_weight": objective.probe_weight,
        "non_finite_steps": state.health.non_finite_steps,
        "skipped_discriminator_steps": state.health.skipped_discriminator_steps,
        "warnings": list(state.health.warnings.values()),
        **{name: round(value, 4) for name, value in scores.items()},
    }
