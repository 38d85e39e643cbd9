"""``slm finetune``: a pretrained LLM learns to hear and to speak on a coded corpus.

Any transformers causal LM by hub name or folder; ASR, TTS and tasks of your own, together or alone; full or LoRA;
packing; one process or many (``torchrun --nproc_per_node N -m recipes.cli finetune ...``), plain DDP, DeepSpeed or
FSDP. The result, ``run_dir/model``, loads with AutoModelForCausalLM and AutoTokenizer and holds all that ``slm
transcribe`` and ``slm synthesize`` need. A LoRA run also keeps the grown base (``run_dir/base``) and the adapter
(``run_dir/adapter``).

Raises: ModelError, CorpusError, VocabularyError, BatchError, TrainingError, all ValueErrors that name the key or the
    file.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError, Problems
from recipes.runs.deepspeed import engine_config
from recipes.runs.embedded import model_path
from recipes.runs.inputs import digest, refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.machine import is_main_process, process_count, resolve_device, resolve_precision, seed_everything
from recipes.runs.plugins import plugins_key
from recipes.runs.run_folder import RunFolder
from recipes.runs.tracking import MetricsCallback, TrainerProgress
from slm.corpus import INDEX_NAME, CodedCorpus
from slm.lora import LoraSettings, add_lora, merge_lora, save_adapter
from slm.modeling import (
    LLMFacts,
    describe_llm,
    extend_with_speech,
    has_tied_head,
    load_llm,
    rows_needed,
    save_slm,
)
from slm.tasks import Task, TaskError, get_task
from slm.trained_on import TrainedOn
from slm.training.answer_loss import CHUNK_ELEMENTS
from slm.training.batches import NoiseConfig, SpeechSamples, plan_steps
from slm.training.trainer import TrainingConfig, TrainingError, train, trained_weights
from slm.vocabulary import SpeechVocabulary, add_marks, add_speech
from tokenizer import LMSPTModel, load_tokenizer


@dataclass
class Config:
    """What is trained on what."""

    run_dir: str = field(default="runs/finetune", metadata={"help": "run folder; the model goes to run_dir/model"})
    model: str = field(
        default="", metadata={"help": "embedded-lm, hub name or folder of a causal LM (or of one that speaks already)"}
    )
    corpus: str = field(default="", metadata={"help": "coded corpus: the run_dir of `slm encode`"})
    task_weights: dict[str, float] = field(
        default_factory=lambda: {"asr": 1.0, "tts": 1.0},
        metadata={"help": "weight of a token of each task in the loss; tasks of your own come from `plugins`"},
    )
    n_codebooks: int = field(default=1, metadata={"help": "codebooks that become speech tokens, from book 0 on"})
    speech_rows: Literal["noise", "codebook"] = field(
        default="noise",
        metadata={
            "help": "what a speech token starts from: noise, or its codebook vector (LM-SPT tokenizers), from "
            "which a short training on little data learns far sooner"
        },
    )
    normaliser: str = field(
        default="basic", metadata={"help": "applied to the texts: basic (basic:de, ...), whisper-english, none"}
    )
    noise: NoiseConfig = field(default_factory=NoiseConfig, metadata={"help": "changes to the prompts"})
    max_length: int | None = field(default=None, metadata={"help": "longer sequences are left out; null: the model's"})
    lora: LoraSettings | None = field(
        default=None, metadata={"help": "train adapters, e.g. lora.rank=16; null: in full"}
    )
    weights: Literal["fp32", "bf16"] = field(
        default="fp32", metadata={"help": "how weights are held (bf16: LoRA only)"}
    )
    training: TrainingConfig = field(default_factory=TrainingConfig, metadata={"help": "steps, rates, engine"})
    seed: int = field(default=0, metadata={"help": "of new rows, order and noise"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    precision: str = field(default="auto", metadata={"help": "auto, fp32, bf16 or fp16: what is computed in"})
    plugins: list[str] = plugins_key()

    def __post_init__(self) -> None:
        if self.weights != "fp32" and self.lora is None:
            raise ValueError(
                "weights: bf16 loses small updates when trained in full; use fp32 with precision=bf16, or lora"
            )


@dataclass
class Data:
    """The training and valid sequences, and what they are made of."""

    vocabulary: SpeechVocabulary
    train: SpeechSamples
    valid: SpeechSamples | None


def open_corpus(config: Config) -> CodedCorpus:
    """The corpus, checked. Raises ConfigError, CorpusError."""
    if not config.corpus:
        raise ConfigError("corpus: not set; give the run_dir of `slm encode`, e.g. corpus=runs/codes")
    corpus = CodedCorpus.open(config.corpus)
    if not corpus.count("train"):
        raise ConfigError(f"corpus {config.corpus}: no train split (it has {', '.join(corpus.splits)})")
    return corpus


def used_tasks(config: Config) -> list[Task]:
    """The tasks that are trained. Raises ConfigError where one is unknown."""
    try:
        return [get_task(name) for name, weight in config.task_weights.items() if weight > 0]
    except TaskError as error:
        raise ConfigError(f"task_weights: {error}") from error


def columns_of(config: Config, corpus: CodedCorpus) -> list[str]:
    """The corpus's columns, beside codes and text, that the tasks read. Raises ConfigError where it lacks one."""
    columns = list(dict.fromkeys(name for task in used_tasks(config) for name in task.columns))
    if missing := [name for name in columns if name not in corpus.metadata.columns]:
        has = ", ".join(corpus.metadata.columns) or "none beside the text"
        readers = ", ".join(task.name for task in used_tasks(config) if set(task.columns) & set(missing))
        raise ConfigError(
            f"task_weights: {readers} reads {', '.join(missing)}, and corpus {config.corpus} has no such column (it "
            f"has {has}); encode it with data.0.columns=[{','.join(missing)}]"
        )
    return columns


