"""``slm train-preference``: a model that speaks learns which of its own answers a recogniser understands.

From a model of `slm finetune`, on texts alone. ``method=dpo``: several answers to each text are drawn and judged once,
and the best and the worst of each make a pair (``pairs.jsonl``). ``method=grpo``: each step draws and judges a group of
answers to some texts and raises what is better than its group. An answer is worth more the fewer characters the judge
hears wrong, the nearer its duration is to the rate of speech of the model's training, and where it ends.

What is optimised for a judge gets better for that judge: at each evaluation, and before the first step, held-out texts
are spoken and heard by a second judge, and their distance from the start, their lengths and their ends are measured.
The result, ``run_dir/model``, loads like any fine-tuned model. In full or LoRA; one process. A killed run goes on to
the same result, since what is drawn follows from the seed, the step and the text.

Raises: ConfigError, ModelError, JudgeError, CorpusError, BatchError, TrainingError, all ValueErrors that name the key
    or the file.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.judges.judge import Judge, check_judge, load_judge
from eval.protocol import pinned_identity
from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError, Problems
from recipes.finetuning.results import kept_figures, save_result, warn_of_worse
from recipes.inference.setup import decoding_tokenizer, model_vocabulary
from recipes.inference.tasks import check_marks, task_name
from recipes.preference.config import Config
from recipes.preference.groups import make_rollout, prompt_samples
from recipes.preference.held_out import held_out_figures
from recipes.preference.pairs import make_pairs
from recipes.preference.samples import Speaker
from recipes.preference.texts import Texts, read_texts
from recipes.runs.embedded import model_path, resolve_judge
from recipes.runs.inputs import digest, refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.machine import process_count, resolve_precision, seed_everything, training_device
from recipes.runs.run_folder import RunFolder
from recipes.runs.tracking import MetricsCallback, TrainerProgress
from slm.model.freezing import freeze_lower_layers, freeze_other_towers, keep_text_rows
from slm.model.lora import add_lora
from slm.model.modeling import LLMFacts, describe_llm, load_llm, save_slm
from slm.model.multi_token import set_multi_token_heads
from slm.tasks import Task, get_task
from slm.tasks.tts_aligned import TTS_ALIGNED
from slm.training.batches import plan_steps
from slm.training.preference.dpo import PairSamples, dpo_objective
from slm.training.preference.grpo import grpo_objective
from slm.training.preference.reference import Reference, Scorer
from slm.training.train import train
from slm.training.trainer import Objective
from slm.vocabulary import SpeechVocabulary

__all__ = ["Config", "plan", "run"]

FIGURES = ("wer", "cer", "kl", "length_ratio", "per_1000", "reward")  # how the names of an evaluation's figures end


def refuse_processes() -> None:
    """Raises ConfigError where several processes were started."""
    if process_count() > 1:
        raise ConfigError("slm train-preference runs in one process: start it without torchrun or accelerate launch")


def judge_identities(config: Config) -> list[dict[str, Any]]:
    """What pins both judges, without their weights in memory.

    Raises:
        JudgeError: One is not there, or cannot be read in the configured way.
        ConfigError: They are the same recogniser.
    """
    judges = [resolve_judge(judge) for judge in (config.judge, config.second_judge)]
    first, second = (pinned_identity(check_judge(judge)) for judge in judges)
    same_weights = "weights_sha256" in first and first["weights_sha256"] == second.get("weights_sha256")
    if judges[0].name == judges[1].name or same_weights:
        raise ConfigError(
            f"second_judge: {config.second_judge.name} is the judge that is learnt from; name another recogniser "
            "(embedded-second-recogniser, pocketsphinx, a folder), or nobody sees what only that judge likes"
        )
    return [first, second]


def refuse_books_beside(config: Config, vocabulary: SpeechVocabulary) -> None:
    """Raises ConfigError where books stand beside the ids: what an answer is worth would have to be shared out."""
    if vocabulary.further_sizes:
        raise ConfigError(
            f"model {config.model}: its pattern is {vocabulary.pattern.name}, on whose answers no preference is "
            "trained so far; take a model of pattern semantic or flatten (`slm finetune pattern=...`)"
        )


def asked_task(config: Config, vocabulary: SpeechVocabulary) -> Task:
    """How texts are said.

    Raises:
        ConfigError: The model has not learnt it, or it cannot be done as is asked.
    """
    task = get_task(task_name(config))
    check_marks(task, vocabulary, config.model)
    for name in ("sampling", "decoding"):
        if task.by_word and getattr(config, name).guidance > 1:
            raise ConfigError(
                f"{name}.guidance: {task.name} gives its words in the answer; leave guidance at 1, or ask task=tts"
            )
    return task


def with_task(vocabulary: SpeechVocabulary, task: Task) -> SpeechVocabulary:
    """The vocabulary of a model that was trained for a task last, which `slm synthesize` then asks by itself."""
    known = vocabulary.trained_on
    others = [name for name in known.tasks if task.by_word or name != TTS_ALIGNED.name]
    return replace(vocabulary, trained_on=replace(known, tasks=tuple(dict.fromkeys([*others, task.name]))))


def plan(config: Config) -> dict[str, object]:
    """What a training would do, draw and judge; raises everything that would stop it, together."""
    problems = Problems("slm train-preference")
    attempt = problems.attempt
    attempt(refuse_processes)
    attempt(RunFolder(config.run_dir).check, config)
    device = attempt(training_device, config.device) or "cpu"
    precision = attempt(resolve_precision, config.precision, device) or "fp32"
    attempt(get_normaliser, config.normaliser)
    attempt(judge_identities, config)
    facts: LLMFacts | None = attempt(describe_llm, config.model, config.training.attention)
    vocabulary = attempt(model_vocabulary, config)
    if vocabulary is not None:
        attempt(refuse_books_beside, config, vocabulary)
    texts = tokenizer = task = None
    if vocabulary is not None:
        task = attempt(asked_task, config, vocabulary)
        tokenizer = attempt(decoding_tokenizer, config, vocabulary, "cpu")
        texts = attempt(read_texts, config, vocabulary)
    problems.raise_all()
    speaker = Speaker(facts.tokenizer, vocabulary, tokenizer, "cpu", task)
    return _described(config, facts, texts, speaker) | {
        "training": "LoRA" if config.lora else "full",
        "device": device,
        "precision": precision,
        "result": str(Path(config.run_dir) / ("model" if config.lora is None or config.lora.merge else "adapter")),
    }


def _described(config: Config, facts: LLMFacts, texts: Texts, speaker: Speaker) -> dict[str, object]:
    training = config.training
    if config.method == "dpo":
        drawn = len(texts.train) * config.dpo.samples
        how = f"{config.dpo.samples} for each text, once; the best and the worst make a pair"
    else:
        samples = prompt_samples(config, texts.train, speaker)
        rollouts = -(-training.steps // config.grpo.updates)
        steps = plan_steps(samples.lengths, training.tokens_per_step, rollouts, config.seed)
        drawn = sum(map(len, steps)) * config.grpo.group_size
        how = f"{config.grpo.group_size} for each text of a step, {drawn / rollouts:.1f} a step"
        how += f", each for {config.grpo.updates} steps" if config.grpo.updates > 1 else ""
    evaluations = 1 + training.steps // training.eval_steps if training.eval_steps else 0
    return {
        "model": f"{config.model} ({facts.config.model_type}, {facts.n_parameters:,} parameters)",
        "method": config.method,
        "task": speaker.task.name,
        "texts to learn from": len(texts.train),
        "held-out texts": len(texts.held_out),
        "left out (no word, or too long)": texts.left_out,
        "steps": training.steps,
        "tokens a step": training.tokens_per_step,
        "answers drawn to learn from": f"{drawn:,} ({how})",
        "evaluations": evaluations,
        "answers drawn to evaluate": evaluations * len(texts.held_out),
        "judge": f"{config.judge.display_name()}: hears {drawn + evaluations * len(texts.held_out):,} answers",
        "second judge": f"{config.second_judge.display_name()}: hears {evaluations * len(texts.held_out):,} answers",
        "rate of speech": "known" if speaker.vocabulary.trained_on else "unknown: no term for the length",
    }


def run(config: Config) -> Path:
    """Train, or go on where a killed run stopped; returns the model's folder."""
    refuse_processes()
    folder = RunFolder(config.run_dir)
    folder.check(config)
    result = folder.path("model" if config.lora is None or config.lora.merge else "adapter")
    vocabulary = model_vocabulary(config)
    refuse_books_beside(config, vocabulary)
    task = asked_task(config, vocabulary)
    texts = read_texts(config, vocabulary)
    identities = json.dumps(judge_identities(config), sort_keys=True)
    every = [text.written for text in (*texts.train, *texts.held_out)]
    fingerprint = digest(model_path(config.model), every, identities, model_path(config.tokenizer))
    refuse_other_inputs(folder, fingerprint, "model, texts, judges or speech tokenizer")
    if folder.done(config):
        log.info("%s is complete: skipped", config.run_dir)
        return result
    device = training_device(config.device)
    precision = resolve_precision(config.precision, device)
    judge, second_judge = (load_judge(resolve_judge(one), device) for one in (config.judge, config.second_judge))
    tokenizer = decoding_tokenizer(config, vocabulary, device)
    folder.start(config, fingerprint)
    seed_everything(config.seed)
    model, text_tokenizer, vocabulary = load_llm(config.model, config.weights, config.training.attention)
    model = model.to(device).eval()
    speaker = Speaker(text_tokenizer, vocabulary, tokenizer, device, task)
    if texts.left_out:
        log.warning("%d texts that hold no word, or are longer than the model knows, are left out", texts.left_out)
    if vocabulary.trained_on is None:
        log.warning("%s does not tell the rate of speech of its training: lengths are not judged", config.model)
    else:
        vocabulary = with_task(vocabulary, task)
    if config.method == "dpo":
        pairs = make_pairs(config, folder, texts.train, speaker, judge, Scorer(model, device, precision))
        samples, objective = PairSamples(pairs), dpo_objective(config.dpo.beta, config.dpo.sft_weight)
        reference = _reference(config, device, precision)
    else:
        samples = prompt_samples(config, texts.train, speaker)
        reference = _reference(config, device, precision, keep=config.grpo.kl_weight > 0)
        objective = _grpo_objective(config, texts, speaker, judge, reference)
    model = _made_trainable(config, model, text_tokenizer, vocabulary, folder)
    started = time.perf_counter()
    trainer = train(
        model,
        samples,
        None,
        config.training,
        folder.checkpoints,
        seed=config.seed,
        device=device,
        precision=precision,
        callbacks=[MetricsCallback(folder.metrics), TrainerProgress("train-preference")],
        tensorboard=folder.path("tensorboard"),
        measure=held_out_figures(config, texts.held_out, speaker, judge, second_judge, reference),
        objective=objective,
    )
    wall = time.perf_counter() - started
    save_result(folder, trainer, vocabulary, text_tokenizer, config.lora, config.weights, config.model)
    kept = kept_figures(trainer, config.training, FIGURES)
    warn_of_worse(trainer, kept, ("wer", "cer"))
    folder.mark_complete({"steps": trainer.state.global_step, "wall_s": round(wall, 1), **kept})
    return result


