"""Training of a small model beside the LLM with transformers' Trainer: its keys, its arguments, from start to end.

The acoustic stage and the text-aligned model are trained so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from slm.training.checkpoints import newest_checkpoint
from slm.training.config import ADJUSTABLE, EXTENDABLE, TrainingError
from slm.training.finite_steps import FiniteSteps


@dataclass
class SmallModelTraining:
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


class SmallModelTrainer(Trainer):
    """A Trainer that keeps the data set's order and scores the valid items.

    Args:
        valid: What is scored; empty: nothing.
        scores: From the model and these items to figures by name.
    """

    def __init__(
        self, *args: Any, valid: Sequence[Any], scores: Callable[[Any, Sequence[Any]], dict[str, float]], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.valid, self.scores = valid, scores
        self.model_accepts_loss_kwargs = False  # the loss is the batch's mean

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The scores of the valid items, `eval_loss` among them."""
        found = self.scores(self.accelerator.unwrap_model(self.model), self.valid)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def training_arguments(
    config: SmallModelTraining,
    folder: str | Path,
    *,
    seed: int,
    device: str,
    precision: str,
    processes: int,
    scored: bool,
) -> TrainingArguments:
    """What the Trainer is told.

    Args:
        config: Steps and rates.
        folder: Where the `checkpoint-N` folders go.
        seed: Decides dropout.
        device: "cpu" or "cuda".
        precision: "fp32", "bf16" or "fp16": what autocast computes in.
        processes: How many the launcher was asked for.
        scored: Whether there is something to score every `eval_steps`.

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
        eval_strategy="steps" if scored else "no",
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
    return arguments


def train_to_the_end(trainer: Trainer, tensorboard: str | Path | None = None) -> None:
    """Trains, going on from the newest whole checkpoint if there is one.

    Args:
        trainer: With the arguments of :func:`training_arguments`.
        tensorboard: Folder of TensorBoard's events.

    Raises:
        FloatingPointError: The gradient was not finite in several steps in a row.
    """
    arguments = trainer.args
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(FiniteSteps(trainer))
    if tensorboard is not None and trainer.is_world_process_zero():
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(tensorboard))))
    with arguments.main_process_first(desc="looking for checkpoints"):
        checkpoint = newest_checkpoint(arguments.output_dir)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.remove_callback(TensorBoardCallback)  # it closed its file and would open another one elsewhere
