"""``slm finetune`` on tiny models: corpora, texts, the best checkpoint, plans that name what is missing."""

from __future__ import annotations

import json
import os
import shutil
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning import finetune_config
from safetensors.torch import load_file
from slm_tiny import CODES, metadata, save_llm, tiny_tokenizer, utterances, write_corpus
from transformers import AutoModelForCausalLM, Lfm2Config, MambaConfig
from transformers.utils.logging import disable_progress_bar

from eval.text.normalisers import get_normaliser
from eval.text.wer import score_pairs
from recipes.commands import finetune
from recipes.config import ConfigError, load_config
from recipes.finetuning.corpora import open_corpora
from recipes.finetuning.data import longest_sequence, make_data
from recipes.finetuning.estimates import estimate_memory
from recipes.finetuning.exposure import exposure_of
from recipes.finetuning.utterances import evaluated
from recipes.finetuning.vocabulary import codebooks, make_vocabulary
from recipes.runs.deepspeed import engine_config
from slm.corpus import CodedCorpusWriter
from slm.decoding.loops import longest_loop
from slm.generation import SpeechLM, transcribe_codes
from slm.model.modeling import describe_llm
from slm.trained_on import TrainedOn
from slm.training.batches import plan_steps
from slm.training.config import TrainingConfig, TrainingError
from slm.training.packing import check_architecture
from slm.vocabulary import SpeechVocabulary
from tokenizer import load_tokenizer


def test_the_longest_loops_of_a_training_are_kept() -> None:
    """The longest of all utterances, in codes and in words; an older folder's facts load without."""
    codes = [np.array([[1, 2, 3, 4, 5, 6]]), np.array([[7] + [3, 4] * 5 + [1, 2]]), np.array([[5] * 6])]
    ids = [np.array([9, 8, 7]), np.array([4, 4, 4, 4, 4]), np.array([1, 2, 1, 2])]
    known = TrainedOn.of(["ab", "abcd", "abc"], [0.5, 1.0, 0.5], codes, ids, frame_rate=12.5)
    assert (known.shortest_text, known.longest_loop_s, known.longest_text_loop) == (2, 0.8, 5)
    before = {name: value for name, value in vars(known).items() if "loop" not in name and name != "shortest_text"}
    assert TrainedOn(**before).longest_loop_s is None


def test_finetune_recipe_plans_trains_skips_and_refuses(tmp_path) -> None:
    config = finetune_config(tmp_path, "run")
    plan = finetune.plan(config)
    assert plan["tokens"]["asr"]["sequences"] == 12 and plan["utterances"] == {"test": 4, "train": 12, "valid": 4}
    assert plan["speech vocabulary"] == CODES + 4
    folder = finetune.run(config)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert plan["trainable parameters"] == sum(p.numel() for p in model.parameters())
    told = json.loads((folder / "speech_vocabulary.json").read_text())
    assert told["normaliser"] == "basic"
    heard = [(row["text"], row["audio_codes"].shape[1] / 12.5) for row in utterances(12)]
    assert told["trained_on"]["characters"] == "".join(sorted(set("".join(text for text, _ in heard))))
    slow, _, fast = told["trained_on"]["characters_per_s"]
    rates = [len(text) / seconds for text, seconds in heard]
    assert min(rates) <= slow < fast <= max(rates)
    assert (
        told["trained_on"]["longest_s"] <= max(seconds for _, seconds in heard) < told["trained_on"]["longest_s"] + 0.1
    )
    assert told["trained_on"]["shortest_text"] == min(len(text) for text, _ in heard)
    loops = [longest_loop(row["audio_codes"][:1]) / 12.5 for row in utterances(12)]
    assert told["trained_on"]["longest_loop_s"] == max(loops) and told["trained_on"]["longest_text_loop"] == 0
    assert told["trained_on"]["bare_prompts"] == 0.0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert all({"eval_asr_loss", "eval_tts_loss"} <= row.keys() for row in rows if "eval_loss" in row)
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"] == "finetune"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert finetune.run(config) == folder and (folder / "model.safetensors").stat().st_mtime_ns == before
    # Killed after its last checkpoint but before the end: the same weights come out again.
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "run" / "complete.json").unlink()
    shutil.rmtree(folder)
    finetune.run(config)
    assert (folder / "model.safetensors").read_bytes() == content
    with pytest.raises(ConfigError, match="seed"):
        finetune.run(finetune_config(tmp_path, "run", "seed=1"))
    llm = (tmp_path / "llm" / "model.safetensors").read_bytes()
    (tmp_path / "llm" / "model.safetensors").write_bytes(llm[:-4] + b"new!")
    with pytest.raises(ConfigError, match="model or corpus"):
        finetune.run(config)
    (tmp_path / "llm" / "model.safetensors").write_bytes(llm)
    assert finetune.run(config) == folder
    # A model that speaks already goes on with its own vocabulary, and refuses other codes.
    again = finetune_config(tmp_path, "again", f"model={folder}")
    assert finetune.plan(again)["embedding rows"].split(" -> ")[0] == finetune.plan(again)["embedding rows"].split()[-1]
    write_corpus(tmp_path / "other", fingerprint="0" * 64)
    with pytest.raises(ValueError, match="codes mean something else"):
        finetune.run(finetune_config(tmp_path, "third", f"model={folder}", f"corpus={tmp_path / 'other'}"))


