"""`slm train-teacher`: trains a small recogniser from scratch, the offline teacher and judge.

Features: joint CTC / attention loss, SpecAugment, speed, level and noise augmentation, data order fixed by the seed,
checkpoints and bit-exact resume (transformers' Trainer), WER of each corpus's valid split by greedy CTC while training.
The result, `run_dir/model`, is a Whisper folder (AutoModelForSpeechSeq2Seq loads it) with `ctc_head.safetensors`.
With `model.quantizer` it is a tokenizer of supervised semantic tokens instead (CosyVoice style; `load_tokenizer`).

Not here: recognisers by name (openai/whisper-small). They need no training: name one as teacher or judge.

Raises: DataError for sources that cannot be read; ConfigError for settings that cannot work.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from eval.text.normalisers import get_normaliser
from eval.text.wer import score_pairs
from recipes.config import ConfigError, Problems
from recipes.encoding.plan import duration_of
from recipes.runs.embedded import model_path
from recipes.runs.inputs import check_sources, digest, refuse_other_inputs, source_name
from recipes.runs.logs import log
from recipes.runs.machine import is_main_process, resolve_device, resolve_precision, seed_everything
from recipes.runs.run_folder import RunFolder
from recipes.runs.tracking import MetricsCallback, TrainerProgress
from recipes.tokenizer_training.data import items_at_once
from slm.training.checkpoints import CheckpointMarker, SettingsOfThisRun, newest_checkpoint
from slm.training.finite_steps import FiniteSteps
from tokenizer.data.audio import load_audio
from tokenizer.data.augmentation import AugmentationConfig
from tokenizer.data.manifest import read_source, read_sources
from tokenizer.data.mixing import training_audio
from tokenizer.data.utterances import AudioError, DataSource, Utterance
from tokenizer.teacher.recogniser import Recogniser, RecogniserConfig, save_recogniser
from tokenizer.teacher.recogniser_training import (
    RecogniserCollator,
    RecogniserTrainer,
    RecogniserTrainingConfig,
    TrainingUtterances,
    greedy_ctc_texts,
    training_arguments,
)
from tokenizer.teacher.whisper import SAMPLES_PER_ENCODER_FRAME, WHISPER_RATE_HZ, WhisperLogMel


@dataclass
class Config:
    """Everything of one recogniser training."""

    run_dir: str = field(default="runs/teacher", metadata={"help": "run folder; the model goes to run_dir/model"})
    data: list[DataSource] = field(
        default_factory=list, metadata={"help": "where training and valid utterances come from"}
    )
    model: RecogniserConfig = field(default_factory=RecogniserConfig, metadata={"help": "size of the recogniser"})
    training: RecogniserTrainingConfig = field(
        default_factory=RecogniserTrainingConfig, metadata={"help": "how long, how fast"}
    )
    augmentation: AugmentationConfig = field(
        default_factory=AugmentationConfig, metadata={"help": "changes to the waveforms"}
    )
    init_from: str | None = field(
        default=None, metadata={"help": "start from this recogniser folder of the same size (the window may differ)"}
    )
    normaliser: str = field(
        default="basic", metadata={"help": "text normaliser, applied before spelling out characters"}
    )
    precision: str = field(default="auto", metadata={"help": "auto, fp32, bf16 or fp16"})
    seed: int = field(default=0, metadata={"help": "seed of weights, order and augmentation"})


def to_characters(text: str, normaliser: str) -> str:
    """Normalises a transcript to the recogniser's characters: a to z, apostrophe, single spaces."""
    text = get_normaliser(normaliser)(text).lower()
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"[^a-z' ]+", " ", text).split())


def _training_utterances(config: Config) -> tuple[list[Utterance], list[str]]:
    """Utterances that fit the window and have a text, and their characters."""
    kept, texts, too_long, no_text = [], [], 0, 0
    for utterance in read_sources(config.data, "train"):
        text = to_characters(utterance.text, config.normaliser)
        if not text:
            no_text += 1
        elif _seconds(utterance) > config.model.window_s or len(text) > config.model.max_characters:
            too_long += 1
        else:
            kept.append(utterance)
            texts.append(text)
    if too_long or no_text:
        log.warning("left out of the training: %d longer than the window, %d without a text", too_long, no_text)
    if not kept:
        raise ConfigError(f"no utterance fits model.window_s={config.model.window_s:g} and has a text")
    return kept, texts


def _seconds(utterance: Utterance) -> float:
    return duration_of(utterance) if utterance.duration is None else utterance.duration


def plan(config: Config) -> dict[str, object]:
    """What the run would do; raises all that would stop it, together."""
    problems = Problems("slm train-teacher")
    problems.attempt(RunFolder(config.run_dir).check, config)
    problems.attempt(get_normaliser, config.normaliser)
    model = problems.attempt(_initial_model, config)
    precision = problems.attempt(resolve_precision, config.precision)
    micro = problems.attempt(items_at_once, config.training)
    check_sources(problems, config.data, ["train"])
    found = None if problems.errors else problems.attempt(_training_utterances, config)
    problems.raise_all()
    utterances, texts = found
    seen = config.training.steps * config.training.batch_size
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "training utterances": len(utterances),
        "hours": round(sum(map(_seconds, utterances)) / 3600, 3),
        "characters": sum(map(len, texts)),
        "parameters": parameters,
        "steps": config.training.steps,
        "utterances per step": f"{config.training.batch_size}, {micro} in one forward pass of one process",
        "epochs": round(seen / len(utterances), 1),
        "precision": precision,
        "memory of weights, gradients and optimizer (MiB)": round(16 * parameters / 2**20),
        "result": str(RunFolder(config.run_dir).path("model")),
    }


