"""``slm train-lm``: a small text LM from scratch on a corpus's sentences, for where no pretrained one can be had.

A byte-level BPE is trained on the training split's texts, then a Qwen2-shaped model on them. The result,
``run_dir/model``, loads with AutoModelForCausalLM and AutoTokenizer as a hub model does. Checkpoints, resume,
TensorBoard and DeepSpeed as in ``slm finetune``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError, Problems
from recipes.runs.deepspeed import engine_config, set_deepspeed_device
from recipes.runs.inputs import check_sources, digest, refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.machine import is_main_process, process_count, resolve_precision, seed_everything, training_device
from recipes.runs.run_folder import RunFolder
from recipes.runs.tracking import MetricsCallback, TrainerProgress
from slm.model.modeling import save_slm
from slm.training.batches import plan_steps, with_steps
from slm.training.config import TrainingConfig
from slm.training.samples import TextSamples
from slm.training.text_lm import TextLMConfig, build_text_tokenizer, new_text_lm
from slm.training.train import train, trained_weights
from tokenizer.data.manifest import read_source, read_sources
from tokenizer.data.utterances import DataSource


def _training() -> TrainingConfig:
    return TrainingConfig(steps=400, tokens_per_step=4096, pack_length=256, learning_rate=1e-3, warmup_steps=40)


@dataclass
class Config:
    """What a text LM is trained on, and its size."""

    run_dir: str = field(default="runs/lm", metadata={"help": "run folder; the model goes to run_dir/model"})
    data: list[DataSource] = field(default_factory=list, metadata={"help": "sources whose texts it learns"})
    normaliser: str = field(
        default="basic", metadata={"help": "applied to the texts: basic (basic:de, ...), whisper-english, none"}
    )
    lm: TextLMConfig = field(default_factory=TextLMConfig, metadata={"help": "sizes of the model"})
    training: TrainingConfig = field(default_factory=_training, metadata={"help": "steps, rates, engine"})
    seed: int = field(default=0, metadata={"help": "of weights and order"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    precision: str = field(default="auto", metadata={"help": "auto, fp32, bf16 or fp16"})

    def __post_init__(self) -> None:
        if self.training.multi_token is not None:
            raise ValueError("training.multi_token: predicts tokens of speech, which a text LM has not; drop it")
        if self.training.freeze_layers:
            raise ValueError("training.freeze_layers: a new text LM has nothing to keep; it is for slm finetune")
        if self.training.alignment is not None:
            raise ValueError("training.alignment: a text LM says nothing; it is for slm finetune")


def read_texts(config: Config) -> tuple[list[str], list[str]]:
    """The normalised, distinct texts of the training and the valid split. Raises DataError, ConfigError."""
    normalise = get_normaliser(config.normaliser)
    valid = [utterance for source in config.data for utterance in read_source(source, "valid")]
    splits = []
    for utterances in (read_sources(config.data, "train"), valid):
        splits.append([text for text in dict.fromkeys(normalise(u.text) for u in utterances) if text])
    if not splits[0]:
        raise ConfigError("data: none of the training split's utterances has a text; a text LM needs transcripts")
    return splits[0], splits[1]


def prepare(config: Config) -> tuple[Any, TextSamples, TextSamples | None, str]:
    """Tokenizer, training and valid samples, and a hash of the texts."""
    sentences, held_out = read_texts(config)
    tokenizer = build_text_tokenizer(sentences, config.lm.vocab_size)
    plain = {"add_special_tokens": False, "split_special_tokens": True}  # a text that spells <|eos|> is text

    def samples(texts: list[str]) -> TextSamples:
        ids = [np.asarray(tokenizer(t, **plain)["input_ids"], dtype=np.int64) for t in texts]
        return TextSamples(ids, tokenizer.bos_token_id, tokenizer.eos_token_id)

    return tokenizer, samples(sentences), samples(held_out) if held_out else None, digest(sentences, held_out)


def plan(config: Config) -> dict[str, object]:
    """What a training would do; raises all that would stop it, together."""
    problems = Problems("slm train-lm")
    problems.attempt(RunFolder(config.run_dir).check, config)
    device = problems.attempt(training_device, config.device)
    precision = problems.attempt(resolve_precision, config.precision, device or "cpu")
    problems.attempt(engine_config, config.training)
    problems.attempt(get_normaliser, config.normaliser)
    check_sources(problems, config.data, ["train"])
    prepared = None if problems.errors else problems.attempt(prepare, config)
    problems.raise_all()
    tokenizer, samples, valid, _ = prepared
    with torch.device("meta"):
        model = new_text_lm(tokenizer, config.lm, config.seed)
    training = with_steps(config.training, samples)
    steps = plan_steps(samples.lengths, training.tokens_per_step, training.steps, config.seed)
    return {
        "sentences (train, valid)": [len(samples.lengths), len(valid.lengths) if valid else 0],
        "tokens an epoch": int(samples.lengths.sum()),
        "longest sentence (tokens)": int(samples.lengths.max()),
        "text vocabulary": len(tokenizer),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": training.steps,
        "epochs": round(sum(map(len, steps)) / len(samples.lengths), 2),
        "device": device,
        "precision": precision,
        "result": str(Path(config.run_dir) / "model"),
    }


def run(config: Config) -> Path:
    """Train, or go on where a killed run stopped; returns the model's folder."""
    folder = RunFolder(config.run_dir)
    folder.check(config)
    device = training_device(config.device)
    set_deepspeed_device(device)
    tokenizer, samples, valid, fingerprint = prepare(config)
    refuse_other_inputs(folder, fingerprint, "data")
    if folder.done(config):
        log.info("%s is complete: skipped", config.run_dir)
        return folder.path("model")
    folder.start(config, fingerprint)
    seed_everything(config.seed)
    trainer = train(
        new_text_lm(tokenizer, config.lm, config.seed),
        samples,
        valid,
        dataclasses.replace(config.training, deepspeed=engine_config(config.training)),
        folder.checkpoints,
        seed=config.seed,
        device=device,
        precision=resolve_precision(config.precision, device),
        processes=process_count(),
        callbacks=[MetricsCallback(folder.metrics), TrainerProgress("train-lm")],
        tensorboard=folder.path("tensorboard"),
    )
    model, state = trained_weights(trainer)
    if is_main_process():
        save_slm(model, tokenizer, None, folder.path("model"), state)
        losses = [row for row in trainer.state.log_history if "eval_text_loss" in row]
        folder.mark_complete({"valid_loss": losses[-1]["eval_text_loss"]} if losses else {})
    trainer.accelerator.wait_for_everyone()
    return folder.path("model")
