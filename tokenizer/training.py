"""The codec training loop: TrainState, train_step (discriminator, then generator), validate, fit.

All randomness comes with the batch, drawn from (seed, step, sample): a state is weights, optimizers and a step number.

Shapes: B batch, S samples, D teacher width, K books.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from tokenizer.configuration import LMSPTConfig
from tokenizer.crops import TrainingCrops
from tokenizer.losses import discriminator_loss
from tokenizer.modeling import LMSPTModel, LMSPTOutput
from tokenizer.objective import Objective, codec_losses, halves, loss_weights
from tokenizer.state_files import save_state
from tokenizer.validation import mean, validate

logger = logging.getLogger(__name__)

Metrics = dict[str, float]
NON_FINITE_LIMIT = 5


@dataclass
class CodecTrainingConfig:
    """Steps, batch and optimizer. Learning rate, betas and clipping default to the published ones."""

    steps: int = field(default=4000, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=16, metadata={"help": "crops per step and process"})
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate, generator and discriminators"})
    betas: tuple[float, float] = field(default=(0.8, 0.9), metadata={"help": "AdamW's betas"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay"})
    gradient_clip: float = field(default=1.0, metadata={"help": "largest gradient norm, each optimizer"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up"})
    final_lr_share: float = field(default=0.1, metadata={"help": "cosine decay down to this share of the peak"})
    usage_decay: float = field(
        default=0.97, metadata={"help": "per step, of the running use by which entries count as dead"}
    )
    revive_steps: int = field(default=50, metadata={"help": "steps between revivals of dead codes; 0: never"})
    revive_until: float = field(
        default=0.8, metadata={"help": "share of the training after which books are left alone"}
    )
    log_steps: int = field(default=25, metadata={"help": "steps between logged metrics"})
    validate_steps: int = field(default=500, metadata={"help": "steps between validations"})
    validate_crops: int = field(default=32, metadata={"help": "crops of the valid split to validate on"})
    save_steps: int = field(default=500, metadata={"help": "steps between checkpoints"})
    keep_checkpoints: int = field(default=2, metadata={"help": "newest checkpoints to keep"})
    num_workers: int = field(default=0, metadata={"help": "processes that load and augment audio"})

    def __post_init__(self) -> None:
        least = {"revive_steps": 0, "num_workers": 0, "warmup_steps": 0}
        counts = (
            "steps",
            "batch_size",
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
        if problems:
            raise ValueError("training: " + "; ".join(problems))


@dataclass
class TrainState:
    """Every object with a state. A checkpoint is this and nothing else."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    discriminator: nn.Module | None = None
    discriminator_optimizer: torch.optim.Optimizer | None = None
    step: int = 0

    @property
    def model_config(self) -> LMSPTConfig:
        """The tokenizer's sizes, whatever wraps the model."""
        return getattr(self.model, "module", self.model).config


