"""Training an acoustic stage with transformers' Trainer: what comes out depends on (seed, step, sample) alone.

Shapes as in `samples`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerCallback

from slm.acoustic.samples import AcousticSamples, Item, VoicedUtterances, collate
from slm.acoustic.stages import Stage, kind_of
from slm.training.checkpoints import CheckpointMarker, SettingsOfThisRun
from slm.training.small_models import SmallModelTrainer, SmallModelTraining, train_to_the_end, training_arguments


@dataclass
class AcousticTraining(SmallModelTraining):
    """How long and how fast."""


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
) -> SmallModelTrainer:
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
    trainer = SmallModelTrainer(
        model=model,
        args=arguments,
        train_dataset=AcousticSamples(utterances, kind_of(model.config).draw, config.steps * config.batch_size, seed),
        eval_dataset=valid or None,
        data_collator=collate,
        valid=valid,
        scores=kind_of(model.config).scores,
        callbacks=[*callbacks, CheckpointMarker(), SettingsOfThisRun()],
    )
    train_to_the_end(trainer, tensorboard)
    return trainer
