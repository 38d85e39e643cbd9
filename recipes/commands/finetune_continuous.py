"""``slm finetune-continuous``: an LLM learns to transcribe from a frozen encoder's features, without a tokenizer.

The topline of ASR from codes: what the same LLM hears where nothing is quantized (Speech-LLaMA, arXiv 2307.03917).
Features are made as the training goes, from augmented recordings. The result, ``run_dir/model``, is what ``slm
transcribe model=RUN_DIR/model`` runs, and ``slm evaluate`` scores its predictions as any other's.

Not here: ASR from codes and TTS (``slm finetune``).

Raises: ConfigError, DataError, ModelError, which name the key or the file.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PrinterCallback

from eval.text.normalisers import get_normaliser
from eval.text.wer import score_pairs
from recipes.config import ConfigError, Problems
from recipes.continuous.encoder import ENCODER_RATE_HZ, encode_recordings, encoder_fingerprint, load_encoder
from recipes.continuous.training import ContinuousTrainer, TrainingRecordings, collate
from recipes.encoding.plan import duration_of
from recipes.runs.embedded import model_path
from recipes.runs.inputs import check_sources, digest, refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.machine import process_count, resolve_device, resolve_precision, seed_everything
from recipes.runs.run_folder import RunFolder
from recipes.runs.tracking import MetricsCallback, TrainerProgress
from slm.model.continuous import ContinuousLM, Projector, ProjectorSettings, save_continuous
from slm.model.freezing import freeze_other_towers, other_towers
from slm.model.lora import LoraSettings
from slm.model.modeling import describe_llm, load_llm
from slm.training.checkpoints import CheckpointMarker, SettingsOfThisRun, newest_checkpoint
from slm.training.finite_steps import FiniteSteps
from tokenizer.data.audio import load_audio
from tokenizer.data.augmentation import AugmentationConfig
from tokenizer.data.manifest import read_source, read_sources
from tokenizer.data.mixing import training_audio
from tokenizer.data.utterances import AudioError, DataSource, Utterance
from tokenizer.teacher.recogniser_training import RecogniserTrainingConfig, training_arguments
from tokenizer.teacher.whisper import TeacherConfig, teacher_width

TOKENS_PER_S, LEAST_TOKENS = 25.0, 24  # what a transcript may have, as `slm transcribe` allows by default


@dataclass
class Config:
    """What is trained on what."""

    run_dir: str = field(default="runs/finetune-continuous", metadata={"help": "the model goes to run_dir/model"})
    model: str = field(default="", metadata={"help": "embedded-lm, hub name or folder of a causal LM of text"})
    encoder: TeacherConfig = field(
        default_factory=lambda: TeacherConfig("embedded-recogniser"),
        metadata={"help": "the frozen encoder: embedded-recogniser, or a Whisper by folder or hub name"},
    )
    projector: ProjectorSettings = field(
        default_factory=ProjectorSettings, metadata={"help": "between encoder and LLM"}
    )
    data: list[DataSource] = field(default_factory=list, metadata={"help": "where recordings and transcripts are"})
    augmentation: AugmentationConfig = field(
        default_factory=AugmentationConfig, metadata={"help": "changes to the recordings"}
    )
    freeze_llm: bool = field(default=False, metadata={"help": "train the projector alone"})
    lora: LoraSettings | None = field(
        default=None, metadata={"help": "train adapters beside the projector, e.g. lora.rank=16; null: the LLM in full"}
    )
    weights: str = field(default="fp32", metadata={"help": "how a frozen LLM is held: fp32, bf16"})
    normaliser: str = field(default="basic", metadata={"help": "of the texts that the model writes"})
    training: RecogniserTrainingConfig = field(
        default_factory=lambda: RecogniserTrainingConfig(learning_rate=3e-4), metadata={"help": "how long, how fast"}
    )
    seed: int = field(default=0, metadata={"help": "of the projector, order and augmentation"})
    precision: str = field(default="auto", metadata={"help": "auto, fp32, bf16 or fp16: what is computed in"})

    def __post_init__(self) -> None:
        if self.freeze_llm and self.lora is not None:
            raise ValueError("freeze_llm and lora: adapters train the LLM; drop one")
        if self.weights not in ("fp32", "bf16"):
            raise ValueError(f"weights: {self.weights!r} is not one of fp32, bf16")
        if self.weights != "fp32" and not self.freeze_llm and self.lora is None:
            raise ValueError("weights: bf16 loses small updates when trained in full; use fp32, lora or freeze_llm")


def plan(config: Config) -> dict[str, object]:
    """What the run would do; raises all that would stop it, together."""
    problems = Problems("slm finetune-continuous")
    problems.attempt(RunFolder(config.run_dir).check, config)
    problems.attempt(_one_process)
    problems.attempt(get_normaliser, config.normaliser)
    precision = problems.attempt(resolve_precision, config.precision)
    facts = problems.attempt(describe_llm, config.model)
    width = problems.attempt(_width, config)
    check_sources(problems, config.data, ["train"])
    problems.raise_all()
    encoder = load_encoder(config.encoder, "cpu")
    utterances, _ = _utterances(config, facts.tokenizer, encoder.window_s, "train")
    seconds = [_seconds(utterance) for utterance in utterances]
    seen = config.training.steps * config.training.batch_size
    return {
        "model": f"{config.model} ({facts.config.model_type}, {facts.n_parameters:,} parameters)",
        "encoder": f"{config.encoder.name} ({width} channels, window {encoder.window_s:g} s)",
        "positions a second": 50 / config.projector.stack,
        "training utterances": len(utterances),
        "hours": round(sum(seconds) / 3600, 3),
        "steps": config.training.steps,
        "epochs": round(seen / len(utterances), 1),
        "training": "projector alone" if config.freeze_llm else "LoRA" if config.lora else "full",
        "precision": precision,
        "result": str(RunFolder(config.run_dir).path("model")),
    }


def run(config: Config) -> Path:
    """Trains, or goes on where a killed run stopped; returns the model's folder."""
    folder = RunFolder(config.run_dir)
    folder.check(config)
    _one_process()
    device = resolve_device()
    encoder = load_encoder(config.encoder, device)
    fingerprint = encoder_fingerprint(encoder)
    llm, text_tokenizer, _ = load_llm(config.model, config.weights)
    utterances, texts = _utterances(config, text_tokenizer, encoder.window_s, "train")
    rows = (json.dumps([u.id, u.duration, texts[u.id].tolist()]) for u in utterances)
    inputs = digest(rows, model_path(config.model), fingerprint)
    refuse_other_inputs(folder, inputs, "data, model or encoder")
    if folder.done(config):
        log.info("%s is complete: skipped", config.run_dir)
        return folder.path("model")
    folder.start(config, inputs)
    seed_everything(config.seed)
    model = _build(config, llm, text_tokenizer, _width(config)).to(device)
    settings = config.training
    micro_batch, precision = settings.batch_size // settings.accumulation, resolve_precision(config.precision)
    arguments = training_arguments(settings, str(folder.checkpoints), micro_batch, precision, device, config.seed)
    audio = training_audio(config.data, ENCODER_RATE_HZ, config.seed, keep=lambda u: u.id in texts)
    length, window_s = settings.steps * settings.batch_size, encoder.window_s
    trainer = ContinuousTrainer(
        model=model,
        args=arguments,
        train_dataset=TrainingRecordings(audio, texts, config.augmentation, length, window_s, config.seed),
        eval_dataset=[0],  # `validate` reads its own
        data_collator=collate,
        encoder=encoder,
        validate=_validator(config, encoder, text_tokenizer),
        callbacks=[
            MetricsCallback(folder.metrics),
            CheckpointMarker(),
            SettingsOfThisRun(),
            TrainerProgress("finetune-continuous"),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(FiniteSteps(trainer))
    checkpoint = newest_checkpoint(folder.checkpoints)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    wall_s = time.perf_counter() - started
    scores = trainer.evaluate()
    facts = {
        "encoder": asdict(config.encoder),
        "encoder_fingerprint": fingerprint,
        "normaliser": config.normaliser,
        "longest_s": max(map(_seconds, utterances)),
    }
    save_continuous(trainer.model, text_tokenizer, config.projector, facts, folder.path("model"))
    folder.mark_complete({"steps": settings.steps, "wall_s": round(wall_s, 1), "n_failed": audio.n_failed, **scores})
    return folder.path("model")


def _one_process() -> None:
    if process_count() > 1:
        raise ConfigError("finetune-continuous: trains in one process; start it without torchrun")


def _width(config: Config) -> int:
    try:
        return teacher_width(config.encoder)
    except ValueError as error:
        raise ConfigError(f"encoder: {error}".replace("teacher", "encoder")) from error


def _seconds(utterance: Utterance) -> float:
    return duration_of(utterance) if utterance.duration is None else utterance.duration


def _utterances(
    config: Config, text_tokenizer: Any, window_s: float, split: str
) -> tuple[list[Utterance], dict[str, np.ndarray]]:
    """Utterances that fit the encoder's window and have a text, and the ids of their texts."""
    normalise, kept, texts, left_out = get_normaliser(config.normaliser), [], {}, 0
    for utterance in read_sources(config.data, split):
        text = normalise(utterance.text)
        if not text or _seconds(utterance) > window_s:
            left_out += 1
            continue
        ids = text_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        kept.append(utterance)
        texts[utterance.id] = np.asarray(ids, dtype=np.int64)
    if left_out:
        log.warning("left out: %d without a text or longer than the encoder's window of %g s", left_out, window_s)
    if not kept:
        raise ConfigError(f"data: no utterance of split {split} has a text and fits the encoder's {window_s:g} s")
    return kept, texts


def _build(config: Config, llm: Any, text_tokenizer: Any, width: int) -> ContinuousLM:
    projector = Projector(width, llm.get_input_embeddings(), config.projector)
    if config.freeze_llm:
        llm.requires_grad_(False)
    elif config.lora is None:
        freeze_other_towers(llm)
    else:
        from peft import LoraConfig, get_peft_model

        settings = config.lora
        llm = get_peft_model(
            llm,
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                target_modules=settings.target_modules,
                exclude_modules=other_towers(llm) or None,
                task_type="CAUSAL_LM",
            ),
        )
    end = text_tokenizer.eos_token_id
    if end is None:
        raise ConfigError(f"model {config.model}: its tokenizer has no end of text (eos) to end a transcript with")
    return ContinuousLM(llm, projector, text_tokenizer.bos_token_id, end)


def _validator(config: Config, encoder: Any, text_tokenizer: Any) -> Any:
    """WER and CER of the valid split, written greedily; nothing where there is none."""
    normalise = get_normaliser(config.normaliser)
    pairs: list[tuple[str, np.ndarray]] = []
    for source in config.data:
        for utterance in read_source(source, "valid"):
            try:
                if text := normalise(utterance.text):
                    pairs.append((text, load_audio(utterance, ENCODER_RATE_HZ, encoder.window_s)))
            except AudioError as error:
                log.warning("not scored: %s", error)

    def validate(model: ContinuousLM) -> dict[str, float]:
        written: list[str] = []
        for start in range(0, len(pairs), config.training.batch_size):
            waveforms = [waveform for _, waveform in pairs[start : start + config.training.batch_size]]
            most = [LEAST_TOKENS + round(TOKENS_PER_S * len(w) / ENCODER_RATE_HZ) for w in waveforms]
            answers = model.generate(encode_recordings(encoder, waveforms), most)
            written += [text_tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        if not pairs:
            return {}
        rates = score_pairs([text for text, _ in pairs], written, normalise)
        return {"eval_asr_wer": round(rates.wer, 4), "eval_asr_cer": round(rates.cer, 4)}

    return validate
