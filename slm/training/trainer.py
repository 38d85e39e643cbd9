"""Fine-tuning on transformers' Trainer: packed batches, a loss weighted per task, checkpoints that resume bit for bit.

Shapes: R rows of length L, V ids; `input_ids`, `labels`, `position_ids`, `loss_weights` (R, L); logits (R, L, V).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from slm.further_books import further_books_of
from slm.multi_token import multi_token_heads_of
from slm.tasks.sequences import IGNORE
from slm.training.answer_loss import AnswerLoss
from slm.training.batches import ONE_ROW, Batch, PackedBatches, evaluation_batches, with_steps
from slm.training.checkpoints import CheckpointMarker, SettingsOfThisRun, newest_checkpoint
from slm.training.config import SHORT_ROW, TrainingConfig, TrainingError, training_arguments
from slm.training.finite_steps import FiniteSteps
from slm.training.packing import packing_leaks
from slm.training.samples import Samples
from slm.training.zero_checkpoints import (
    UniversalResume,
    convert_for,
    read_universal,
    remove_universal,
    written_by_others,
)

log = logging.getLogger(__name__)

Measure = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Objective:
    """What is minimised, on what: the answers' loss on packed sequences, or another.

    Others: `slm.training.objectives`, `slm.training.preference`.

    Args:
        trainer: The Trainer whose `compute_loss` is minimised; takes what `SpeechTrainer` does.
        batches: What each optimizer step sees; takes what `PackedBatches` does.
        evaluates_first: Whether an evaluation comes before the first step too; not again after a resume.
    """

    trainer: Callable[..., SpeechTrainer]
    batches: Callable[..., PackedBatches] = PackedBatches
    evaluates_first: bool = False


def bare_model(model: nn.Module) -> nn.Module:
    """The causal LM in a PeftModel; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class SpeechTrainer(Trainer):
    """A Trainer whose loss is divided by all weighted answer tokens of the optimizer step, wherever they are."""

    def __init__(
        self,
        *args: Any,
        evaluation: dict[str, list[Batch]],
        task_weights: dict[str, float],
        embedding_learning_rate: float | None = None,
        decayed_tables: bool = True,
        measure: Measure | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.measure = measure
        self.evaluation, self.task_weights = evaluation, task_weights
        self.embedding_learning_rate, self.decayed_tables = embedding_learning_rate, decayed_tables
        self.answer_loss = self._answer_loss()
        # Of the newest batch outside of training what an objective takes beside its loss: sums and their weights.
        self._beside: torch.Tensor | None = None
        self._figures: dict[str, tuple[float, int]] = {}
        self._micro_batch = (0, -1)  # the step, and the newest of its micro-batches in this process
        # Tells the Trainer that compute_loss below already divides by the whole step.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The Trainer's, without the tables where rows of them have to stay (`slm.freezing`)."""
        names = super().get_decay_parameter_names(model)
        if self.decayed_tables:
            return names
        tables = self._tables(model)
        own = {name for name, parameter in model.named_parameters() if id(parameter) in tables}
        return [name for name in names if name not in own]

    @staticmethod
    def _tables(model: nn.Module) -> set[int]:
        bare = bare_model(model)
        modules = (bare.get_input_embeddings(), bare.get_output_embeddings(), further_books_of(bare))
        return {id(p) for module in modules if module is not None for p in module.parameters()}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer; tables that have a learning rate of their own are groups of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self.embedding_learning_rate is not None:
            tables = self._tables(self.model if model is None else model)
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in tables]
                if own:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in tables]
                    optimizer.add_param_group({**group, "params": own, "lr": self.embedding_learning_rate})
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The step's micro-batches and the sum of their loss weights over all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            total += batch["loss_weights"][:, 1:].sum(dtype=torch.float64).cpu()
        total = total.to(device=device, dtype=torch.float32)
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        return batches, total

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's; what dropout draws follows from seed, step and micro-batch, in whichever process that is."""
        step, newest = self._micro_batch
        self._micro_batch = (step, newest + 1) if step == self.state.global_step else (self.state.global_step, 0)
        step, own = self._micro_batch
        drawn_from = [self.args.seed, step, own * self.args.world_size + self.args.process_index]
        torch.manual_seed(int(np.random.SeedSequence(drawn_from).generate_state(1, np.uint64)[0]))
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Weighted cross-entropy; `num_items_in_batch` is the sum of weights over the whole optimizer step."""
        total, outputs = self._weighted_sum(model, inputs)
        # Engines average gradients over processes: this process's share is scaled up by their number first.
        loss = total / num_items_in_batch.clamp_min(1e-8) * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _answer_loss(self) -> AnswerLoss | None:
        """The loss that makes no logits of the whole batch; None where the model or its engine cannot have it."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None  # they hold parts of the head's weights, and only while the model itself runs
        bare = bare_model(self.model)
        if (loss := AnswerLoss.of(bare, self.model)) is not None:
            return loss
        log.warning(
            "%s changes its logits after the head: the loss takes those of whole micro-batches, 12 bytes a token and "
            "row of the vocabulary; where memory runs out, raise training.gradient_accumulation",
            type(bare).__name__,
        )
        return None

    def _weighted_sum(self, model: nn.Module, inputs: Batch) -> tuple[torch.Tensor, Any]:
        if self.answer_loss is not None:
            names = ("input_ids", "position_ids", "labels")
            parts = (inputs[name] for name in names)
            return self.answer_loss(model, *parts, inputs["loss_weights"], ignored=IGNORE), None
        outputs = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
        labels, weights = inputs["labels"][:, 1:], inputs["loss_weights"][:, 1:]
        answered = labels != IGNORE
        losses = F.cross_entropy(outputs.logits[:, :-1][answered].float(), labels[answered], reduction="none")
        return (losses * weights[answered]).sum(), outputs

    def note(self, **figures: torch.Tensor) -> None:
        """Takes down values, whose means stand beside the next loss that is logged."""
        for name, values in figures.items():
            total, count = self._figures.get(name, (0.0, 0))
            self._figures[name] = total + float(values.detach().double().sum()), count + values.numel()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with the means of what was noted since the last loss."""
        if "loss" in logs:
            logs = logs | {name: total / count for name, (total, count) in self._figures.items() if count}
            self._figures.clear()
        super().log(logs, *args, **kwargs)

    def _further_figures(self, beside: torch.Tensor) -> dict[str, float]:
        """What an objective tells of a task beside its loss, from all of its `_beside`, (2, figures)."""
        return {}

    def _over_processes(self, sums: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(sums.to(self.args.device, torch.float32), reduction="sum").double().cpu()

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Mean loss per answer token of each task on the valid split, of all by the tasks' weights, and `measure`'s."""
        model = self.model_wrapped if self.is_deepspeed_enabled or self.is_fsdp_enabled else self.model
        model.eval()
        metrics, weighted, norm = {}, 0.0, 0.0
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        for task, batches in self.evaluation.items():
            sums, beside = torch.zeros(2, dtype=torch.float64), None
            # Sharded engines need as many forward passes in every process: the missing ones repeat a batch and count
            # nothing.
            for lap in range(-(-len(batches) // processes)):
                index = lap * processes + rank
                batch = self._prepare_inputs(batches[index % len(batches)])
                with torch.no_grad(), self.compute_loss_context_manager():
                    total, _ = self._weighted_sum(model, batch)
                if self._beside is not None:
                    beside = torch.zeros_like(self._beside) if beside is None else beside
                    beside += self._beside * (index < len(batches))
                if index < len(batches):
                    sums += torch.stack(
                        [total.double().cpu(), batch["loss_weights"][:, 1:].sum(dtype=torch.float64).cpu()]
                    )
            sums = self._over_processes(sums)
            metrics[f"{metric_key_prefix}_{task}_loss"] = float(sums[0] / sums[1])
            told = {} if beside is None else self._further_figures(self._over_processes(beside))
            metrics |= {f"{metric_key_prefix}_{task}_{name}": value for name, value in told.items()}
            weight = self.task_weights.get(task, 0.0)  # what is measured only
            weighted, norm = weighted + weight * float(sums[0]), norm + weight * float(sums[1])
        if norm:  # 0 where all that is valid is measured only
            metrics[f"{metric_key_prefix}_loss"] = weighted / norm
        if self.measure is not None:
            # By the first process alone; the others learn what it found, so that all choose and stop alike.
            found = [self.measure(self.model) if self.is_world_process_zero() else {}]
            for name, value in broadcast_object_list(found)[0].items():
                metrics[f"{metric_key_prefix}_{name}"] = value
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        model.train()
        return metrics

    def _load_best_model(self) -> None:
        """The Trainer's, from a checkpoint of another number of processes too."""
        best = Path(self.state.best_model_checkpoint)
        converts = self.is_deepspeed_enabled and written_by_others(best, self.args.world_size)
        if converts:
            convert_for(best, self.args)
            read_universal(self.model_wrapped, True)
        super()._load_best_model()
        if converts:
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                remove_universal(best)


class _Watch(TrainerCallback):
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
    if not arguments.use_cpu and arguments.world_size == 1:
        # With several GPUs in one process the Trainer would take that many items as one batch, for DataParallel.
        arguments._n_gpu = min(1, arguments.n_gpu)
    bare = bare_model(model)
    has_parts = further_books_of(bare) is not None or multi_token_heads_of(bare) is not None
    if has_parts and arguments.ddp_find_unused_parameters is None:
        # They run beside the model's forward pass, where DistributedDataParallel would take them for unused.
        arguments.ddp_find_unused_parameters = False
    if arguments.world_size != processes:
        raise TrainingError(
            f"{processes} processes were asked for, {arguments.world_size} came up; start with "
            f"`torchrun --nproc_per_node {processes} -m recipes.cli finetune ...`"
        )
    # transformers tells packed sequences apart for FlashAttention-2 only where a batch is one row.
    flash = "flash" in bare.config._attn_implementation
    row_length = ONE_ROW if flash and config.pack_length else config.pack_length
    batches = objective.batches(
        train_samples,
        steps=config.steps,
        tokens_per_step=config.tokens_per_step,
        micro_batches=config.gradient_accumulation * processes,
        pack_length=row_length,
        seed=seed,
    )
    evaluation = {}
    if evaluates and valid_samples is not None:
        micro_tokens = max(config.pack_length, config.tokens_per_step // (config.gradient_accumulation * processes))
        evaluation = evaluation_batches(valid_samples, micro_tokens, row_length)
    attention = bare.config._attn_implementation
    if config.attention == "auto" and device == "cpu" and 0 < config.pack_length <= SHORT_ROW:
        bare.set_attn_implementation("eager")
    trainer = objective.trainer(
        model=model,
        args=arguments,
        train_dataset=batches,
        eval_dataset=[0]
        if evaluates
        else None,  # evaluate() reads `evaluation`; the Trainer only asks whether there is one
        data_collator=_only,
        evaluation=evaluation,
        task_weights=dict(zip(train_samples.task_names, train_samples.task_weights, strict=True)),
        embedding_learning_rate=config.embedding_learning_rate,
        decayed_tables=not config.freeze_layers,
        measure=measure,
        callbacks=list(callbacks),
    )
    # An engine leaves the model on the CPU until it trains, where flash attention cannot be asked.
    if row_length and not (flash and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)):
        _check_packing(trainer.model, train_samples, rows=1 if flash else 2)
    if measure is not None and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        raise TrainingError("eval_transcripts: a sharded model writes no transcripts while it trains; set it to 0")
    trainer.remove_callback(PrinterCallback)
    if config.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(config.patience))
    trainer.add_callback(_Watch(trainer, config))
    trainer.add_callback(FiniteSteps(trainer))
    trainer.add_callback(CheckpointMarker())
    trainer.add_callback(SettingsOfThisRun())
    if tensorboard is not None and trainer.is_world_process_zero():
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(tensorboard))))
    with arguments.main_process_first(desc="looking for checkpoints"):
        checkpoint = newest_checkpoint(folder)
    if checkpoint and trainer.is_deepspeed_enabled and written_by_others(checkpoint, processes):
        convert_for(checkpoint, arguments)
        trainer.add_callback(UniversalResume(trainer, checkpoint))
    arguments.eval_on_start |= (objective.evaluates_first or evaluates_first) and evaluates and checkpoint is None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    bare.set_attn_implementation(attention)
    return trainer


def _check_packing(model: nn.Module, samples: Samples, rows: int) -> None:
    """Raises TrainingError where the model reads across the borders of packed sequences."""
    first, second = (samples.example(index, None).input_ids for index in (0, len(samples.lengths) - 1))
    if packing_leaks(model, first, second, rows):
        raise TrainingError(
            f"{type(bare_model(model)).__name__} does not keep packed sequences apart: the second of a row gives other "
            "logits than alone, so it would learn from what it cannot know. Set training.pack_length=0 (a row for each "
            "sequence), or take a model whose layers are all attention, in transformers' own code (Qwen2, Llama, ...)"
        )


def trained_weights(trainer: SpeechTrainer) -> tuple[nn.Module, dict[str, torch.Tensor] | None]:
    """The unwrapped model and its whole weights, gathered where an engine sharded them; call it in every process."""
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    return trainer.accelerator.unwrap_model(trainer.model), state


def _only(items: list[Batch]) -> Batch:
    """The one item that a batch is: rows are packed already."""
    (item,) = items
    return item