def make_vocabulary(
    config: Config, corpus: CodedCorpus, tokenizer: PreTrainedTokenizerBase, own: SpeechVocabulary | None
) -> SpeechVocabulary:
    """The model's own speech vocabulary, or a new one added to the text tokenizer.

    Raises:
        VocabularyError: the model already speaks another tokenizer's codes.
    """
    facts = corpus.metadata
    marks = [mark for task in used_tasks(config) for mark in task.marks]
    if own is not None:
        own.check_fingerprint(facts.fingerprint, f"the corpus {config.corpus}")
        if own.n_codebooks != config.n_codebooks:
            raise ConfigError(
                f"n_codebooks: the model {config.model} was made with {own.n_codebooks}, not {config.n_codebooks}"
            )
        return dataclasses.replace(add_marks(tokenizer, own, marks), normaliser=config.normaliser)
    return add_speech(
        tokenizer,
        facts.codebook_sizes,
        n_codebooks=config.n_codebooks,
        fingerprint=facts.fingerprint,
        frame_rate=facts.frame_rate,
        tokenizer=facts.tokenizer,
        precision=facts.precision,
        normaliser=config.normaliser,
        marks=marks,
    )


def codebooks(config: Config, corpus: CodedCorpus) -> list[torch.Tensor] | None:
    """The vectors of the codebooks used, (size, D) each; None where speech tokens start from noise.

    Raises:
        ConfigError: the corpus's tokenizer has no such books, or is another by now.
    """
    if config.speech_rows == "noise":
        return None
    facts, way_out = corpus.metadata, "or take speech_rows=noise"
    tokenizer = load_tokenizer(facts.tokenizer)
    if not isinstance(tokenizer, LMSPTModel):
        raise ConfigError(f"speech_rows: {facts.tokenizer} is no LM-SPT tokenizer; encode with one, {way_out}")
    if tokenizer.fingerprint(facts.precision) != facts.fingerprint:
        raise ConfigError(f"speech_rows: {facts.tokenizer} is not what {config.corpus} was encoded with; {way_out}")
    return tokenizer.quantizer.entries(config.n_codebooks)


def make_data(
    config: Config, corpus: CodedCorpus, tokenizer: PreTrainedTokenizerBase, vocabulary: SpeechVocabulary, longest: int
) -> Data:
    """The sequences of the train and valid splits, and the vocabulary that tells what they are like.

    Utterances whose text, or a column that a task reads, normalises to nothing are left out, and told.
    """
    normalise, columns = get_normaliser(config.normaliser), columns_of(config, corpus)
    spoken: dict[str, list[tuple[str, float]]] = {}

    def samples(split: str) -> SpeechSamples | None:
        codes, n_empty = [], 0
        ids: dict[str, list[np.ndarray]] = {name: [] for name in ("text", *columns)}
        spoken[split] = []
        for row in corpus.rows(split) if corpus.count(split) else ():
            texts = {"text": normalise(row["text"])} | {name: normalise(row["columns"][name]) for name in columns}
            if not all(texts.values()):
                n_empty += 1
                continue
            codes.append(row["audio_codes"].astype(np.int32))
            for name, text in texts.items():
                ids[name].append(vocabulary.encode_text(tokenizer, text))
            spoken[split].append((texts["text"], row["audio_codes"].shape[1] / vocabulary.frame_rate))
        if n_empty:
            log.warning("%s: %d utterances without %s are left out", split, n_empty, " or ".join(ids))
        if not codes:
            return None
        own = ids.pop("text")
        made = SpeechSamples(vocabulary, codes, own, config.task_weights, config.noise, longest, ids)
        if made.n_too_long:
            log.warning("%s: %d utterances longer than %d tokens are left out", split, made.n_too_long, longest)
        return made

    training = samples("train")
    if training is None:
        raise ConfigError(
            f"corpus {config.corpus}: none of the train split's utterances has {' and '.join(['a text', *columns])}"
        )
    members = np.unique(training.members)
    texts, seconds = zip(*(spoken["train"][i] for i in members), strict=True)
    codes, text_ids = zip(*((u.codes, u.text) for u in (training.utterances[i] for i in members)), strict=True)
    trained_on = TrainedOn.of(texts, seconds, codes, text_ids, vocabulary.frame_rate)
    trained_on = dataclasses.replace(trained_on, bare_prompts=config.noise.drop_prompt)
    vocabulary = dataclasses.replace(vocabulary, trained_on=trained_on.after(vocabulary.trained_on))
    return Data(vocabulary, training, samples("valid"))