def test_a_model_that_speaks_is_measured_before_it_learns_more_and_told_if_it_got_worse(tmp_path, caplog) -> None:
    def evaluations(name: str) -> list[dict]:
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if "eval_loss" in row]

    first = finetune.run(finetune_config(tmp_path, "first"))
    assert [row["step"] for row in evaluations("first")] == [2, 4]  # what a text LM knows of speech is chance
    assert "worse than before the training" not in caplog.text
    wild = ["training.learning_rate=1.0", "training.warmup_steps=0"]
    finetune.run(finetune_config(tmp_path, "wild", f"model={first}", *wild))
    before, *after = evaluations("wild")
    assert before["step"] == 0 and [row["step"] for row in after] == [2, 4]
    for name in ("eval_loss", "eval_asr_loss", "eval_tts_loss"):
        assert before[name] == pytest.approx(evaluations("first")[-1][name], abs=1e-4)
    said = next(record.message for record in caplog.records if "worse than before" in record.message)
    assert f"eval_loss {after[-1]['eval_loss']:.4g} (before: {before['eval_loss']:.4g})" in said
    # What was kept is a checkpoint's, also where the start was better than all of them.
    best = ["training.keep=best", f"model={first}", *wild]
    finetune.run(finetune_config(tmp_path, "best", *best))
    summary = json.loads((tmp_path / "best" / "complete.json").read_text())["summary"]
    assert summary["eval_loss"] == min(row["eval_loss"] for row in evaluations("best")[1:]) > before["eval_loss"]


def test_finetune_draws_no_bar_where_the_output_is_no_terminal(tmp_path, capfd) -> None:
    disable_progress_bar()  # the library's own, of loading and saving: the command does so before it calls the recipe
    finetune.run(finetune_config(tmp_path, "run", "training.eval_steps=0"))
    said = capfd.readouterr()
    assert "finetune:" not in said.err and "\r" not in said.err + said.out


def data_of(config: finetune.Config):
    """The vocabulary's text tokenizer, and what `config` would train on."""
    facts, corpora = describe_llm(config.model), open_corpora(config)
    vocabulary = make_vocabulary(config, corpora, facts.tokenizer, facts.vocabulary)
    data = make_data(config, corpora, facts.tokenizer, vocabulary, longest_sequence(config, facts.config))
    return facts.tokenizer, data


