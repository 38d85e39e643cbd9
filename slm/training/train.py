"""A training from its start or its newest checkpoint to its end: arguments, batches, checks, callbacks, the run.

Begin with `train`; what is done at each step is `slm.training.trainer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from slm.model.further_books import further_books_of
from slm.model.multi_token import multi_token_heads_of
from slm.training.batches import ONE_ROW, Batch, evaluation_batches, with_steps
from slm.training.checkpoints import CheckpointMarker, SettingsOfThisRun, newest_checkpoint
from slm.training.config import SHORT_ROW, TrainingConfig, TrainingError, training_arguments
from slm.training.finite_steps import FiniteSteps
from slm.training.packing import packing_leaks, refuse_leaks
from slm.training.samples import Samples
from slm.training.trainer import Measure, Objective, SpeechTrainer, bare_model
from slm.training.zero_checkpoints import UniversalResume, convert_for, written_by_others


def train(
    model: nn.Module,
    train_samples: Samples,
    valid_samples: Samples | None,
    config: TrainingConfig,
    folder: str | Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    precision: str = "fp32",
    processes: int = 1,
    callbacks: Sequence[TrainerCallback] = (),
    tensorboard: str | Path | None = None,
    measure: Measure | None = None,
    objective: Objective | None = None,
    evaluates_first: bool = False,
) -> SpeechTrainer:
    """Trains a model, going on from the newest whole checkpoint in `folder` if there is one.

    Args:
        model: A causal LM or a PeftModel around one.
        train_samples: What to train on.
        valid_samples: What the loss is measured on every `eval_steps`; None for no such loss.
        config: Steps, rates, engine.
        folder: Where the `checkpoint-N` folders go.
        seed: Decides data order and noise, and dropout.
        device: "cpu" or "cuda".
        precision: "fp32", "bf16" or "fp16": what autocast computes in.
        processes: How many the launcher was asked for; checked.
        callbacks: Further Trainer callbacks.
        tensorboard: Folder of TensorBoard's events.
        measure: Further figures of each evaluation by name, of the model as it is in eval mode; not of one that an
            engine has sharded.
        objective: What is minimised; None: the loss of the answers.
        evaluates_first: Whether an evaluation comes before the first step too, where there are any; not again after a
            resume.

    Returns:
        The trainer, its model trained (with `keep: best`, that of lowest valid loss).

    Raises:
        TrainingError: Another number of processes or another engine than asked for came up, or the model reads
            across the borders of packed sequences.
        FloatingPointError: The gradient was not finite in several steps in a row.
    """
    config = with_steps(config, train_samples)
    objective = objective or Objective(SpeechTrainer)
    evaluates = (valid_samples is not None or measure is not None) and config.eval_steps > 0
    if config.keep == "best" and not evaluates:
        raise TrainingError("training.keep: best needs a valid split; the corpus has none, so take keep: last")
    arguments = training_arguments(
        config, folder, evaluates=evaluates, seed=seed, device=device, precision=precision, processes=processes
    )
    bare = bare_model(model)
    _set_parallelism(arguments, bare)
    _check_processes(arguments, processes)
    # transformers tells packed sequences apart for FlashAttention-2 only where a batch is one row.
    flash = "flash" in bare.config._attn_implementation
    row_length = ONE_ROW if flash and config.pack_length else config.pack_length
    micro_batches = config.gradient_accumulation * processes
    batches = objective.batches(
        train_samples,
        steps=config.steps,
        tokens_per_step=config.tokens_per_step,
        micro_batches=micro_batches,
        pack_length=row_length,
        seed=seed,
    )
    evaluation = {}
    if evaluates and valid_samples is not None:
        micro_tokens = max(config.pack_length, config.tokens_per_step // micro_batches)
        evaluation = evaluation_batches(valid_samples, micro_tokens, row_length)
    attention = bare.config._attn_implementation
    if config.attention == "auto" and device == "cpu" and 0 < config.pack_length <= SHORT_ROW:
        bare.set_attn_implementation("eager")
    trainer = objective.trainer(
        model=model,
        args=arguments,
        train_dataset=batches,
        # evaluate() reads `evaluation`; the Trainer only asks whether there is one.
        eval_dataset=[0] if evaluates else None,
        data_collator=_only,
        evaluation=evaluation,
        task_weights=dict(zip(train_samples.task_names, train_samples.task_weights, strict=True)),
        embedding_learning_rate=config.embedding_learning_rate,
        decayed_tables=not config.freeze_layers,
        measure=measure,
        callbacks=list(callbacks),
    )
    _check_packing(trainer, train_samples, row_length)
    if measure is not None and _is_sharded(trainer):
        raise TrainingError("eval_transcripts: a sharded model writes no transcripts while it trains; set it to 0")
    _add_callbacks(trainer, config, tensorboard)
    checkpoint = _checkpoint_to_resume(trainer, folder)
    arguments.eval_on_start |= (objective.evaluates_first or evaluates_first) and evaluates and checkpoint is None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    bare.set_attn_implementation(attention)
    return trainer


def trained_weights(trainer: SpeechTrainer) -> tuple[nn.Module, dict[str, torch.Tensor] | None]:
    """The unwrapped model and its whole weights, gathered where an engine sharded them; call it in every process."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if _is_sharded(trainer) else None
    return trainer.accelerator.unwrap_model(trainer.model), state


