"""The codec training loop, fit. Settings and state stand in state.py, one step in step.py.

All randomness comes with the batch, drawn from (seed, step, sample), or from the step's number: a state is weights,
optimizers and a step number. Nothing draws from a global generator.

Shapes: B crops of a micro-batch, S samples.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from tokenizer.data.crops import StepBatches, TrainingCrops
from tokenizer.model.configuration import PARTS, LMSPTConfig
from tokenizer.training.checkpoints import save_state
from tokenizer.training.health import HealthMonitor
from tokenizer.training.objective import Objective, loss_weights
from tokenizer.training.parallel import start_equal
from tokenizer.training.revival import begin_trial
from tokenizer.training.state import Batch, CodecTrainingConfig, Metrics, TrainState
from tokenizer.training.step import train_step
from tokenizer.training.validation import validate

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Shows how far a training is."""

    def update(self) -> None:
        """One step further."""

    def show(self, **figures: str) -> None:
        """The newest figures."""

    def close(self) -> None:
        """The training's end."""


def frames_per_step(config: CodecTrainingConfig, samples: int, sizes: LMSPTConfig) -> int:
    """Code frames in a step of crops of so many samples, of all processes together."""
    return config.batch_size * -(-samples // sizes.hop_length)


def fit(
    state: TrainState,
    crops: TrainingCrops,
    validation: Sequence[Tensor] | None,
    objective: Objective,
    config: CodecTrainingConfig,
    accelerator: Accelerator,
    checkpoints: Path,
    progress: Progress | None = None,
) -> TrainState:
    """Trains from `state.step` to `config.steps`, with metrics through accelerate's trackers and checkpoints by step.

    `validation` are the batches of `validation_crops`, None to do without.

    Raises:
        FloatingPointError: if the loss is not finite in several steps in a row; the last checkpoint is untouched, and
            a file beside `checkpoints` names the recordings.
    """
    _prepare(state, config, accelerator)
    if state.step == 0:
        frames = frames_per_step(config, crops.samples, state.model_config)
        begin_trial(state.model.quantizer.books, frames, config.usage_decay)
    batches = _micro_batches(state, crops, config, accelerator)
    monitor = HealthMonitor(
        state, config, loss_weights(objective), objective.discriminator_start, crops, accelerator, checkpoints.parent
    )
    since, begun = time.perf_counter(), state.step
    while state.step < config.steps:
        parts = list(islice(batches, config.accumulation))
        with one_shape(accelerator.device):
            metrics = train_step(state, parts, objective, config, accelerator)
        state.step += 1
        monitor.step(metrics, _sound(metrics, accelerator), parts)
        if state.step % config.log_steps == 0:
            metrics = monitor.window()
            metrics["seconds_per_step"] = (time.perf_counter() - since) / (state.step - begun)
            since, begun = time.perf_counter(), state.step
            accelerator.log(metrics, step=state.step)
            if progress is not None:
                shown = {"mel": f"{metrics['loss/mel']:.2f}"}
                if "loss/distillation_share" in metrics:  # not where the teacher hears the main decoder alone
                    shown["distil"] = f"{metrics['loss/distillation_share']:.3f}"
                progress.show(**shown)
        if progress is not None:
            progress.update()
        if validation is not None and state.step % config.validate_steps == 0 and accelerator.is_main_process:
            scores = validate(state.result, validation, objective, state.projection)
            accelerator.log(scores, step=state.step)
            shown = {name: value for name, value in scores.items() if "_book_" not in name or name.endswith("_book_0")}
            logger.info("step %d: %s", state.step, ", ".join(f"{k} {v:.3f}" for k, v in shown.items()))
            monitor.validated(scores)
        if state.step % config.save_steps == 0 or state.step == config.steps:
            save_state(state, checkpoints, config.keep_checkpoints, accelerator)
    if progress is not None:
        progress.close()
    return state


@contextmanager
def one_shape(device: torch.device) -> Iterator[None]:
    """Inside, cuDNN measures once for each shape which of its ways is the fastest: a training's crops have one shape.

    Not where torch was asked for determinism: what is fastest differs from run to run, in the last bits too. Validation
    stays outside, since short recordings have shapes of their own.
    """
    cudnn = torch.backends.cudnn
    before, deterministic = cudnn.benchmark, cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    cudnn.benchmark = before or (device.type == "cuda" and not deterministic)
    try:
        yield
    finally:
        cudnn.benchmark = before


def _prepare(state: TrainState, config: CodecTrainingConfig, accelerator: Accelerator) -> None:
    """Puts the model in the form that training wants it in; its state_dict stays the same."""
    start_equal((state.model, state.discriminator, state.projection, state.ema), accelerator)
    state.model.train()
    if config.activation_checkpointing:
        state.model.activation_checkpointing_enable({"use_reentrant": False})
    if config.compile:  # part by part: what the model checks between them depends on the data
        for part in filter(None, (getattr(state.model, name, None) for name in PARTS)):
            part.compile()


def _micro_batches(
    state: TrainState, crops: TrainingCrops, config: CodecTrainingConfig, accelerator: Accelerator
) -> Iterator[Batch]:
    """This process's micro-batches from `state.step` on, on its device."""
    sampler = StepBatches(
        crops.audio,
        range(state.step, config.steps),
        config.batch_size,
        config.accumulation,
        accelerator.process_index,
        accelerator.num_processes,
    )
    on_gpu = accelerator.device.type == "cuda"
    loader = DataLoader(crops, batch_sampler=sampler, num_workers=config.num_workers, pin_memory=on_gpu)
    for batch in loader:
        yield on_device(batch, accelerator.device)


def on_device(batch: dict[str, Tensor], device: torch.device) -> Batch:
    """A collated batch of TrainingCrops as the model takes it: samples on the device, what it checks on the host.

    The model decides by lengths and counts, and would wait for a GPU to read them there, five times a forward pass.
    """
    batch = dict(batch)
    host = {"lengths": batch.pop("padding_mask").sum(dim=1), "n_acoustic_books": batch.pop("n_acoustic_books")}
    sent: Batch = send_to_device(batch, device, non_blocking=device.type == "cuda")
    return sent | {name: values.tolist() for name, values in host.items()}


def _sound(metrics: Metrics, accelerator: Accelerator) -> bool:
    """Whether a step was taken, or was left out so that fp16's loss scale can find its place."""
    if "overflow" in metrics:
        return accelerator.scaler.get_scale() > 1.0
    return math.isfinite(metrics["loss/total"]) and math.isfinite(metrics.get("gradient_norm", math.nan))