def test_a_text_to_be_read_keeps_what_a_text_to_be_written_loses(tmp_path) -> None:
    """Case and punctuation tell how a text is said: what ASR is not to write, TTS is to read."""
    rows = [row | {"text": f"{row['text'].capitalize()}!"} for row in utterances(4)]
    writer = CodedCorpusWriter(tmp_path / "cased", metadata())
    writer.write_shard("train", 0, 1, rows)
    writer.finish()
    config = finetune_config(tmp_path, "run", f"corpus={tmp_path / 'cased'}", "prompt_normaliser=none")
    tokenizer, data = data_of(config)
    texts = {"asr": set(), "tts": set()}
    for index, task in enumerate(data.train.tasks):
        ids = data.train.example(index, None).input_ids
        texts[data.train.task_names[task]].add(tokenizer.decode(ids[ids < data.vocabulary.first_id], True))
    assert {text.strip() for text in texts["tts"]} == {row["text"] for row in rows}
    assert {text.strip() for text in texts["asr"]} == {row["text"].lower().rstrip("!") for row in rows}
    assert all(len(data.train.example(i, None)) == length for i, length in enumerate(data.train.lengths))
    assert "!" in data.vocabulary.trained_on.characters
    folder = finetune.run(config)
    assert SpeechVocabulary.load(folder).normaliser_of_prompts == "none"


def test_several_corpora_are_seen_by_their_weights(tmp_path) -> None:
    write_corpus(tmp_path / "often", n=6)
    write_corpus(tmp_path / "seldom", n=12)
    sources = [f"corpora=[{{path: {tmp_path}/often, weight: 2.5}}, {{path: {tmp_path}/seldom, weight: 0.5}}]"]
    config = finetune_config(tmp_path, "run", 'corpus=""', *sources, "task_weights={asr: 1}", "training.steps=2")
    _, data = data_of(config)
    plan = plan_steps(data.train.lengths, 200, 400, 0, data.train.repeats)
    seen = np.bincount(np.concatenate(plan), minlength=18)
    assert seen[:6].mean() / seen[6:].mean() == pytest.approx(5.0, rel=0.05)
    assert seen[:6].std() < 0.1 * seen[:6].mean()  # each of one corpus as often as the next
    folder = finetune.run(config)
    assert finetune.plan(config)["utterances"] == {"test": 8, "train": 18, "valid": 8} and folder.exists()
    weights = [f"corpora=[{{path: {tmp_path}/often, weight: 1}}, {{path: {tmp_path}/seldom, weight: 0.5}}]"]
    with pytest.raises(ConfigError, match="corpora"):
        finetune.run(
            finetune_config(tmp_path, "run", 'corpus=""', *weights, "task_weights={asr: 1}", "training.steps=2")
        )
    write_corpus(tmp_path / "foreign", fingerprint="0" * 64)
    mixed = [f"corpora=[{{path: {tmp_path}/often}}, {{path: {tmp_path}/foreign}}]"]
    with pytest.raises(ValueError, match="foreign.*codes mean something else"):
        open_corpora(finetune_config(tmp_path, "mixed", 'corpus=""', *mixed))
    with pytest.raises(ValueError, match="corpus and corpora: give one"):
        finetune_config(tmp_path, "both", *mixed)