def _reference(config: Config, device: str, precision: str, keep: bool = False) -> Reference:
    def load() -> nn.Module:
        return load_llm(config.model, config.weights, config.training.attention)[0]

    return Reference(load, device, precision, keep)


def _grpo_objective(config: Config, texts: Texts, speaker: Speaker, judge: Judge, reference: Reference) -> Objective:
    return grpo_objective(
        make_rollout(config, texts.train, speaker, judge),
        reference,
        clip=config.grpo.clip,
        kl_weight=config.grpo.kl_weight,
        updates=config.grpo.updates,
        temperature=config.sampling.temperature,
    )


def _made_trainable(
    config: Config,
    model: PreTrainedModel,
    text_tokenizer: PreTrainedTokenizerBase,
    vocabulary: SpeechVocabulary,
    folder: RunFolder,
) -> nn.Module:
    """The model with what is to learn: all but its frozen layers, or adapters, whose base is then kept in `folder`."""
    set_multi_token_heads(model, None)
    if config.lora is not None:
        if not folder.path("base").exists():
            save_slm(model, text_tokenizer, vocabulary, folder.path("base"))
        return add_lora(model, vocabulary, config.lora)
    freeze_other_towers(model)
    if config.training.freeze_layers:
        freeze_lower_layers(model, config.training.freeze_layers)
        keep_text_rows(model, vocabulary)
    return model