def _set_parallelism(arguments: TrainingArguments, model: nn.Module) -> None:
    """Sets what the Trainer would choose wrongly for these batches, and for a model with parts of ours."""
    if not arguments.use_cpu and arguments.world_size == 1:
        # With several GPUs in one process the Trainer would take that many items as one batch, for DataParallel.
        arguments._n_gpu = min(1, arguments.n_gpu)
    has_parts = further_books_of(model) is not None or multi_token_heads_of(model) is not None
    if has_parts and arguments.ddp_find_unused_parameters is None:
        # They run beside the model's forward pass, where DistributedDataParallel would take them for unused.
        arguments.ddp_find_unused_parameters = False


def _check_processes(arguments: TrainingArguments, asked: int) -> None:
    """Raises TrainingError where another number of processes came up than was asked for."""
    if arguments.world_size != asked:
        raise TrainingError(
            f"{asked} processes were asked for, {arguments.world_size} came up; start with "
            f"`torchrun --nproc_per_node {asked} -m recipes.cli finetune ...`"
        )


def _check_packing(trainer: SpeechTrainer, samples: Samples, row_length: int) -> None:
    """Raises TrainingError where the model reads across the borders of packed sequences."""
    one_row = row_length == ONE_ROW
    # An engine leaves the model on the CPU until it trains, where flash attention cannot be asked.
    if not row_length or (one_row and _is_sharded(trainer)):
        return
    first, second = (samples.example(index, None).input_ids for index in (0, len(samples.lengths) - 1))
    if packing_leaks(trainer.model, first, second, rows=1 if one_row else 2):
        raise refuse_leaks(bare_model(trainer.model))


def _add_callbacks(trainer: SpeechTrainer, config: TrainingConfig, tensorboard: str | Path | None) -> None:
    """Checks, checkpoints and events that every training has."""
    trainer.remove_callback(PrinterCallback)
    if config.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(config.patience))
    trainer.add_callback(_EngineCheck(trainer, config))
    trainer.add_callback(FiniteSteps(trainer))
    trainer.add_callback(CheckpointMarker())
    trainer.add_callback(SettingsOfThisRun())
    if tensorboard is not None and trainer.is_world_process_zero():
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(tensorboard))))


def _checkpoint_to_resume(trainer: SpeechTrainer, folder: str | Path) -> Path | None:
    """The newest whole checkpoint, if any; one that as many processes did not write is converted for these."""
    with trainer.args.main_process_first(desc="looking for checkpoints"):
        checkpoint = newest_checkpoint(folder)
    if checkpoint and trainer.is_deepspeed_enabled and written_by_others(checkpoint, trainer.args.world_size):
        convert_for(checkpoint, trainer.args)
        trainer.add_callback(UniversalResume(trainer, checkpoint))
    return checkpoint


def _is_sharded(trainer: SpeechTrainer) -> bool:
    return trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled


class _EngineCheck(TrainerCallback):
    """Checks that the engine is the one that was asked for."""

    def __init__(self, trainer: SpeechTrainer, config: TrainingConfig) -> None:
        self.trainer, self.config = trainer, config

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        wrapper = type(self.trainer.model_wrapped).__name__
        wanted = None
        # `accelerate launch` may bring an engine of its own file.
        if self.config.deepspeed or self.trainer.is_deepspeed_enabled:
            wanted = "DeepSpeedEngine"
        elif self.config.fsdp or self.trainer.is_fsdp_enabled:
            wanted = "FSDP" if wrapper.startswith("FSDP") else "FullyShardedDataParallel"
        elif args.world_size > 1:
            wanted = "DistributedDataParallel"
        if wanted and not wrapper.startswith(wanted):
            raise TrainingError(
                f"asked for {wanted} on {args.world_size} processes, but the model is wrapped as {wrapper}"
            )


def _only(items: list[Batch]) -> Batch:
    """The one item that a batch is: rows are packed already."""
    (item,) = items
    return item