def test_a_corpus_is_learnt_in_its_own_tasks_alone(tmp_path) -> None:
    """Voices to be heard and not to be spoken with; what another task reads need not be in that corpus."""
    clean = CodedCorpusWriter(tmp_path / "clean", metadata(columns=["translation"]))
    for split, n in (("train", 6), ("valid", 4)):
        clean.write_shard(split, 0, 1, [row | {"columns": {"translation": "ja"}} for row in utterances(n)])
    clean.finish()
    write_corpus(tmp_path / "noisy", n=12)
    noisy = f"{{path: {tmp_path}/noisy, tasks: [asr]}}"
    sources = [f"corpora=[{{path: {tmp_path}/clean}}, {noisy}]", 'corpus=""', "training.steps=2"]
    config = finetune_config(tmp_path, "run", *sources, "task_weights={asr: 1, tts: 1, st: 1}")
    _, data = data_of(config)
    for samples, clean, heard in ((data.train, 6, 12), (data.valid, 4, 4)):
        of = {name: samples.members[samples.tasks == n] for n, name in enumerate(samples.task_names)}
        assert len(of["asr"]) == clean + heard
        assert sorted(of["tts"]) == sorted(of["st"]) == list(range(clean))
    finetune.run(config)
    with pytest.raises(ConfigError, match="corpora"):  # the same corpus for other tasks is other data
        finetune.run(
            finetune_config(
                tmp_path,
                "run",
                sources[0].replace("[asr]", "[asr, tts]"),
                *sources[1:],
                "task_weights={asr: 1, tts: 1, st: 1}",
            )
        )
    with pytest.raises(ConfigError, match="tasks of .*noisy: asr is not trained; task_weights has tts"):
        open_corpora(finetune_config(tmp_path, "other", *sources, "task_weights={tts: 1}"))
    with pytest.raises(ConfigError, match="corpora: none is for tts of task_weights"):
        open_corpora(finetune_config(tmp_path, "other", f"corpora=[{noisy}]", 'corpus=""'))
    with pytest.raises(ConfigError, match="st reads translation, and corpus .*noisy has no such column"):
        finetune.plan(
            finetune_config(
                tmp_path, "other", sources[0].replace("[asr]", "[asr, st]"), 'corpus=""', "task_weights={asr: 1, st: 1}"
            )
        )
    with pytest.raises(ConfigError, match="tasks: of corpus .*noisy empty"):
        finetune_config(tmp_path, "other", f"corpora=[{{path: {tmp_path}/noisy, tasks: []}}]", 'corpus=""')


def test_the_best_checkpoint_may_go_by_word_errors_and_the_training_end_when_they_rise(tmp_path) -> None:
    """The transcripts move nothing: the same weights as without; the checkpoint of fewest errors is what is saved."""
    own = ["training.steps=12", "training.learning_rate=3e-3", "training.warmup_steps=0", "task_weights={asr: 1}"]
    plain = finetune.run(finetune_config(tmp_path, "plain", *own, "task_weights.tts=0"))
    own += ["eval_transcripts=3", "task_weights.tts=0"]
    told = finetune.run(finetune_config(tmp_path, "told", *own))
    assert (plain / "model.safetensors").read_bytes() == (told / "model.safetensors").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "told" / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["eval_asr_cer"] for row in rows if "eval_asr_cer" in row}
    assert list(found) == [2, 4, 6, 8, 10, 12] and len(set(found.values())) > 1
    best = ["training.keep=best", "training.keep_by=asr_cer"]
    chosen = finetune.run(finetune_config(tmp_path, "best", *own, *best))
    summary = json.loads((tmp_path / "best" / "complete.json").read_text())["summary"]
    assert summary["eval_asr_cer"] == min(found.values())
    speech_lm = SpeechLM.load(chosen)
    rows = utterances(4, seed=1)[:3]
    written = [o.text for o in transcribe_codes(speech_lm, [row["audio_codes"] for row in rows])]
    cer = score_pairs([row["text"] for row in rows], written, get_normaliser("none")).cer
    assert round(100 * cer, 3) == min(found.values())
    # A rate at which it only gets worse ends it.
    worse = ["training.learning_rate=0.5", "training.patience=2", "training.schedule=constant", "training.steps=60"]
    finetune.run(finetune_config(tmp_path, "worse", *own, *best, *worse))
    assert json.loads((tmp_path / "worse" / "complete.json").read_text())["summary"]["steps"] < 60


def test_what_the_best_checkpoint_goes_by_must_be_measured(tmp_path) -> None:
    with pytest.raises(ConfigError, match="keep_by: 'asr_wer' is not measured; there are loss, asr_loss, tts_loss"):
        finetune.plan(finetune_config(tmp_path, "run", "training.keep=best", "training.keep_by=asr_wer"))
    for options in ({"patience": 2}, {"keep_by": "asr_loss"}):
        with pytest.raises(TrainingError, match=f"training.{next(iter(options))}.*keep=best"):
            TrainingConfig(**options)


