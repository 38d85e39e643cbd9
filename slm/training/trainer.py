"""Fine-tuning on transformers' Trainer: packed batches, a loss weighted per task, checkpoints that resume bit for bit.

Shapes: R rows of length L, V ids; `input_ids`, `labels`, `position_ids`, `loss_weights` (R, L); logits (R, L, V).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from slm.tasks.sequences import IGNORE
from slm.training.answer_loss import AnswerLoss
from slm.training.batches import Batch, PackedBatches, Samples, evaluation_batches
from slm.training.checkpoints import CheckpointMarker, SettingsOfThisRun, newest_checkpoint
from slm.training.packing import packing_leaks

log = logging.getLogger(__name__)

# Tokens up to which attention written out trains faster than the fused kernel on a CPU, whose backward pass is slow
# there: in bf16 a step takes 0.7 of the time at 128, 0.8 at 512.
SHORT_ROW = 512

# For a field's metadata: a resumed run may set it otherwise; the training may become longer.
ADJUSTABLE, EXTENDABLE = {"adjustable": True}, {"extendable": True}


class TrainingError(ValueError):
    """Settings that cannot be trained with, or an engine that is not the one asked for; the message says which."""


@dataclass
class TrainingConfig:
    """How an LLM is trained. A step is an optimizer step, over all processes."""

    steps: int = field(
        default=2000,
        metadata={"help": "optimizer steps; a run, a complete one too, goes on where there are more", **EXTENDABLE},
    )
    tokens_per_step: int = field(
        default=4096, metadata={"help": "tokens a step sees, over all processes and micro-batches"}
    )
    gradient_accumulation: int = field(
        default=1, metadata={"help": "micro-batches a step is split into, per process", **ADJUSTABLE}
    )
    pack_length: int = field(
        default=512, metadata={"help": "length of a row that sequences are packed into; 0: each has a row of its own"}
    )
    learning_rate: float = field(
        default=1e-4, metadata={"help": "highest learning rate (of a small LM from random weights about 1e-3)"}
    )
    schedule: Literal["cosine", "linear", "constant"] = field(
        default="cosine", metadata={"help": "how the learning rate falls after the warm-up"}
    )
    warmup_steps: int = field(default=100, metadata={"help": "steps in which the learning rate rises"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay"})
    adam_betas: tuple[float, float] = field(default=(0.9, 0.98), metadata={"help": "AdamW's betas"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    log_steps: int = field(default=20, metadata={"help": "steps between two logged losses", **ADJUSTABLE})
    eval_steps: int = field(
        default=200, metadata={"help": "steps between two losses on the valid split; 0: never", **ADJUSTABLE}
    )
    save_steps: int = field(
        default=200,
        metadata={"help": "steps between two checkpoints (with keep=best: among which to choose)", **ADJUSTABLE},
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "checkpoints kept on disk, at least 2", **ADJUSTABLE})
    keep: Literal["last", "best"] = field(
        default="last",
        metadata={
            "help": "which weights are saved: the last, or the checkpoint of lowest valid loss. The loss often "
            "turns while word "
            "errors still fall, so the last is the default; take best where a corpus is small and the run long"
        },
    )
    process_timeout_s: float = field(
        default=7200.0,
        metadata={
            "help": "how long processes wait for each other before they give up, in seconds: longer than the first "
            "one takes to evaluate, and to write a checkpoint",
            **ADJUSTABLE,
        },
    )
    attention: Literal["auto", "sdpa", "eager"] = field(
        default="auto",
        metadata={
            "help": "sdpa: fused; eager: written out; auto: fused where the model can, but for rows of up to "
            f"{SHORT_ROW} tokens on a CPU, where written out is faster",
            **ADJUSTABLE,
        },
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "trade time for memory", **ADJUSTABLE})
    deepspeed: str | None = field(
        default=None, metadata={"help": "a DeepSpeed JSON (shipped: deepspeed-zero2); needs torchrun"}
    )
    fsdp: str | None = field(
        default=None, metadata={"help": "FSDP options, e.g. 'full_shard auto_wrap'; needs torchrun"}
    )

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_step", "gradient_accumulation", "log_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise TrainingError(f"training.{name}: {getattr(self, name)} must be at least 1")
        if self.process_timeout_s < 1:
            raise TrainingError(
                f"training.process_timeout_s: {self.process_timeout_s:g} must be at least 1; 7200 are two hours"
            )
        if self.pack_length < 0:
            raise TrainingError(f"training.pack_length: {self.pack_length} must be at least 1, or 0 for no packing")
        if self.keep_checkpoints < 2:
            raise TrainingError("training.keep_checkpoints: at least 2, so that a torn one leaves the one before")
        if self.keep == "best" and (self.eval_steps < 1 or self.save_steps % self.eval_steps):
            raise TrainingError("training.keep: best needs eval_steps above 0 and save_steps a multiple of eval_steps")
        if self.deepspeed and self.fsdp:
            raise TrainingError("training.deepspeed and training.fsdp: choose one engine")


class SpeechTrainer(Trainer):
    """A Trainer whose loss is divided by all weighted answer tokens of the optimizer step, wherever they are."""

    def __init__(
        self, *args: Any, evaluation: dict[str, list[Batch]], task_weights: dict[str, float], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.evaluation, self.task_weights = evaluation, task_weights
        self.answer_loss = self._answer_loss()
        # Tells the Trainer that compute_loss below already divides by the whole step.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

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
        bare = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if bare.get_output_embeddings() is not None and (loss := AnswerLoss(bare)).fits(self.model):
            return loss
        log.info("%s changes its logits after the head: the loss takes those of the whole batch", type(bare).__name__)
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

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Mean loss per answer token of each task on the valid split, and of both with the tasks' weights."""
        model = self.model_wrapped if self.is_deepspeed_enabled or self.is_fsdp_enabled else self.model
        model.eval()
        metrics, weighted, norm = {}, 0.0, 0.0
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        for task, batches in self.evaluation.items():
            sums = torch.zeros(2, dtype=torch.float64)
            # Sharded engines need as many forward passes in every process: the missing ones repeat a batch and count
            # nothing.
            for lap in range(-(-len(batches) // processes)):
                index = lap * processes + rank
                batch = self._prepare_inputs(batches[index % len(batches)])
                with torch.no_grad(), self.compute_loss_context_manager():
                    total, _ = self._weighted_sum(model, batch)
                if index < len(batches):
                    sums += torch.stack(
                        [total.double().cpu(), batch["loss_weights"][:, 1:].sum(dtype=torch.float64).cpu()]
                    )
            sums = self.accelerator.reduce(sums.to(self.args.device, torch.float32), reduction="sum").double().cpu()
            metrics[f"{metric_key_prefix}_{task}_loss"] = float(sums[0] / sums[1])
            weight = self.task_weights[task]
            weighted, norm = weighted + weight * float(sums[0]), norm + weight * float(sums[1])
        metrics[f"{metric_key_prefix}_loss"] = weighted / norm
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        model.train()
        return metrics


class _Watch(TrainerCallback):
    """Checks that the engine is the one that was asked for."""

    def __init__(self, trainer: SpeechTrainer, config: TrainingConfig) -> None:
        self.trainer, self.config = trainer, config

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        wrapper = type(self.trainer.model_wrapped).__name__
        wanted = None
        if self.config.deepspeed:
            wanted = "DeepSpeedEngine"
        elif self.config.fsdp:
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
) -> SpeechTrainer:
    """Trains a model, going on from the newest whole checkpoint in `folder` if there is one.

    Args:
        model: A causal LM or a PeftModel around one.
        train_samples: What to train on.
        valid_samples: What `eval_steps` measures; None for no evaluation.
        config: Steps, rates, engine.
        folder: Where the `checkpoint-N` folders go.
        seed: Decides data order and noise, and dropout.
        device: "cpu" or "cuda".
        precision: "fp32", "bf16" or "fp16": what autocast computes in.
        processes: How many the launcher was asked for; checked.
        callbacks: Further Trainer callbacks.
        tensorboard: Folder of TensorBoard's events.

    Returns:
        The trainer, its model trained (with `keep: best`, that of lowest valid loss).

    Raises:
        TrainingError: Another number of processes or another engine than asked for came up, or the model reads
            across the borders of packed sequences.
    """
    evaluates = valid_samples is not None and config.eval_steps > 0
    if config.keep == "best" and not evaluates:
        raise TrainingError("training.keep: best needs a valid split; the corpus has none, so take keep: last")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.schedule, config.schedule),
        warmup_steps=min(config.warmup_steps, config.steps),
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_betas[0],
        adam_beta2=config.adam_betas[1],
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.log_steps,
        logging_first_step=True,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_steps if evaluates else None,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=config.keep_checkpoints,
        load_best_model_at_end=config.keep == "best",
        metric_for_best_model="loss" if config.keep == "best" else None,
        greater_is_better=False if config.keep == "best" else None,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device == "cpu",
        ddp_timeout=round(config.process_timeout_s),
        ddp_backend="gloo" if device == "cpu" and processes > 1 and dist.is_torchelastic_launched() else None,
        deepspeed=config.deepspeed,
        fsdp=config.fsdp or "",
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,  # the caller's callbacks show progress; the Trainer's own bar prints dictionaries
        **({"gradient_checkpointing": True} if config.gradient_checkpointing else {}),
    )
    if not arguments.use_cpu and arguments.world_size == 1:
        # With several GPUs in one process the Trainer would take that many items as one batch, for DataParallel.
        arguments._n_gpu = min(1, arguments.n_gpu)
    if arguments.world_size != processes:
        raise TrainingError(
            f"{processes} processes were asked for, {arguments.world_size} came up; start with "
            f"`torchrun --nproc_per_node {processes} -m recipes.cli finetune ...`"
        )
    batches = PackedBatches(
        train_samples,
        steps=config.steps,
        tokens_per_step=config.tokens_per_step,
        micro_batches=config.gradient_accumulation * processes,
        pack_length=config.pack_length,
        seed=seed,
    )
    evaluation = {}
    if evaluates:
        micro_tokens = max(config.pack_length, config.tokens_per_step // (config.gradient_accumulation * processes))
        evaluation = evaluation_batches(valid_samples, micro_tokens, config.pack_length)
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = bare.config._attn_implementation
    if config.attention == "auto" and device == "cpu" and 0 < config.pack_length <= SHORT_ROW:
        bare.set_attn_implementation("eager")
    trainer = SpeechTrainer(
        model=model,
        args=arguments,
        train_dataset=batches,
        eval_dataset=[0]
        if evaluates
        else None,  # evaluate() reads `evaluation`; the Trainer only asks whether there is one
        data_collator=_only,
        evaluation=evaluation,
        task_weights=dict(zip(train_samples.task_names, train_samples.task_weights, strict=True)),
        callbacks=list(callbacks),
    )
    if config.pack_length and not trainer.is_deepspeed_enabled and not trainer.is_fsdp_enabled:
        _check_packing(trainer.model, train_samples)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Watch(trainer, config))
    trainer.add_callback(CheckpointMarker())
    trainer.add_callback(SettingsOfThisRun())
    if tensorboard is not None and trainer.is_world_process_zero():
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(tensorboard))))
    with arguments.main_process_first(desc="looking for checkpoints"):
        checkpoint = newest_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    bare.set_attn_implementation(attention)
    return trainer


def _check_packing(model: nn.Module, samples: Samples) -> None:
    """Raises TrainingError where the model reads across the borders of packed sequences."""
    first, second = (samples.example(index, None).input_ids for index in (0, len(samples.lengths) - 1))
    if packing_leaks(model, first, second):
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        raise TrainingError(
            f"{type(bare).__name__} does not keep packed sequences apart: the second of a row gives other logits than "
            "alone, so it would be trained on what it cannot know. Set training.pack_length=0 (a row for each "
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