def learning_rate_share(step: int, config: CodecTrainingConfig) -> float:
    """Linear warm-up, then a cosine from 1 to `final_lr_share`: a function of the step alone."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.final_lr_share + (1 - config.final_lr_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train_step(
    state: TrainState,
    batch: dict[str, Tensor],
    objective: Objective,
    config: CodecTrainingConfig,
    accelerator: Accelerator,
) -> Metrics:
    """One step: the discriminators on real and generated crops, then the generator on all its losses."""
    share = learning_rate_share(state.step, config)
    for optimizer in filter(None, (state.optimizer, state.discriminator_optimizer)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * share
    target = batch["input_values"]
    with accelerator.autocast():
        output: LMSPTOutput = state.model(**batch)
    metrics: Metrics = {"learning_rate": config.learning_rate * share}
    adversarial = state.discriminator is not None and state.step >= objective.discriminator_start
    if adversarial:
        metrics |= _discriminator_step(state, target, output.audio_values.detach(), config, accelerator)

    with accelerator.autocast():
        losses = codec_losses(
            objective, output, target, state.model_config, state.discriminator if adversarial else None
        )
    weights = loss_weights(objective)
    loss = sum(weights[name] * value for name, value in losses.items() if name in weights)
    metrics |= {f"loss/{name}": value.item() for name, value in losses.items()} | {"loss/total": loss.item()}
    if not math.isfinite(metrics["loss/total"]):
        return metrics
    state.optimizer.zero_grad()
    accelerator.backward(loss)
    metrics["gradient_norm"] = float(accelerator.clip_grad_norm_(state.model.parameters(), config.gradient_clip))
    if not math.isfinite(metrics["gradient_norm"]):
        return metrics
    state.optimizer.step()

    model: LMSPTModel = accelerator.unwrap_model(state.model)
    model.update_usage(output, config.usage_decay)
    if (
        config.revive_steps
        and state.step % config.revive_steps == 0
        and state.step < config.revive_until * config.steps
    ):
        generator = torch.Generator().manual_seed(state.step)
        metrics["revived"] = float(sum(model.revive_dead_codes(output, generator)))
    return metrics


def _discriminator_step(
    state: TrainState, real: Tensor, fake: Tensor, config: CodecTrainingConfig, accelerator: Accelerator
) -> Metrics:
    with accelerator.autocast():
        features = state.discriminator(torch.cat([real, fake]))
        loss = discriminator_loss(*halves(features))
    if not torch.isfinite(loss):
        return {"loss/discriminator": loss.item()}
    state.discriminator_optimizer.zero_grad()
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(state.discriminator.parameters(), config.gradient_clip)
    state.discriminator_optimizer.step()
    return {"loss/discriminator": loss.item(), "gradient_norm/discriminator": float(norm)}


def fit(
    state: TrainState,
    crops: TrainingCrops,
    validation: Tensor | None,
    objective: Objective,
    config: CodecTrainingConfig,
    accelerator: Accelerator,
    checkpoints: Path,
) -> TrainState:
    """Trains from `state.step` to `config.steps`, with metrics through accelerate's trackers and checkpoints by step.

    Raises:
        FloatingPointError: if the loss is not finite in several steps in a row; the last checkpoint is untouched.
    """
    state.model.train()
    start = state.step * config.batch_size * accelerator.num_processes
    loader = DataLoader(
        Subset(crops, range(start, len(crops))), config.batch_size, num_workers=config.num_workers, drop_last=True
    )
    loader = accelerator.prepare(loader)
    bar = tqdm(total=config.steps, initial=state.step, desc="train-tokenizer", disable=not accelerator.is_main_process)
    bad_steps, since = 0, time.perf_counter()
    window: list[Metrics] = []
    for batch in loader:
        metrics = train_step(state, batch, objective, config, accelerator)
        state.step += 1
        finite = math.isfinite(metrics["loss/total"]) and math.isfinite(metrics.get("gradient_norm", math.nan))
        bad_steps = 0 if finite else bad_steps + 1
        if bad_steps == NON_FINITE_LIMIT:
            raise FloatingPointError(
                f"loss or gradient was not finite in {bad_steps} steps in a row (step {state.step}): lower "
                f"training.learning_rate or use precision=fp32; checkpoints in {checkpoints} are untouched"
            )
        window.append(metrics)
        if state.step % config.log_steps == 0:
            metrics = {name: mean([m[name] for m in window if name in m]) for name in metrics}
            metrics["seconds_per_step"] = (time.perf_counter() - since) / len(window)
            window, since = [], time.perf_counter()
            accelerator.log(metrics, step=state.step)
            bar.set_postfix(mel=f"{metrics['loss/mel']:.2f}", distil=f"{metrics.get('loss/distillation_share', 0):.3f}")
        bar.update()
        if validation is not None and state.step % config.validate_steps == 0 and accelerator.is_main_process:
            scores = validate(accelerator.unwrap_model(state.model), validation.to(accelerator.device), objective)
            accelerator.log(scores, step=state.step)
            logger.info("step %d: %s", state.step, ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        if state.step % config.save_steps == 0 or state.step == config.steps:
            save_state(state, checkpoints, config.keep_checkpoints, accelerator)
        if state.step >= config.steps:
            break
    bar.close()
    return state
