"""How an LLM is trained: the keys of `training`, and the TrainingArguments of transformers that follow from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from slm.model.multi_token import MultiTokenSettings
from slm.training.alignment.config import AlignmentConfig
from slm.training.shared_codebook.config import SharedCodebookConfig

# Tokens up to which attention written out trains faster than the fused kernel on a CPU, whose backward pass is slow
# there: in bf16 a step takes 0.7 of the time at 128, 0.8 at 512.
SHORT_ROW = 512

# What TrainingArguments call `gradient_checkpointing`: the older name is deprecated where there is a newer one.
_NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"

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
    epochs: float | None = field(
        default=None,
        metadata={
            "help": "in place of steps: how often the training sees its data, the same seconds of speech whatever the "
            "frame rate; steps follow"
        },
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
    embedding_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "another one for the embedding table and an untied head (with LoRA: their new rows), which may "
            "take a higher one than pretrained layers; null: the same"
        },
    )
    schedule: Literal["cosine", "linear", "constant"] = field(
        default="cosine", metadata={"help": "how the learning rate falls after the warm-up"}
    )
    warmup_steps: int = field(default=100, metadata={"help": "steps in which the learning rate rises"})
    optim: str = field(
        default="adamw_torch_fused",
        metadata={
            "help": "the optimizer, as transformers names it: adamw_torch, adafactor, adamw_8bit (bitsandbytes) ..."
        },
    )
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
            "help": "which weights are saved: the last, or the best checkpoint by `keep_by`. The loss often "
            "turns while word "
            "errors still fall, so the last is the default; take best where a corpus is small and the run long"
        },
    )
    keep_by: str = field(
        default="loss",
        metadata={
            "help": "what keep=best goes by, the lower the better: loss, asr_loss (of any task) or, with "
            "eval_transcripts, asr_wer, asr_cer"
        },
    )
    patience: int | None = field(
        default=None,
        metadata={
            "help": "with keep=best: the training ends after so many evaluations without a better one; null: never"
        },
    )
    process_timeout_s: float = field(
        default=7200.0,
        metadata={
            "help": "how long processes wait for each other before they give up, in seconds: longer than the first "
            "one takes to evaluate, to write a checkpoint, and to convert one of DeepSpeed's for another number of "
            "processes",
            **ADJUSTABLE,
        },
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = field(
        default="auto",
        metadata={
            "help": "sdpa: fused; eager: written out; flash_attention_2: of the package flash-attn, on a GPU, for "
            "which a micro-batch is one row without padding; auto: sdpa where the model can, but for rows of up to "
            f"{SHORT_ROW} tokens on a CPU, where eager is faster",
            **ADJUSTABLE,
        },
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "trade time for memory", **ADJUSTABLE})
    freeze_layers: int = field(
        default=0,
        metadata={
            "help": "so many of the lowest layers, and the rows of text in the tables, keep their weights: the layers "
            "above learn speech (GOAT-TTS). Trained in full, with replay so that they do not unlearn text; 0: none"
        },
    )
    multi_token: MultiTokenSettings | None = field(
        default=None,
        metadata={
            "help": "multi-token prediction: a position of an answer in speech also learns the tokens after the next "
            "one, by small heads of its own, e.g. training.multi_token.tokens=4; generation may then give several a "
            "pass (decoding.multi_token of `slm synthesize`); null: the next token alone"
        },
    )
    alignment: AlignmentConfig | None = field(
        default=None,
        metadata={
            "help": "attention heads that learn to go through the text once and in order (tasks whose speech says the "
            "prompt's text, such as tts), e.g. training.alignment.heads=[[3,0]]; null: none"
        },
    )
    shared_codebook: SharedCodebookConfig | None = field(
        default=None,
        metadata={
            "help": "a codebook in which recordings and their transcripts (task asr) are to have the same units "
            "(DCMA), e.g. training.shared_codebook.layer=3; the trained model has none; null: none"
        },
    )
    deepspeed: str | None = field(
        default=None,
        metadata={
            "help": "a DeepSpeed JSON (shipped: deepspeed-zero2, deepspeed-zero3); needs torchrun. A run goes on in "
            "another number of processes too: its checkpoint is converted first"
        },
    )
    fsdp: str | None = field(
        default=None, metadata={"help": "FSDP options, e.g. 'full_shard auto_wrap'; needs torchrun"}
    )
    trainer: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "further TrainingArguments of transformers, e.g. training.trainer.torch_compile=true; what has a "
            "key of its own here is refused"
        },
    )

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_step", "gradient_accumulation", "log_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise TrainingError(f"training.{name}: {getattr(self, name)} must be at least 1")
        if self.eval_steps < 0 or self.warmup_steps < 0:
            given = f"{self.eval_steps} and {self.warmup_steps}"
            raise TrainingError(f"training.eval_steps and training.warmup_steps: {given} must be 0 or more")
        if self.learning_rate <= 0:
            raise TrainingError(f"training.learning_rate: {self.learning_rate:g} must be above 0")
        if self.epochs is not None and self.epochs <= 0:
            raise TrainingError(f"training.epochs: {self.epochs:g} must be above 0, or null for training.steps")
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
        if self.patience is not None and (self.keep != "best" or self.patience < 1):
            raise TrainingError("training.patience: needs keep=best, and is at least 1, or null")
        if self.keep_by != "loss" and self.keep != "best":
            raise TrainingError(f"training.keep_by: {self.keep_by} needs keep=best")
        if self.freeze_layers < 0:
            raise TrainingError(f"training.freeze_layers: {self.freeze_layers} must be at least 1, or 0 for none")
        if self.freeze_layers and (self.deepspeed or self.fsdp):
            raise TrainingError(
                "training.freeze_layers: not with an engine that shards the tables, whose text rows stay"
            )
        if self.alignment is not None and (self.deepspeed or self.fsdp or self.gradient_checkpointing):
            raise TrainingError(
                "training.alignment: not with deepspeed, fsdp or gradient_checkpointing, which run a layer's attention "
                "where it cannot be read"
            )
        if self.deepspeed and self.fsdp:
            raise TrainingError("training.deepspeed and training.fsdp: choose one engine")
        if self.optim not in {name.value for name in OptimizerNames}:
            raise TrainingError(
                f"training.optim: {self.optim!r} is none; there are {', '.join(name.value for name in OptimizerNames)}"
            )
        self._check_trainer()

    def _check_trainer(self) -> None:
        """Raises TrainingError where `trainer` holds what is no TrainingArgument, set elsewhere, or without effect."""
        known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
        for name in self.trainer:
            if name not in known:
                raise TrainingError(f"training.trainer: transformers {_version()} has no TrainingArgument {name!r}")
            if (key := _OWN_KEYS.get(name)) is not None:
                raise TrainingError(f"training.trainer.{name}: is set here by {key}")
            if name in _NO_EFFECT:
                raise TrainingError(f"training.trainer.{name}: has no effect here: {_NO_EFFECT[name]}")


# TrainingArguments that follow from keys of our own.
_OWN_KEYS = {
    "output_dir": "run_dir",
    "max_steps": "training.steps",
    "num_train_epochs": "training.steps",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "learning_rate": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "warmup_steps": "training.warmup_steps",
    "optim": "training.optim",
    "weight_decay": "training.weight_decay",
    "adam_beta1": "training.adam_betas",
    "adam_beta2": "training.adam_betas",
    "max_grad_norm": "training.max_grad_norm",
    "logging_steps": "training.log_steps",
    "eval_strategy": "training.eval_steps",
    "eval_steps": "training.eval_steps",
    "save_strategy": "training.save_steps",
    "save_steps": "training.save_steps",
    "save_total_limit": "training.keep_checkpoints",
    "load_best_model_at_end": "training.keep",
    "metric_for_best_model": "training.keep_by",
    "greater_is_better": "training.keep",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing": "training.gradient_checkpointing",
    "bf16": "precision",
    "fp16": "precision",
    "use_cpu": "device",
    "ddp_backend": "device",
    "ddp_timeout": "training.process_timeout_s",
    "deepspeed": "training.deepspeed",
    "fsdp": "training.fsdp",
    "seed": "seed",
    "data_seed": "seed",
}
_BATCHES = "batches are packed by training.tokens_per_step and training.pack_length"
_LOSS = "the loss is that of answers, weighted by task_weights"
_RESUME = "a run goes on from its newest checkpoint by itself"
_NO_EFFECT = {
    "per_device_train_batch_size": _BATCHES,
    "per_device_eval_batch_size": _BATCHES,
    "auto_find_batch_size": _BATCHES,
    "train_sampling_strategy": _BATCHES,
    "length_column_name": _BATCHES,
    "dataloader_drop_last": _BATCHES,
    "remove_unused_columns": _BATCHES,
    "label_names": _LOSS,
    "label_smoothing_factor": _LOSS,
    "use_liger_kernel": _LOSS,
    "liger_kernel_config": _LOSS,
    "average_tokens_across_devices": _LOSS,
    "resume_from_checkpoint": _RESUME,
    "ignore_data_skip": _RESUME,
    "do_train": "the command trains",
    "do_eval": "training.eval_steps says whether",
    "do_predict": "`slm transcribe` and `slm synthesize` do",
    "disable_tqdm": "the command has its own progress bar",
}


def _version() -> str:
    import transformers

    return transformers.__version__


def training_arguments(
    config: TrainingConfig,
    folder: str | Path,
    *,
    evaluates: bool,
    seed: int,
    device: str,
    precision: str,
    processes: int,
) -> TrainingArguments:
    """The Trainer's arguments; the parameters are those of `slm.training.train.train`."""
    own = {
        "output_dir": str(folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(config.schedule, config.schedule),
        "warmup_steps": min(config.warmup_steps, config.steps),
        "optim": config.optim,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_betas[0],
        "adam_beta2": config.adam_betas[1],
        "max_grad_norm": config.max_grad_norm,
        "logging_steps": config.log_steps,
        "logging_first_step": True,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": config.eval_steps if evaluates else None,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": config.keep_checkpoints,
        "load_best_model_at_end": config.keep == "best",
        "metric_for_best_model": config.keep_by if config.keep == "best" else None,
        "greater_is_better": False if config.keep == "best" else None,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": device == "cpu",
        "ddp_backend": "gloo" if device == "cpu" and processes > 1 and dist.is_torchelastic_launched() else None,
        "deepspeed": config.deepspeed,
        "fsdp": config.fsdp or "",
        "seed": seed,
        "data_seed": seed,
        "remove_unused_columns": False,
        # Batches are made while the GPU computes; on a CPU a worker would only take its core.
        "dataloader_num_workers": 0 if device == "cpu" else 1,
        "dataloader_pin_memory": device != "cpu",
        "report_to": "none",
        "disable_tqdm": True,  # the caller's callbacks show progress; the Trainer's own bar prints dictionaries
    }
    if config.gradient_checkpointing:
        own[CHECKPOINTING] = True
    return TrainingArguments(ddp_timeout=round(config.process_timeout_s), **own | config.trainer)