def longest_sequence(config: Config, model_config: Any) -> int:
    """The longest sequence that is kept. Raises ConfigError where the model cannot take that many."""
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if config.max_length and limit and config.max_length > limit:
        raise ConfigError(f"max_length: {config.max_length} is more than the model's {limit} positions")
    return config.max_length or limit or 2**31


def plan(config: Config) -> dict[str, object]:
    """What a training would do, with token counts and memory; raises everything that would stop it, together."""
    problems = Problems("slm finetune")
    attempt = problems.attempt
    attempt(RunFolder(config.run_dir).check, config)
    device = attempt(resolve_device, config.device) or "cpu"
    precision = attempt(resolve_precision, config.precision, device) or "fp32"
    attempt(engine_config, config.training)
    attempt(get_normaliser, config.normaliser)
    facts: LLMFacts | None = attempt(describe_llm, config.model, config.training.attention)
    corpus: CodedCorpus | None = attempt(open_corpus, config)
    if corpus is not None:
        attempt(corpus.verify)
        attempt(columns_of, config, corpus)
    if corpus is not None and facts is not None and facts.vocabulary is None:
        attempt(codebooks, config, corpus)
    problems.raise_all()
    vocabulary = make_vocabulary(config, corpus, facts.tokenizer, facts.vocabulary)
    data = make_data(config, corpus, facts.tokenizer, vocabulary, longest_sequence(config, facts.config))
    return describe_plan(config, facts, corpus, data, device, precision)


def describe_plan(
    config: Config, facts: LLMFacts, corpus: CodedCorpus, data: Data, device: str, precision: str
) -> dict[str, object]:
    """The plan as a table's rows."""
    training, samples = config.training, data.train
    steps = plan_steps(samples.lengths, training.tokens_per_step, training.steps, config.seed)
    micro = training.gradient_accumulation * process_count()
    if min(map(len, steps)) < micro:
        raise TrainingError(f"training.tokens_per_step: too few sequences to deal to {micro} micro-batches; raise it")
    table = facts.skeleton.get_input_embeddings().weight
    rows = rows_needed(table.shape[0], data.vocabulary)
    tables = 1 if has_tied_head(facts.skeleton) else 2
    total = facts.n_parameters + (rows - table.shape[0]) * table.shape[1] * tables
    trainable = total if config.lora is None else lora_parameters(facts.skeleton, config.lora)
    if config.lora is not None:
        trainable += len(data.vocabulary.new_ids) * table.shape[1] * tables
    tokens = {}
    for number, task in enumerate(samples.task_names):
        lengths = samples.lengths[samples.tasks == number]
        if len(lengths):
            tokens[task] = {
                "sequences": len(lengths),
                "tokens an epoch": int(lengths.sum()),
                "longest": int(lengths.max()),
                "weight": samples.task_weights[number],
            }
    return {
        "model": f"{config.model} ({facts.config.model_type}, {facts.n_parameters:,} parameters)",
        "chat template": bool(facts.tokenizer.chat_template),
        "corpus": f"{config.corpus} (tokenizer {corpus.metadata.tokenizer}, {corpus.metadata.frame_rate:g} Hz)",
        "utterances": {split: corpus.count(split) for split in corpus.splits},
        "left out as too long": samples.n_too_long,
        "speech vocabulary": len(data.vocabulary.new_ids),
        "embedding rows": f"{table.shape[0]} -> {rows}",
        "tokens": tokens,
        "steps": training.steps,
        "tokens a step": int(np.mean([samples.lengths[step].sum() for step in steps])),
        "epochs": round(sum(map(len, steps)) / len(samples.lengths), 2),
        "training": "LoRA" if config.lora else "full",
        "trainable parameters": int(trainable),
        "memory (MiB, about)": estimate_memory(config, facts, total, trainable, rows, precision),
        "device": device,
        "precision": precision,
        "processes": process_count(),
        "result": str(Path(config.run_dir) / "model"),
    }


