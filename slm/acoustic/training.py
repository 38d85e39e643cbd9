"""Training an acoustic stage with transformers' Trainer: what comes out depends on (seed, step, sample) alone.

Shapes as in `samples`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from slm.acoustic.samples import AcousticSamples, Item, VoicedUtterances, collate
from slm.acoustic.stages import Stage, kind_of
from slm.training.checkpoints import CheckpointMarker, SettingsOfThisRun, newest_checkpoint
from slm.training.config import ADJUSTABLE, EXTENDABLE, TrainingError


@dataclass
class AcousticTraining:
    """How long and how fast."""

    steps: int = field(
        default=3000,
        metadata={"help": "optimizer steps; a run, a complete one too, goes on where there are more", **EXTENDABLE},
    )
    batch_size: int = field(default=16, metadata={"help": "utterances a step sees, over all processes"})
    learning_rate: float = field(default=1e-3, metadata={"help": "highest learning rate (AdamW, cosine)"})
    warmup_steps: int = field(default=100, metadata={"help": "steps in which the learning rate rises"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW's weight decay"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    log_steps: int = field(default=20, metadata={"help": "steps between two logged losses", **ADJUSTABLE})
    eval_steps: int = field(default=500, metadata={"help": "steps between two scores of the valid split", **ADJUSTABLE})
    save_steps: int = field(default=250, metadata={"help": "steps between two checkpoints", **ADJUSTABLE})
    keep_checkpoints: int = field(default=2, metadata={"help": "checkpoints kept on disk, at least 2", **ADJUSTABLE})
    process_timeout_s: float = field(
        default=7200.0,
        metadata={
            "help": "how long processes wait for each other before they give up, in seconds: longer than the first "
            "one takes to evaluate, and to write a checkpoint",
            **ADJUSTABLE,
        },
    )

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_steps", "eval_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise TrainingError(f"training.{name}: {getattr(self, name)} must be at least 1")
        if self.process_timeout_s < 1:
            raise TrainingError(
                f"training.process_timeout_s: {self.process_timeout_s:g} must be at least 1; 7200 are two hours"
            )
        if self.keep_checkpoints < 2:
            raise TrainingError("training.keep_checkpoints: at least 2, so that a torn one leaves the one before")


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
    if config.batch_size % processes:
        raise TrainingError(f"training.batch_size: {config.batch_size} cannot be divided among {processes} processes")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size // processes,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.log_steps,
        eval_strategy="steps" if valid else "no",
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
        save_total_limit=config.keep_checkpoints,
        ddp_timeout=round(config.process_timeout_s),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device == "cpu",
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
        disable_tqdm=True,
        report_to="none",
    )
    if not arguments.use_cpu and arguments.world_size == 1:
        # With several GPUs in one process the Trainer would take that many batches as one, for DataParallel.
        arguments._n_gpu = min(1, arguments.n_gpu)
    trainer = AcousticTrainer(
        model=model,
        args=arguments,
        train_dataset=AcousticSamples(utterances, kind_of(model.config).draw, config.steps * config.batch_size, seed),
        eval_dataset=valid or None,
        data_collator=collate,
        valid=valid,
        callbacks=[*callbacks, CheckpointMarker(), SettingsOfThisRun()],
    )
    trainer.remove_callback(PrinterCallback)
    if tensorboard is not None and trainer.is_world_process_zero():
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(tensorboard))))
    with arguments.main_process_first(desc="looking for checkpoints"):
        checkpoint = newest_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.remove_callback(TensorBoardCallback)  # it closed its file and would open another one elsewhere
    return trainer
