"""The settings of a codec training and its state, which is every object that a checkpoint holds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tokenizer.data.mixing import TrainingAudio
from tokenizer.model.code_use import CodeCounts
from tokenizer.model.configuration import LMSPTConfig
from tokenizer.settings import ADJUSTABLE, EXTENDABLE

Metrics = dict[str, float]
Batch = dict[str, Tensor | list[int]]  # LMSPTModel.forward's arguments, and `characters`


@dataclass
class CodecTrainingConfig:
    """Steps, batch and optimizer. Peak learning rate, betas, warm-up and clipping default to the published ones."""

    steps: int = field(
        default=4000,
        metadata={"help": "optimizer steps; a run, a complete one too, goes on where there are more", **EXTENDABLE},
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
        metadata={
            "help": "forward passes per step, of batch_size / (accumulation x processes) crops each",
            **ADJUSTABLE,
        },
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
    log_steps: int = field(default=25, metadata={"help": "steps between logged metrics", **ADJUSTABLE})
    validate_steps: int = field(default=500, metadata={"help": "steps between validations", **ADJUSTABLE})
    validate_crops: int = field(default=32, metadata={"help": "crops of the valid split to validate on"})
    save_steps: int = field(default=500, metadata={"help": "steps between checkpoints", **ADJUSTABLE})
    keep_checkpoints: int = field(default=2, metadata={"help": "newest checkpoints to keep", **ADJUSTABLE})
    num_workers: int = field(
        default=0,
        metadata={"help": "processes that load and augment audio, beside each training process", **ADJUSTABLE},
    )
    process_timeout_s: float = field(
        default=7200.0,
        metadata={
            "help": "how long processes wait for each other before they give up, in seconds: longer than the first "
            "one takes to validate, to measure the teacher, and to write a checkpoint",
            **ADJUSTABLE,
        },
    )
    activation_checkpointing: bool = field(
        default=False, metadata={"help": "recompute the blocks in the backward pass: less memory, slower", **ADJUSTABLE}
    )
    compile: bool = field(
        default=False, metadata={"help": "torch.compile the encoders and decoders (needs a C++ compiler)", **ADJUSTABLE}
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
class HealthRecord:
    """What survives a resume, with the checkpoint: the counts of steps left out, what was said, the best validation.

    The rest starts anew: steps in a row that were not finite (a resumed run gets its five tries) and how long a fault
    has lasted (a fault that lasts is found again).
    """

    non_finite_steps: int = 0
    skipped_discriminator_steps: int = 0  # of the discriminators, by their own loss and gradient
    warnings: dict[str, str] = field(default_factory=dict)  # name -> the line in the log
    best_step: int = 0
    best_valid_mel: float = math.inf
    best_train_mel: float = math.inf

    def state_dict(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restores `state_dict`."""
        for name, value in state.items():
            setattr(self, name, value)

    def forget_best(self) -> None:
        """Drops the best validation: those to come are of other recordings."""
        self.best_step, self.best_valid_mel, self.best_train_mel = 0, math.inf, math.inf


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


def averaged(model: nn.Module, decay: float) -> AveragedModel | None:
    """A running mean of the model's weights; None for decay 0. Buffers are copied as they are."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