def test_text_that_is_replayed_keeps_its_perplexity(tmp_path) -> None:
    """Replayed beside speech it is learnt better than by the transcripts alone; measured only, it moves nothing."""
    words = sorted({word for row in utterances(12) for word in row["text"].split()})
    rng = np.random.default_rng(0)
    (tmp_path / "prose.txt").write_text("\n".join(" ".join(rng.choice(words, 6)) for _ in range(200)))
    own = ["training.steps=20", "training.learning_rate=1e-2", "training.warmup_steps=0", "training.save_steps=20"]
    own += ["training.eval_steps=20", "training.trainer.eval_on_start=true"]
    losses = {}
    for name, weight in (("replayed", 1.0), ("measured", 0.0)):
        replay = f"replay={{path: {tmp_path / 'prose.txt'}, weight: 0.2, loss_weight: {weight}}}"
        config = finetune_config(tmp_path, name, replay, *own)
        assert ("text" in finetune.plan(config)["tokens"]) == (weight > 0)
        finetune.run(config)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["eval_text_loss"] for row in rows if "eval_text_loss" in row]
    assert losses["replayed"][0] == pytest.approx(losses["measured"][0], abs=1e-4)  # the same held-out lines, before
    assert losses["replayed"][-1] < 0.9 * losses["measured"][-1]
    plain = finetune.run(finetune_config(tmp_path, "plain", *own))
    assert (plain / "model.safetensors").read_bytes() == (tmp_path / "measured/model/model.safetensors").read_bytes()
    with (tmp_path / "prose.txt").open("a") as file:
        file.write("\nanother line")
    with pytest.raises(ConfigError, match="model, corpus or replayed text"):
        finetune.run(finetune_config(tmp_path, "measured", replay, *own))
    with pytest.raises(ConfigError, match="replay.path: .*none.txt cannot be read"):
        finetune.plan(finetune_config(tmp_path, "none", f"replay.path={tmp_path / 'none.txt'}"))


def test_losses_are_measured_on_the_same_part_of_a_large_valid_split(tmp_path) -> None:
    _, data = data_of(finetune_config(tmp_path, "run", "eval_utterances=3"))
    assert len(data.valid.utterances) == 3 and len(data.train.utterances) == 12
    assert evaluated(1000, 10) == evaluated(1000, 10) and len(evaluated(1000, 10)) == 10
    assert evaluated(10, 10) is None and evaluated(1000, None) is None


