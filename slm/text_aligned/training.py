"""Training a text-aligned model with transformers' Trainer: what comes out depends on (seed, step, sample) alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainerCallback

from slm.text_aligned.evaluation import code_scores
from slm.text_aligned.modeling import TextAlignedModel
from slm.text_aligned.samples import Item, TextAlignedSamples, collate
from slm.training.checkpoints import CheckpointMarker, SettingsOfThisRun
from slm.training.config import TrainingError
from slm.training.small_models import SmallModelTrainer, SmallModelTraining, train_to_the_end, training_arguments


@dataclass
class TextAlignedTraining(SmallModelTraining):
    """How long, how fast, and what is asked."""

    text_alone: float = field(
        default=0.1,
        metadata={
            "help": "share of the samples that are rebuilt from their text alone, so that the model can speak without "
            "word codes too; 1: all of them, a baseline"
        },
    )
    alignment_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of the loss on a word's attention outside its own frames; above 0 the corpus needs the "
            "column words (`slm align`)"
        },
    )

    quantizer_warmup_steps: int = field(
        default=300,
        metadata={"help": "steps before words are quantized; without them all words soon have one code"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantizer_warmup_steps < 0:
            raise TrainingError(f"training.quantizer_warmup_steps: {self.quantizer_warmup_steps} must be 0 or more")
        if not 0 <= self.text_alone <= 1:
            raise TrainingError(f"training.text_alone: {self.text_alone:g} must lie in [0, 1]")
        if self.alignment_weight < 0:
            raise TrainingError(f"training.alignment_weight: {self.alignment_weight:g} must be 0 or more")


def train_text_aligned(
    model: TextAlignedModel,
    items: Sequence[Item],
    valid: Sequence[Item],
    config: TextAlignedTraining,
    folder: str | Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    precision: str = "fp32",
    processes: int = 1,
    callbacks: Sequence[TrainerCallback] = (),
    tensorboard: str | Path | None = None,
) -> SmallModelTrainer:
    """Trains a model, going on from the newest whole checkpoint in `folder` if there is one.

    Args:
        model: The model.
        items: What it learns from.
        valid: What it is scored on every `eval_steps`; empty: never.
        config: Steps and rates.
        folder: Where the `checkpoint-N` folders go.
        seed: Decides order and dropout.
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
        train_dataset=TextAlignedSamples(items, config.steps * config.batch_size, config.text_alone, seed),
        eval_dataset=list(valid) or None,
        data_collator=collate,
        valid=valid,
        scores=code_scores,
        callbacks=[*callbacks, CheckpointMarker(), SettingsOfThisRun()],
    )
    train_to_the_end(trainer, tensorboard)
    return trainer
