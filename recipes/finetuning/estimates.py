"""What a fine-tuning would cost: tokens, parameters, memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from torch import nn

from recipes.finetuning.config import Config
from recipes.finetuning.corpora import Corpora
from recipes.finetuning.data import Data
from recipes.finetuning.pattern_costs import costs_at_rates, pattern_costs
from recipes.runs.deepspeed import deepspeed_file
from recipes.runs.machine import process_count
from slm.model.freezing import freeze_lower_layers, freeze_other_towers, other_towers
from slm.model.lora import LoraSettings
from slm.model.modeling import LLMFacts, has_tied_head
from slm.model.speech_rows import rows_needed
from slm.training.answer_loss import CHUNK_ELEMENTS
from slm.training.batches import plan_steps, with_steps
from slm.training.config import TrainingConfig, TrainingError


def describe_plan(
    config: Config, facts: LLMFacts, corpora: Corpora, data: Data, device: str, precision: str
) -> dict[str, object]:
    """The plan as a table's rows: sizes, tokens, steps and memory of a fine-tuning.

    Raises:
        TrainingError: A step holds fewer sequences than it has micro-batches.
    """
    samples = data.all_train
    training = with_steps(config.training, samples)
    steps = plan_steps(samples.lengths, training.tokens_per_step, training.steps, config.seed, samples.repeats)
    micro = training.gradient_accumulation * process_count()
    if min(map(len, steps)) < micro:
        raise TrainingError(f"training.tokens_per_step: too few sequences to deal to {micro} micro-batches; raise it")
    table = facts.skeleton.get_input_embeddings().weight
    rows = rows_needed(table.shape[0], data.vocabulary)
    tables = 1 if has_tied_head(facts.skeleton) else 2
    further = 2 * table.shape[1] * sum(data.vocabulary.further_sizes)
    if training.multi_token is not None:
        further += (training.multi_token.tokens - 1) * table.shape[1] ** 2
    total = facts.n_parameters + (rows - table.shape[0]) * table.shape[1] * tables + further
    freeze_other_towers(facts.skeleton)
    if training.freeze_layers:
        freeze_lower_layers(facts.skeleton, training.freeze_layers)
    frozen = sum(parameter.numel() for parameter in facts.skeleton.parameters() if not parameter.requires_grad)
    trainable = total - frozen if config.lora is None else lora_parameters(facts.skeleton, config.lora)
    if training.freeze_layers:
        trainable -= data.vocabulary.first_id * table.shape[1] * tables
    if config.lora is not None:
        trainable += len(data.vocabulary.new_ids) * table.shape[1] * tables + further
    tokens, repeats = {}, np.ones(len(samples.lengths)) if samples.repeats is None else samples.repeats
    for number, task in enumerate(samples.task_names):
        own = samples.tasks == number
        lengths = samples.lengths[own]
        if len(lengths):
            tokens[task] = {
                "sequences": len(lengths),
                "tokens an epoch": round(float((lengths * repeats[own]).sum())),
                "longest": int(lengths.max()),
                "weight": samples.task_weights[number],
            }
    return {
        "model": f"{config.model} ({facts.config.model_type}, {facts.n_parameters:,} parameters)",
        "chat template": bool(facts.tokenizer.chat_template),
        "corpus": f"{corpora.names} (tokenizer {corpora.metadata.tokenizer}, {corpora.metadata.frame_rate:g} Hz)",
        "utterances": {
            split: corpora.count(split) for split in dict.fromkeys(s for c in corpora.opened for s in c.splits)
        },
        "left out as too long": data.train.n_too_long,
        "speech vocabulary": len(data.vocabulary.new_ids),
        "embedding rows": f"{table.shape[0]} -> {rows}",
        "pattern": data.vocabulary.pattern.name,
        "patterns": pattern_costs(facts, data.vocabulary, corpora.metadata.codebook_sizes, precision),
        "patterns at": costs_at_rates(facts, data.vocabulary, corpora.metadata.codebook_sizes, precision),
        "tokens": tokens,
        "steps": training.steps,
        "tokens a step": int(np.mean([samples.lengths[step].sum() for step in steps])),
        "epochs": round(sum(map(len, steps)) / float(repeats.sum()), 2),
        "training": "LoRA" if config.lora else "full",
        "trainable parameters": int(trainable),
        "memory (MiB, about)": estimate_memory(config, facts, total, trainable, rows, precision),
        "device": device,
        "precision": precision,
        "processes": process_count(),
        "result": str(Path(config.run_dir) / "model"),
    }


def sharding_stage(training: TrainingConfig) -> int:
    """What is held in parts: 0 nothing; 2 gradients and moments (ZeRO's 1 counts as 2); 3 the weights too."""
    if training.fsdp:
        return 3
    if not training.deepspeed:
        return 0
    zero = json.loads(Path(deepspeed_file(training.deepspeed)).read_text(encoding="utf-8")).get("zero_optimization", {})
    return {0: 0, 3: 3}.get(zero.get("stage", 0), 2)


def _has_whole_logits(config: Config) -> bool:
    """Whether an engine holds the head so that the loss takes the logits of a whole micro-batch."""
    training = config.training
    if training.fsdp:
        settings = training.trainer.get("fsdp_config")
        return isinstance(settings, dict) and settings.get("version") == 1
    return config.lora is not None and sharding_stage(training) == 3


def lora_parameters(model: nn.Module, settings: LoraSettings) -> int:
    """Parameters of the adapters (without the new rows)."""
    head, others, count = model.get_output_embeddings(), set(other_towers(model)), 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and name not in others:
            targets = settings.target_modules
            if targets == "all-linear" or name.rsplit(".", 1)[-1] in (
                [targets] if isinstance(targets, str) else targets
            ):
                count += settings.rank * (module.in_features + module.out_features)
    return count


def estimate_memory(
    config: Config, facts: LLMFacts, total: int, trainable: int, rows: int, precision: str
) -> dict[str, int]:
    """Weights, gradients and Adam's moments, activations and logits of one micro-batch; a guide, not a promise."""
    sizes = facts.config.get_text_config()
    training = config.training
    micro = training.tokens_per_step / training.gradient_accumulation / process_count()
    processes, stage = process_count(), sharding_stage(training)
    width = 2 if precision != "fp32" else 4
    layers = 2 if training.gradient_checkpointing else sizes.num_hidden_layers
    feed_forward = getattr(sizes, "intermediate_size", None) or 4 * sizes.hidden_size
    # With checkpointing each layer's input is kept, in fp32, and two layers' insides at a time.
    kept = micro * sizes.num_hidden_layers * sizes.hidden_size * 4 if training.gradient_checkpointing else 0
    activations = kept + micro * layers * (10 * sizes.hidden_size + 4 * feed_forward) * width
    parts = {
        "weights": total * (4 if config.weights == "fp32" else 2) / (processes if stage == 3 else 1),
        "gradients and optimizer": trainable * 12 / (processes if stage else 1),
        "activations": activations,
        # Of a chunk of answer tokens, softmax and slope in fp32; of them all where `SpeechTrainer` cannot have chunks.
        "logits": (micro if _has_whole_logits(config) else min(micro, CHUNK_ELEMENTS / rows)) * rows * 12,
    }
    mib = {name: int(value / 2**20) for name, value in parts.items()}
    return mib | {"together": sum(mib.values())}
