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
from pathlib import Path
from typing import Any

from eval.text.normalisers import get_normaliser
from recipes.config import Problems
from recipes.finetuning.attention_picture import AttentionPicture
from recipes.finetuning.config import Config
from recipes.finetuning.corpora import Corpora, columns_of, open_corpora, used_tasks
from recipes.finetuning.data import longest_sequence, make_data
from recipes.finetuning.estimates import describe_plan
from recipes.finetuning.exposure import exposure_of_data
from recipes.finetuning.measure import measured_names, word_errors
from recipes.finetuning.pattern_costs import cache_bytes_per_second
from recipes.finetuning.results import kept_figures, save_result, warn_of_worse
from recipes.finetuning.vocabulary import codebooks, make_vocabulary
from recipes.runs.deepspeed import engine_config, set_deepspeed_device
from recipes.runs.embedded import model_path
from recipes.runs.inputs import digest, refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.machine import is_main_process, process_count, resolve_precision, seed_everything, training_device
from recipes.runs.run_folder import RunFolder
from recipes.runs.tracking import MetricsCallback, TrainerProgress
from slm.model.freezing import freeze_lower_layers, freeze_other_towers, keep_text_rows
from slm.model.lora import add_lora
from slm.model.modeling import LLMFacts, describe_llm, load_llm, save_slm
from slm.model.multi_token import set_multi_token_heads
from slm.model.speech_rows import extend_with_speech
from slm.training.alignment.attention_reader import AttentionReader, heads_of
from slm.training.objectives import check_objective, finetuning_objective
from slm.training.packing import check_architecture
from slm.training.train import train
from slm.vocabulary import SpeechVocabulary

FIGURES = ("loss", "wer", "cer")  # how the names of an evaluation's figures end


def plan(config: Config) -> dict[str, object]:
    """What a training would do, with token counts and memory; raises everything that would stop it, together."""
    problems = Problems("slm finetune")
    attempt = problems.attempt
    attempt(RunFolder(config.run_dir).check, config)
    device = attempt(training_device, config.device) or "cpu"
    precision = attempt(resolve_precision, config.precision, device) or "fp32"
    attempt(engine_config, config.training)
    attempt(_check_objective, config)
    attempt(get_normaliser, config.normaliser)
    attempt(get_normaliser, config.prompt_normaliser or config.normaliser)
    facts: LLMFacts | None = attempt(describe_llm, config.model, config.training.attention)
    attempt(measured_names, config)
    if facts is not None and config.training.pack_length:
        attempt(check_architecture, facts.skeleton)
    if facts is not None and config.training.freeze_layers:
        attempt(freeze_lower_layers, facts.skeleton, config.training.freeze_layers)
    if facts is not None and config.training.alignment:
        attempt(AttentionReader, facts.skeleton, heads_of(config.training.alignment, facts.skeleton))
    corpora: Corpora | None = attempt(open_corpora, config)
    if corpora is not None:
        for corpus in corpora.opened:
            attempt(corpus.verify)
        attempt(columns_of, config, corpora)
    if corpora is not None and facts is not None and facts.vocabulary is None:
        attempt(codebooks, config, corpora)
    problems.raise_all()
    vocabulary = make_vocabulary(config, corpora, facts.tokenizer, facts.vocabulary)
    data = make_data(config, corpora, facts.tokenizer, vocabulary, longest_sequence(config, facts.config))
    return describe_plan(config, facts, corpora, data, device, precision)


def _check_objective(config: Config) -> None:
    check_objective(config.training, config.pattern, used_tasks(config))


def build_model(config: Config, folder: RunFolder, corpora: Corpora) -> tuple[Any, Any, SpeechVocabulary]:
    """The grown model (with adapters, for LoRA), its text tokenizer and its vocabulary."""
    model, tokenizer, own = load_llm(config.model, config.weights, config.training.attention, config.random_weights)
    vocabulary = make_vocabulary(config, corpora, tokenizer, own)
    if own is None:
        extend_with_speech(model, vocabulary, config.seed, codebooks(config, corpora))
    elif vocabulary.size > own.size:
        extend_with_speech(model, vocabulary, config.seed, first_id=own.size)
    set_multi_token_heads(model, config.training.multi_token)
    if config.lora is None:
        freeze_other_towers(model)
        if config.training.freeze_layers:
            freeze_lower_layers(model, config.training.freeze_layers)
            keep_text_rows(model, vocabulary)
        return model, tokenizer, vocabulary
    # Every process grows the same rows; the first keeps the grown base, which the adapter is merged into at the end.
    if is_main_process() and not folder.path("base").exists():
        save_slm(model, tokenizer, vocabulary, folder.path("base"))
    return add_lora(model, vocabulary, config.lora), tokenizer, vocabulary


def run(config: Config) -> Path:
    """Fine-tune, or go on where a killed run stopped; returns the model's folder."""
    folder = RunFolder(config.run_dir)
    folder.check(config)
    result = folder.path("model" if config.lora is None or config.lora.merge else "adapter")
    measured_names(config)
    _check_objective(config)
    corpora = open_corpora(config)
    replayed = [Path(config.replay.path).expanduser()] if config.replay else []
    fingerprint = digest(model_path(config.model), corpora.index_text, *replayed)
    refuse_other_inputs(folder, fingerprint, "model, corpus or replayed text" if replayed else "model or corpus")
    if folder.done(config):
        log.info("%s is complete: skipped", config.run_dir)
        return result
    device = training_device(config.device)
    engine = engine_config(config.training)
    set_deepspeed_device(device)
    folder.start(config, fingerprint)
    seed_everything(config.seed)
    model, tokenizer, vocabulary = build_model(config, folder, corpora)
    data = make_data(config, corpora, tokenizer, vocabulary, longest_sequence(config, model.config))
    callbacks = [MetricsCallback(folder.metrics), TrainerProgress("finetune")]
    if config.training.alignment:
        callbacks.append(AttentionPicture(config.training.alignment, data, tokenizer, folder.path("plots")))
    # Before it trains: what is read of the model now may be out of reach when it has trained for days.
    facts = describe_llm(config.model, config.training.attention)
    exposure = exposure_of_data(config, corpora, facts, data)
    started = time.perf_counter()
    trainer = train(
        model,
        data.all_train,
        data.all_valid,
        dataclasses.replace(config.training, deepspeed=engine),
        folder.checkpoints,
        seed=config.seed,
        device=device,
        precision=resolve_precision(config.precision, device),
        processes=process_count(),
        callbacks=callbacks,
        tensorboard=folder.path("tensorboard"),
        measure=word_errors(config, data, tokenizer),
        objective=finetuning_objective(vocabulary, config.training, config.further_weight),
        # A model that has learnt to speak has something to lose.
        evaluates_first=vocabulary.trained_on is not None,
    )
    wall = time.perf_counter() - started
    save_result(folder, trainer, data.vocabulary, tokenizer, config.lora, config.weights, config.model)
    if is_main_process():
        kept = kept_figures(trainer, config.training, FIGURES)
        warn_of_worse(trainer, kept, FIGURES)
        steps = trainer.state.global_step
        cost = {
            "flops": exposure.amounts(steps).flops,
            "cache_bytes_per_s": cache_bytes_per_second(facts, data.vocabulary),
        }
        folder.mark_complete({"steps": steps, "wall_s": round(wall, 1), **cost, **kept})
    trainer.accelerator.wait_for_everyone()
    return result