def run(config: Config) -> Path:
    """Trains the recogniser, or goes on where a killed run stopped; returns the model folder."""
    folder = RunFolder(config.run_dir)
    folder.check(config)
    utterances, texts = _training_utterances(config)
    rows = (json.dumps([u.id, u.duration, text]) for u, text in zip(utterances, texts, strict=True))
    fingerprint = digest(rows, model_path(config.init_from))
    refuse_other_inputs(folder, fingerprint, "data or init_from")
    if folder.done(config):
        log.info("%s is complete: skipped", config.run_dir)
        return folder.path("model")
    folder.start(config, fingerprint)
    seed_everything(config.seed)
    spelled = {utterance.id: text for utterance, text in zip(utterances, texts, strict=True)}
    audio = training_audio(config.data, WHISPER_RATE_HZ, config.seed, keep=lambda u: u.id in spelled)
    model = _initial_model(config)
    settings = config.training
    arguments = _training_arguments(config, folder)
    trainer = RecogniserTrainer(
        model=model,
        args=arguments,
        train_dataset=TrainingUtterances(
            audio,
            spelled,
            config.augmentation,
            settings.steps * settings.batch_size,
            config.model.window_s,
            config.seed,
        ),
        data_collator=_collator(config.model),
        ctc_weight=config.model.ctc_weight,
        validate=_validator(config),
        callbacks=[
            MetricsCallback(folder.metrics),
            CheckpointMarker(),
            SettingsOfThisRun(),
            TrainerProgress("train-teacher"),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(FiniteSteps(trainer))
    if is_main_process():
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(folder.path("tensorboard")))))
    with arguments.main_process_first(desc="looking for checkpoints"):
        checkpoint = newest_checkpoint(folder.checkpoints)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.remove_callback(TensorBoardCallback)  # it closed its file and would open another one elsewhere
    scores = trainer.evaluate()
    if is_main_process():
        recogniser = trainer.accelerator.unwrap_model(trainer.model)
        save_recogniser(recogniser, folder.path("model"), decoder_trained=config.model.ctc_weight < 1)
    folder.mark_complete({"steps": settings.steps, "n_failed": audio.n_failed, **scores})
    return folder.path("model")


def _collator(model: RecogniserConfig) -> RecogniserCollator:
    multiple = model.quantizer.hop_length if model.quantizer else SAMPLES_PER_ENCODER_FRAME
    return RecogniserCollator(WhisperLogMel(model.n_mels), round(model.window_s * WHISPER_RATE_HZ), multiple)


def _initial_model(config: Config) -> Recogniser:
    model = Recogniser.from_scratch(config.model)
    if resolve_device() == "cpu":
        model.set_attn_implementation("eager")  # on CPUs the backward of fused attention takes twice the whole step
    if config.init_from is not None:
        from safetensors.torch import load_file

        source = Path(model_path(config.init_from))
        if not source.is_dir():
            raise ConfigError(
                f"init_from={source}: not a recogniser folder, as it does not exist: correct the path, or make it "
                "first (`slm train-teacher` writes RUN_DIR/model)"
            )
        try:
            state = load_file(source / "model.safetensors")
            # A fixed table of sinusoids, as long as the window: the new model has its own.
            state["model.encoder.embed_positions.weight"] = model.model.encoder.embed_positions.weight
            head = load_file(source / "ctc_head.safetensors")
            state |= {f"ctc_head.{name}": value for name, value in head.items()}
            missing, unexpected = model.load_state_dict(state, strict=False)
            # The output projection is the decoder's embedding, so it is not stored.
            # A quantizer is new where the recogniser that it is put into was trained without one.
            absent = [name for name in missing if name != "proj_out.weight" and not name.startswith("quantizer.")]
            if wrong := [*absent, *unexpected]:
                raise RuntimeError(f"{len(wrong)} tensors too few or too many, such as {wrong[0]}")
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"init_from={source}: not a recogniser folder of this size ({error})") from None
    return model


def _training_arguments(config: Config, folder: RunFolder) -> TrainingArguments:
    precision = resolve_precision(config.precision)
    return training_arguments(
        config.training,
        str(folder.checkpoints),
        items_at_once(config.training),
        precision,
        resolve_device(),
        config.seed,
    )


def _validator(config: Config):
    """Greedy-CTC WER of each corpus's valid split, decoded once and kept."""
    corpora: dict[str, tuple[list[str], list[np.ndarray]]] = {}
    for number, source in enumerate(config.data):
        pairs, left_out = [], 0
        for utterance in read_source(source, "valid"):
            try:
                waveform = load_audio(utterance, WHISPER_RATE_HZ, config.model.window_s)
                pairs.append((utterance, waveform))
            except AudioError:
                left_out += 1
        if left_out:
            log.warning("%s: %d valid clips cannot be read in one window: not scored", source.path, left_out)
        if pairs:
            name = source_name(source.path)
            name = f"{name}-{number}" if name in corpora else name
            texts = [to_characters(u.text, config.normaliser) for u, _ in pairs]
            corpora[name] = (texts, [w for _, w in pairs])

    def validate(model: Recogniser) -> dict[str, float]:
        metrics = {}
        for name, (texts, waveforms) in corpora.items():
            rates = score_pairs(texts, greedy_ctc_texts(model, waveforms), get_normaliser("none"))
            metrics |= {f"valid_wer/{name}": round(rates.wer, 4), f"valid_cer/{name}": round(rates.cer, 4)}
        return metrics

    return validate
