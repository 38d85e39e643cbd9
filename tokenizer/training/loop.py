"""The codec training loop: its settings, TrainState, and fit. One step stands in step.py.

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
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from tokenizer.data.crops import StepBatches, TrainingCrops
from tokenizer.data.mixing import TrainingAudio
from tokenizer.model.configuration import PARTS, LMSPTConfig
from tokenizer.training.checkpoints import save_state
from tokenizer.training.code_use import CodeCounts
from tokenizer.training.health import HealthMonitor, HealthRecord
from tokenizer.training.objective import Objective, loss_weights
from tokenizer.training.parallel import start_equal
from tokenizer.training.revival import begin_trial
from tokenizer.training.step import Batch, Metrics, train_step
from tokenizer.training.validation import validate

logger = logging.getLogger(__name__)

# How a step is computed, or what is written beside it, not what comes out: a resumed run may set it otherwise.
FREE = {"may_change": True}
# How far: a run goes on to a larger value.
LONGER = {"may_grow": True}


@dataclass
class CodecTrainingConfig:
    """Steps, batch and optimizer. Peak learning rate, betas, warm-up and clipping default to the published ones."""

    steps: int = field(
        default=4000,
        metadata={"help": "optimizer steps; a run, a complete one too, goes on where there are more", **LONGER},
    )
    schedule_steps: int | None = field(
        default=None,
        metadata={
            "help": "steps over which the learning rates fall, and whose share revive_until is; null: steps. Set to "
            "the longest that a run may become, extending it changes nothing of the steps before",
            "null_means": "steps",
        },
    )
    batch_size: int = field(
        default=16, metadata={"help": "crops per step, of all processes and accumulations together"}
    )
    accumulation: int = field(
        default=1,
        metadata={"help": "forward passes per step, of batch_size / (accumulation x processes) crops each", **FREE},
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate"})
    discriminator_learning_rate: float | None = field(
        default=None, metadata={"help": "the discriminators' peak (published: 1e-3); null: learning_rate"}
    )
    discriminator_schedule: Literal["cosine", "constant"] = field(
        default="cosine",
        metadata={"help": "of the discriminators' rate: as the tokenizer's, or (published) constant, without warm-up"},
    )
    betas: tuple[float, float] = field(default=(0.8, 0.9), metadata={"help": "AdamW's betas"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay"})
    gradient_clip: float = field(default=1.0, metadata={"help": "largest gradient norm, each optimizer"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up"})
    final_lr_share: float = field(
        default=0.1, metadata={"help": "cosine decay down to this share of the peak (published: 0.25); 1: none"}
    )
    ema_decay: float = field(
        default=0.0,
        metadata={"help": "per step, of averaged weights, which are then validated and saved (0.999); 0: off"},
    )
    usage_decay: float | None = field(
        default=None,
        metadata={
            "help": "null: dead is an entry that was not chosen in 30 frames per entry of its book; one at a tenth of "
            "even use is by chance, at 5 % of the looks. A number: decay per step of the running use, and dead is what "
            "has under 5 % of even use"
        },
    )
    revive_steps: int = field(default=50, metadata={"help": "steps between revivals of dead codes; 0: never"})
    revive_until: float = field(
        default=0.8, metadata={"help": "share of the schedule (schedule_steps) after which books are left alone"}
    )
    log_steps: int = field(default=25, metadata={"help": "steps between logged metrics", **FREE})
    validate_steps: int = field(default=500, metadata={"help": "steps between validations", **FREE})
    validate_crops: int = field(default=32, metadata={"help": "crops of the valid split to validate on"})
    save_steps: int = field(default=500, metadata={"help": "steps between checkpoints", **FREE})
    keep_checkpoints: int = field(default=2, metadata={"help": "newest checkpoints to keep", **FREE})
    num_workers: int = field(
        default=0, metadata={"help": "processes that load and augment audio, beside each training process", **FREE}
    )
    process_timeout_s: float = field(
        default=7200.0,
        metadata={
            "help": "how long processes wait for each other before they give up, in seconds: longer than the first "
            "one takes to validate, to measure the teacher, and to write a checkpoint",
            **FREE,
        },
    )
    activation_checkpointing: bool = field(
        default=False, metadata={"help": "recompute the blocks in the backward pass: less memory, slower", **FREE}
    )
    compile: bool = field(
        default=False, metadata={"help": "torch.compile the encoders and decoders (needs a C++ compiler)", **FREE}
    )

    def __post_init__(self) -> None:
        least = {"revive_steps": 0, "num_workers": 0, "warmup_steps": 0}
        counts = (
            "steps",
            "batch_size",
            "accumulation",
            "log_steps",
            "validate_steps",
            "validate_crops",
            "save_steps",
            "keep_checkpoints",
        )
        least |= dict.fromkeys(counts, 1)
        problems = [
            f"{n}={getattr(self, n)}: must be at least {low}" for n, low in least.items() if getattr(self, n) < low
        ]
        problems += self._out_of_range()
        if self.schedule_steps is not None and self.schedule_steps < 1:
            problems.append(f"schedule_steps={self.schedule_steps}: must be at least 1, or null for steps")
        if self.accumulation > 0 and self.batch_size % self.accumulation:
            problems.append(f"batch_size={self.batch_size}: must divide by accumulation={self.accumulation}")
        if problems:
            raise ValueError("training: " + "; ".join(problems))

    @property
    def schedule_length(self) -> int:
        """Steps over which the learning rates fall and books are revived."""
        return self.schedule_steps or self.steps

    def _out_of_range(self) -> list[str]:
        checks = {
            "learning_rate": (self.learning_rate > 0, "must be above 0; to hold parts still, name them in freeze"),
            "discriminator_learning_rate": (
                self.discriminator_learning_rate is None or self.discriminator_learning_rate > 0,
                "must be above 0, or null for learning_rate",
            ),
            "discriminator_schedule": (
                self.discriminator_schedule in ("cosine", "constant"),
                "must be cosine or constant",
            ),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "each must lie in [0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "must not be negative; 0 turns it off"),
            "gradient_clip": (self.gradient_clip > 0, "must be above 0; a large value such as 1e9 turns it off"),
            "final_lr_share": (0 <= self.final_lr_share <= 1, "must lie in [0, 1]; 1 keeps the peak"),
            "ema_decay": (0 <= self.ema_decay < 1, "must lie in [0, 1); 0 turns it off"),
            "usage_decay": (
                self.usage_decay is None or 0 <= self.usage_decay < 1,
                "must lie in [0, 1), or null; revive_steps=0 turns revival off",
            ),
            "process_timeout_s": (self.process_timeout_s >= 1, "must be at least 1; 7200 are two hours"),
            "revive_until": (0 <= self.revive_until <= 1, "must lie in [0, 1]; 1 revives to the end"),
        }
        return [f"{name}={getattr(self, name)}: {words}" for name, (sound, words) in checks.items() if not sound]


@dataclass
class TrainState:
    """Every object with a state. A checkpoint is this and nothing else."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    discriminator: nn.Module | None = None
    discriminator_optimizer: torch.optim.Optimizer | None = None
    step: int = 0
    projection: nn.Module | None = None  # latents to the teacher's features, in the generator's optimizer
    ema: AveragedModel | None = None  # running mean of the model's weights
    audio: TrainingAudio | None = None  # for where the epochs of its streams began
    health: HealthRecord = field(default_factory=HealthRecord)
    counts: CodeCounts = field(default_factory=CodeCounts)  # of the codes since the last log; not kept

    @property
    def model_config(self) -> LMSPTConfig:
        """The tokenizer's sizes."""
        return self.model.config

    @property
    def result(self) -> nn.Module:
        """The tokenizer that is validated and saved: the averaged weights where there are any."""
        return self.model if self.ema is None else self.ema.module


class Progress(Protocol):
    """Who is told how far a training is."""

    def update(self) -> None:
        """One step further."""

    def show(self, **figures: str) -> None:
        """The newest figures."""

    def close(self) -> None:
        """The training's end."""


def frames_per_step(config: CodecTrainingConfig, samples: int, sizes: LMSPTConfig) -> int:
    """Code frames in a step of crops of so many samples, of all processes together."""
    return config.batch_size * -(-samples // sizes.hop_length)


def averaged(model: nn.Module, decay: float) -> AveragedModel | None:
    """A running mean of the model's weights; None for decay 0. Buffers are copied as they are."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None


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
                share = metrics.get("loss/distillation_share", 0)
                progress.show(mel=f"{metrics['loss/mel']:.2f}", distil=f"{share:.3f}")
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
