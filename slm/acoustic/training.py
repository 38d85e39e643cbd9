"""Training an acoustic stage with transformers' Trainer: what comes out depends on (seed, step, sample) alone.

Shapes as in `samples`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from slm.acoustic.samples import AcousticSamples, Item, VoicedUtterances, collate
from slm.acoustic.stages import Stage, kind_of
from slm.training.checkpoints import CheckpointMarker, SettingsOfThisRun
from slm.training.small_models import SmallModelTraining, train_to_the_end, training_arguments


@dataclass
class AcousticTraining(SmallModelTraining):
    """How long and how fast."""


class AcousticTrainer(Trainer):
    """A Trainer that keeps the data set's order and scores the valid items."""

    def __init__(self, *args: Any, valid: Sequence[Item], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.valid = valid
        self.model_accepts_loss_kwargs = False  # the loss is the batch's mean

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """`eval_loss` and the other figures that the stage's kind has (`stages`), of the valid items."""
        model = self.accelerator.unwrap_model(self.model)
        scores = kind_of(model.config).scores(model, self.valid)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def train_acoustic(
    model: Stage,
    utterances: VoicedUtterances,
    valid: Sequence[Item],
    config: AcousticTraining,
    folder: str | Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    precision: str = "fp32",
    processes: int = 1,
    callbacks: Sequence[TrainerCallback] = (),
    tensorboard: str | Path | None = None,
) -> AcousticTrainer:
    """Trains a stage, going on from the newest whole checkpoint in `folder` if there is one.

    Args:
        model: The stage.
        utterances: What it learns from.
        valid: What it is scored on every `eval_steps`; empty: never.
        config: Steps and rates.
        folder: Where the `checkpoint-N` folders go.
        seed: Decides order, voices, masks or noise, and dropout.
        device: "cpu" or "cuda".
        precision: "fp32", "bf16" or "fp16": what autocast computes in.
        processes: How many the launcher was asked for.
        callbacks: Further Trainer callbacks.
        tensorboard: Folder of TensorBoard's events.

    Returns:
        The trainer, its model trained.

    Raises:
        TrainingError: The batch cannot be divided among the processes.
    """
    arguments = training_arguments(
        config, folder, seed=seed, device=device, precision=precision, processes=processes, scored=bool(valid)
    )
    trainer = AcousticTrainer(
        model=model,
        args=arguments,
        train_dataset=AcousticSamples(utterances, kind_of(model.config).draw, config.steps * config.batch_size, seed),
        eval_dataset=valid or None,
        data_collator=collate,
        valid=valid,
        callbacks=[*callbacks, CheckpointMarker(), SettingsOfThisRun()],
    )
    train_to_the_end(trainer, tensorboard)
    return trainer