def test_speech_rows_come_from_the_books_that_the_corpus_was_encoded_with(tmp_path) -> None:
    config = finetune_config(tmp_path, "run", "speech_rows=codebook")
    book = load_tokenizer("embedded-12.5hz")
    facts = types.SimpleNamespace(tokenizer="embedded-12.5hz", precision="fp32", fingerprint=book.fingerprint())
    corpora = types.SimpleNamespace(metadata=facts, names="runs/codes")
    (entries,) = codebooks(config, corpora)
    codes = torch.tensor([[[5, 900, 5]]])
    torch.testing.assert_close(entries[codes[0, 0]], book.quantizer.look_up(codes, None)[0])
    assert codebooks(finetune_config(tmp_path, "other"), corpora) is None
    facts.fingerprint = "another"
    with pytest.raises(ConfigError, match="speech_rows: embedded-12.5hz is not what .* was encoded with"):
        codebooks(config, corpora)
    facts.tokenizer = "dmel-25hz"
    with pytest.raises(ConfigError, match="speech_rows: dmel-25hz is no LM-SPT tokenizer"):
        codebooks(config, corpora)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_complete_finetuning_goes_on_to_more_steps(tmp_path, schedule) -> None:
    """At a constant rate it ends in the very weights of the run begun with them; operational keys are free."""
    own = [f"training.schedule={schedule}", "training.warmup_steps=1"]
    whole = finetune.run(finetune_config(tmp_path, "whole", "training.steps=6", *own))
    short = finetune.run(finetune_config(tmp_path, "grown", "training.steps=3", *own))
    before = (short / "model.safetensors").read_bytes()
    free = ["training.save_steps=1", "training.eval_steps=5", "training.log_steps=2", "training.keep_checkpoints=4"]
    grown = finetune.run(finetune_config(tmp_path, "grown", "training.steps=6", *own, *free))
    after = (grown / "model.safetensors").read_bytes()
    assert after != before
    assert (after == (whole / "model.safetensors").read_bytes()) == (schedule == "constant")
    kept = {path.name for path in (tmp_path / "grown/checkpoints").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{step}" for step in (3, 4, 5, 6)}
    rows = [json.loads(line) for line in (tmp_path / "grown/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row and row["step"] > 3] == [5, 6]
    assert json.loads((tmp_path / "grown/complete.json").read_text())["summary"]["steps"] == 6
    with pytest.raises(ConfigError, match="training.steps: was 6, is now 4"):
        finetune.plan(finetune_config(tmp_path, "grown", *own))


def test_epochs_are_the_steps_that_they_come_to(tmp_path) -> None:
    """Half as many codes a second are half as many steps for the same speech, in the plan and in the training."""
    config = finetune_config(tmp_path, "run", "training.epochs=2.5", "training.eval_steps=0")
    plan = finetune.plan(config)
    lengths = data_of(config)[1].train.lengths
    assert plan["steps"] == round(2.5 * lengths.sum() / 260) != 4 and 2.3 < plan["epochs"] < 2.8
    finetune.run(config)
    summary = json.loads((tmp_path / "run" / "complete.json").read_text())["summary"]
    assert summary["steps"] == plan["steps"]
    assert summary["flops"] == exposure_of(config).amounts(plan["steps"]).flops > 0
    in_fp32 = 1024 * plan["patterns"]["semantic"]["KV cache KiB per s"]
    assert summary["cache_bytes_per_s"] == pytest.approx(in_fp32 / 2, rel=0.02)  # bf16; the plan's figure is rounded
    twice = finetune_config(
        tmp_path, "twice", "training.epochs=2.5", f"corpora=[{{path: {tmp_path / 'codes'}, weight: 2}}]", "corpus=''"
    )
    assert finetune.plan(twice)["steps"] == pytest.approx(2 * plan["steps"], abs=1)
    with pytest.raises(ConfigError, match="training.epochs: 0 must be above 0, or null for training.steps"):
        finetune_config(tmp_path, "none", "training.epochs=0")


def test_an_engine_that_would_lose_the_model_is_refused_at_the_start(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for name in ("deepspeed-zero2", "deepspeed-zero3"):
        assert Path(engine_config(TrainingConfig(deepspeed=name))).stem == name
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(ConfigError, match="mine.json has stage 3 without stage3_gather_16bit_weights_on_model_save"):
        engine_config(TrainingConfig(deepspeed=str(file)))
    file.write_text(json.dumps({"optimizer": {"type": "AdamW"}}))
    assert engine_config(TrainingConfig(deepspeed=str(file))) == str(file)
    with pytest.raises(ConfigError, match="embedding_learning_rate: .*mine.json brings an optimizer of its own"):
        engine_config(TrainingConfig(deepspeed=str(file), embedding_learning_rate=1e-3))
    file.write_text("{")
    with pytest.raises(ConfigError, match="mine.json is no JSON"):
        engine_config(TrainingConfig(deepspeed=str(file)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install deepspeed"):
        engine_config(TrainingConfig(deepspeed="deepspeed-zero2"))


def test_a_build_that_was_killed_is_told_before_a_training_waits_for_it(tmp_path, monkeypatch, caplog) -> None:
    """torch's lock on the folder that DeepSpeed's operations are built in outlives the process that made it."""
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    engine_config(TrainingConfig(deepspeed="deepspeed-zero2"))
    assert str(lock) not in caplog.text  # it may well be building
    os.utime(lock, (time.time() - 3600,) * 2)
    engine_config(TrainingConfig(deepspeed="deepspeed-zero2"))
    assert f"{lock} is 60 minutes old" in caplog.text and "remove the file" in caplog.text


def test_a_plan_names_all_that_is_missing(tmp_path, monkeypatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("slm.model.modeling.HfApi.model_info", unreachable)
    config = load_config(
        finetune.Config, None, ["model=Qwen/Qwen2.5-0.5B-Instruct", f"run_dir={tmp_path / 'r'}", "training.deepspeed=x"]
    )
    with pytest.raises(ConfigError) as error:
        finetune.plan(config)
    for part in ("Qwen/Qwen2.5-0.5B-Instruct", "model.safetensors", "corpus: not set", "torchrun"):
        assert part in str(error.value)
    assert not (tmp_path / "r").exists()
    with pytest.raises(ConfigError, match="weights"):
        load_config(finetune.Config, None, ["weights=bf16"])


def test_a_plan_refuses_the_packing_that_its_run_would(tmp_path) -> None:
    """A convolution reads across packed sequences; the plan knows its architecture alone. Mamba has a state."""
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 4}
    kinds = ["full_attention", "full_attention", "conv", "full_attention"]
    attention = {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": kinds}
    hybrid, state = Lfm2Config(**sizes, **attention), MambaConfig(**sizes, state_size=4)
    for name, config in (("Lfm2", hybrid), ("Mamba", state)):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        asked = f"model={tmp_path / name}"
        with pytest.raises(TrainingError, match=rf"{name}ForCausalLM does not keep(.|\n)*pack_length=0"):
            finetune.plan(finetune_config(tmp_path, "run", asked))
        assert finetune.plan(finetune_config(tmp_path, "run", asked, "training.pack_length=0"))["training"] == "full"
    for kind in ("qwen2", "llama", "gemma"):
        check_architecture(describe_llm(str(save_llm(tmp_path / kind, kind))).skeleton)


@pytest.mark.parametrize(
    ("engine", "in_chunks"),
    [
        ([], True),
        (["training.deepspeed=deepspeed-zero2", "lora.rank=4"], True),
        (["training.deepspeed=deepspeed-zero3"], True),
        (["training.deepspeed=deepspeed-zero3", "lora.rank=4"], False),
        (["training.fsdp=full_shard", "training.trainer={fsdp_config: {version: 2}}"], True),
        (["training.fsdp=full_shard", "training.trainer={fsdp_config: {version: 1}}"], False),
    ],
)
def test_a_plan_knows_which_engines_make_whole_logits(tmp_path, engine: list[str], in_chunks: bool) -> None:
    config = finetune_config(tmp_path, "run", "training.tokens_per_step=65536", *engine)
    facts = describe_llm(config.model)
    logits = estimate_memory(config, facts, total=1, trainable=1, rows=263_232, precision="fp32")["logits"]
    assert logits == (384 if in_chunks else 65_536 * 263_232 * 12 // 2**20)


def test_the_control_without_pretraining(tmp_path) -> None:
    """The same training from random weights: repeatable by its seed, elsewhere than the pretrained; not with LoRA."""
    first = finetune.run(finetune_config(tmp_path, "first", "random_weights=true", "seed=5"))
    second = finetune.run(finetune_config(tmp_path, "second", "random_weights=true", "seed=5"))
    pretrained = finetune.run(finetune_config(tmp_path, "pretrained", "seed=5"))
    tables = [load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for folder in (first, second)]
    assert tables[0].equal(tables[1])
    assert not tables[0].equal(load_file(pretrained / "model.safetensors")["model.embed_tokens.weight"])
    with pytest.raises(ConfigError, match="random_weights: adapters"):
        finetune_config(tmp_path, "third", "random_weights=true", "lora.rank=2")