def lora_parameters(model: nn.Module, settings: LoraSettings) -> int:
    """Parameters of the adapters (without the new rows)."""
    head, count = model.get_output_embeddings(), 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
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
    width = 2 if precision != "fp32" else 4
    layers = 2 if training.gradient_checkpointing else sizes.num_hidden_layers
    feed_forward = getattr(sizes, "intermediate_size", None) or 4 * sizes.hidden_size
    activations = micro * layers * (10 * sizes.hidden_size + 4 * feed_forward) * width
    parts = {
        "weights": total * (4 if config.weights == "fp32" else 2),
        "gradients and optimizer": trainable * 12,
        "activations": activations,
        # Of a chunk of answer tokens, softmax and slope in fp32; engines that hold the head in parts take them all.
        "logits": (micro if training.deepspeed or training.fsdp else min(micro, CHUNK_ELEMENTS / rows)) * rows * 12,
    }
    mib = {name: int(value / 2**20) for name, value in parts.items()}
    return mib | {"together": sum(mib.values())}


def build_model(config: Config, folder: RunFolder, corpus: CodedCorpus) -> tuple[Any, Any, SpeechVocabulary]:
    """The grown model (with adapters, for LoRA), its text tokenizer and its vocabulary."""
    model, tokenizer, own = load_llm(config.model, config.weights, config.training.attention)
    vocabulary = make_vocabulary(config, corpus, tokenizer, own)
    if own is None:
        extend_with_speech(model, vocabulary, config.seed, codebooks(config, corpus))
    elif vocabulary.size > own.size:
        extend_with_speech(model, vocabulary, config.seed, first_id=own.size)
    if config.lora is None:
        return model, tokenizer, vocabulary
    base = folder.path("base")
    # An adapter names its base and can only be attached to one that has the new rows.
    if is_main_process() and not base.exists():
        save_slm(model, tokenizer, vocabulary, base)
    while not base.exists():
        time.sleep(0.2)  # the main process renames it into place; if that fails, torchrun ends this one
    return add_lora(base, vocabulary, config.lora, config.weights, config.training.attention), tokenizer, vocabulary


def run(config: Config) -> Path:
    """Fine-tune, or go on where a killed run stopped; returns the model's folder."""
    folder = RunFolder(config.run_dir)
    folder.check(config)
    result = folder.path("model" if config.lora is None or config.lora.merge else "adapter")
    corpus = open_corpus(config)
    fingerprint = digest(model_path(config.model), (corpus.folder / INDEX_NAME).read_text(encoding="utf-8"))
    refuse_other_inputs(folder, fingerprint, "model or corpus")
    if folder.done(config):
        log.info("%s is complete: skipped", config.run_dir)
        return result
    device = resolve_device(config.device)
    engine = engine_config(config.training)
    folder.start(config, fingerprint)
    seed_everything(config.seed)
    model, tokenizer, vocabulary = build_model(config, folder, corpus)
    data = make_data(config, corpus, tokenizer, vocabulary, longest_sequence(config, model.config))
    started = time.perf_counter()
    trainer = train(
        model,
        data.train,
        data.valid,
        dataclasses.replace(config.training, deepspeed=engine),
        folder.checkpoints,
        seed=config.seed,
        device=device,
        precision=resolve_precision(config.precision, device),
        processes=process_count(),
        callbacks=[MetricsCallback(folder.metrics), TrainerProgress("finetune")],
        tensorboard=folder.path("tensorboard"),
    )
    wall = time.perf_counter() - started
    trained, state = trained_weights(trainer)
    if is_main_process():
        if config.lora is None:
            save_slm(trained, tokenizer, data.vocabulary, folder.path("model"), state)
        else:
            save_adapter(trained, tokenizer, data.vocabulary, folder.path("adapter"), config.model, state)
            if config.lora.merge:
                merged = merge_lora(folder.path("base"), folder.path("adapter"), config.weights)
                save_slm(merged, tokenizer, data.vocabulary, folder.path("model"))
        history = [row for row in trainer.state.log_history if "eval_loss" in row]
        if config.training.keep == "best":
            history.sort(key=lambda row: row["eval_loss"], reverse=True)
        kept = {key: value for key, value in history[-1].items() if key.endswith("loss")} if history else {}
        folder.mark_complete({"steps": trainer.state.global_step, "wall_s": round(wall, 1), **kept})
    trainer.accelerator.wait_for_everyone()
    return result
