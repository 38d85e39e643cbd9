"""Training: accumulation, resume, torn checkpoints, task weights, evaluation, and the recipes train-lm and finetune."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from slm_tiny import CODES, save_llm, tiny_model, utterances, write_corpus
from test_sequences import speech_samples
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from recipes.commands import finetune, train_lm
from recipes.config import ConfigError, load_config
from slm.loops import longest_loop
from slm.modeling import ModelError, describe_llm, load_llm
from slm.trained_on import TrainedOn
from slm.training.batches import NoiseConfig
from slm.training.checkpoints import newest_checkpoint
from slm.training.packing import packing_leaks
from slm.training.trainer import TrainingConfig, TrainingError, train
from tokenizer import load_tokenizer

OPTIONS = {"tokens_per_step": 260, "pack_length": 64, "learning_rate": 3e-3, "warmup_steps": 2, "log_steps": 1}


class KillAt(TrainerCallback):
    """Ends the process's training as a kill would: in the middle of a step, without a last checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def fit(folder: Path, callbacks=(), weights=None, valid=False, **options):
    samples = speech_samples(NoiseConfig(0.1, 0.1), weights)
    model = tiny_model("qwen2", samples.vocabulary.size)
    model.config.attention_dropout = 0.0
    config = TrainingConfig(**(OPTIONS | {"steps": 6, "eval_steps": 0, "save_steps": 2} | options))
    return train(model, samples, samples if valid else None, config, folder, seed=7, callbacks=callbacks)


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def same_weights(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_accumulation_changes_nothing_but_rounding(tmp_path) -> None:
    one = fit(tmp_path / "1", gradient_accumulation=1, weights={"asr": 3.0, "tts": 1.0})
    many = fit(tmp_path / "4", gradient_accumulation=4, weights={"asr": 3.0, "tts": 1.0})
    assert len(losses(one)) == 6 and losses(one)[0] > losses(one)[-1]
    assert losses(one) == pytest.approx(losses(many), abs=1e-5)
    for a, b in zip(one.model.parameters(), many.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_the_loss_is_the_weighted_mean_over_the_step(tmp_path) -> None:
    weights = {"asr": 3.0, "tts": 1.0}
    trainer = fit(tmp_path, steps=1, gradient_accumulation=2, weights=weights)
    samples = trainer.train_dataset.samples
    model = tiny_model("qwen2", samples.vocabulary.size)
    total = norm = 0.0
    for micro in range(2):
        batch = trainer.train_dataset[micro]
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
        total += float((each * batch["loss_weights"][:, 1:].flatten()).sum())
        norm += float(batch["loss_weights"].sum())
    assert losses(trainer)[0] == pytest.approx(total / norm, abs=1e-5)


@pytest.mark.parametrize(("pack_length", "attention"), [(64, "eager"), (0, "sdpa")])
def test_short_rows_take_the_attention_that_a_cpu_is_fast_at(tmp_path, pack_length, attention) -> None:
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
            seen.append(model.config._attn_implementation)

    trainer = fit(tmp_path, steps=1, pack_length=pack_length, callbacks=[Look()])
    assert seen == [attention]
    assert trainer.model.config._attn_implementation == "sdpa"


def test_killed_and_resumed_is_bit_for_bit_the_same(tmp_path) -> None:
    whole = fit(tmp_path / "whole", gradient_accumulation=2)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", gradient_accumulation=2, callbacks=[KillAt(5)])
    assert newest_checkpoint(tmp_path / "killed").name == "checkpoint-4"
    resumed = fit(tmp_path / "killed", gradient_accumulation=2)
    assert same_weights(whole, resumed)
    assert losses(whole)[4:] == losses(resumed)[-2:]


def test_a_run_goes_on_with_less_memory(tmp_path) -> None:
    """One that ran out of it: more accumulation and checkpointing change nothing but rounding, from any step on."""
    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", callbacks=[KillAt(5)])
    resumed = fit(tmp_path / "killed", gradient_accumulation=4, gradient_checkpointing=True, attention="sdpa")
    assert losses(whole)[4:] == pytest.approx(losses(resumed)[-2:], abs=1e-4)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("damage", ["truncated", "missing", "unmarked"])
def test_a_torn_checkpoint_is_set_aside(tmp_path, damage: str) -> None:
    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "torn", callbacks=[KillAt(5)])
    last = tmp_path / "torn" / "checkpoint-4"
    if damage == "truncated":
        (last / "model.safetensors").write_bytes((last / "model.safetensors").read_bytes()[:-100])
    else:
        (last / {"missing": "optimizer.pt", "unmarked": "checkpoint_files.json"}[damage]).unlink()
    resumed = fit(tmp_path / "torn")
    assert (tmp_path / "torn" / "torn-checkpoint-4").is_dir()
    assert same_weights(whole, resumed)


def test_two_torn_checkpoints_leave_none(tmp_path) -> None:
    for name in ("checkpoint-2", "checkpoint-4", "torn-checkpoint-4"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "torn-checkpoint-2",
        "torn-checkpoint-4",
        "torn-checkpoint-4-1",
    ]


def test_evaluation_and_best_weights(tmp_path) -> None:
    # A rate that blows the loss up after a while: the best checkpoint is not the last one.
    options = {"eval_steps": 2, "save_steps": 2, "valid": True, "learning_rate": 0.3, "schedule": "constant"}
    trainer = fit(tmp_path, keep="best", **options)
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    best = min(rows, key=lambda row: row["eval_loss"])
    assert best["step"] != 6
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], abs=1e-6)
    # The mean over tokens, whatever the batches: one sequence at a time gives the same.
    samples, sums = trainer.train_dataset.samples, {0: [0.0, 0], 1: [0.0, 0]}
    for index in range(len(samples.lengths)):
        example = samples.example(index, None)
        ids, labels = torch.from_numpy(example.input_ids)[None], torch.from_numpy(example.labels)[None]
        with torch.no_grad():
            logits = trainer.model.eval()(input_ids=ids).logits
        loss = F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
        entry = sums[int(samples.tasks[index])]
        entry[0], entry[1] = entry[0] + float(loss), entry[1] + int((labels != -100).sum())
    assert best["eval_asr_loss"] == pytest.approx(sums[0][0] / sums[0][1], rel=1e-4)
    assert best["eval_tts_loss"] == pytest.approx(sums[1][0] / sums[1][1], rel=1e-4)


def test_bad_settings_are_told(tmp_path) -> None:
    for options in (
        {"steps": 0},
        {"pack_length": -1},
        {"keep_checkpoints": 1},
        {"keep": "best", "save_steps": 3, "eval_steps": 2},
        {"deepspeed": "a", "fsdp": "b"},
    ):
        with pytest.raises(TrainingError, match=f"training.{next(iter(options))}"):
            TrainingConfig(**options)
    with pytest.raises(TrainingError, match="valid split"):
        fit(tmp_path, keep="best", eval_steps=2)
    samples = speech_samples()
    model = tiny_model("qwen2", samples.vocabulary.size)
    with pytest.raises(TrainingError, match="torchrun --nproc_per_node 2"):
        train(model, samples, None, TrainingConfig(steps=1), tmp_path, processes=2)


def test_a_model_that_reads_across_packed_sequences_is_refused(tmp_path) -> None:
    samples = speech_samples()
    sizes = {"vocab_size": samples.vocabulary.size, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}
    torch.manual_seed(0)
    # Weights as large as trained ones: with those of a new model hardly anything gets through a convolution.
    hybrid = Lfm2ForCausalLM(Lfm2Config(**sizes, initializer_range=0.3))
    state = torch.get_rng_state()
    config = TrainingConfig(**(OPTIONS | {"steps": 1, "eval_steps": 0}))
    with pytest.raises(TrainingError, match=r"Lfm2ForCausalLM does not keep(.|\n)*pack_length=0"):
        train(hybrid, samples, None, config, tmp_path / "packed")
    # One sequence a row is the way out that the message names.
    train(hybrid, samples, None, replace(config, pack_length=0), tmp_path / "alone")
    first, second = samples.example(0, None).input_ids, samples.example(1, None).input_ids
    for kind in ("qwen2", "llama", "gemma"):
        model = tiny_model(kind, samples.vocabulary.size).train()
        model.lm_head.eval()
        torch.set_rng_state(state)
        assert not packing_leaks(model, first, second)
        assert not packing_leaks(model.to(torch.bfloat16), first, second)
        assert model.training and not model.lm_head.training and torch.equal(torch.get_rng_state(), state)


def finetune_config(tmp_path: Path, name: str, *overrides: str) -> finetune.Config:
    if not (tmp_path / "llm").exists():
        save_llm(tmp_path / "llm")
        write_corpus(tmp_path / "codes")
    settings = ["steps=4", "tokens_per_step=260", "pack_length=64", "save_steps=2", "eval_steps=2", "log_steps=1"]
    own = [f"run_dir={tmp_path / name}", f"model={tmp_path / 'llm'}", f"corpus={tmp_path / 'codes'}"]
    own += ["device=cpu", "precision=fp32", *(f"training.{item}" for item in settings)]
    return load_config(finetune.Config, None, [*own, *overrides])


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
    assert told["trained_on"]["bare_prompts"] == 0.0
    assert told["trained_on"]["longest_loop_s"] == max(loops) and told["trained_on"]["longest_text_loop"] == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert all({"eval_asr_loss", "eval_tts_loss"} <= row.keys() for row in rows if "eval_loss" in row)
    assert any((tmp_path / "run" / "tensorboard").iterdir())
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


def test_finetune_draws_no_bar_where_the_output_is_no_terminal(tmp_path, capfd) -> None:
    disable_progress_bar()  # the library's own, of loading and saving: the command does so before it calls the recipe
    finetune.run(finetune_config(tmp_path, "run", "training.eval_steps=0"))
    said = capfd.readouterr()
    assert "finetune:" not in said.err and "\r" not in said.err + said.out


def test_speech_rows_come_from_the_books_that_the_corpus_was_encoded_with(tmp_path) -> None:
    config = finetune_config(tmp_path, "run", "speech_rows=codebook")
    book = load_tokenizer("embedded-12.5hz")
    facts = types.SimpleNamespace(tokenizer="embedded-12.5hz", precision="fp32", fingerprint=book.fingerprint())
    corpus = types.SimpleNamespace(metadata=facts)
    (entries,) = finetune.codebooks(config, corpus)
    codes = torch.tensor([[[5, 900, 5]]])
    torch.testing.assert_close(entries[codes[0, 0]], book.quantizer.look_up(codes, None)[0])
    assert finetune.codebooks(finetune_config(tmp_path, "other"), corpus) is None
    facts.fingerprint = "another"
    with pytest.raises(ConfigError, match="speech_rows: embedded-12.5hz is not what .* was encoded with"):
        finetune.codebooks(config, corpus)
    facts.tokenizer = "dmel-25hz"
    with pytest.raises(ConfigError, match="speech_rows: dmel-25hz is no LM-SPT tokenizer"):
        finetune.codebooks(config, corpus)


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


def test_finetune_recipe_lora(tmp_path) -> None:
    config = finetune_config(tmp_path, "run", "lora.rank=4", "keep=best".replace("keep", "training.keep"))
    plan = finetune.plan(config)
    folder = finetune.run(config)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"adapter", "base", "model", "complete.json"}
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert plan["trainable parameters"] == sum(tensor.numel() for tensor in saved.values())
    assert folder == tmp_path / "run" / "model" and AutoModelForCausalLM.from_pretrained(folder)
    bare = finetune_config(tmp_path, "bare", "lora.rank=4", "lora.merge=false")
    assert finetune.run(bare).name == "adapter" and not (tmp_path / "bare" / "model").exists()


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_an_adapters_folder_is_all_that_is_needed_beside_the_base(tmp_path, kind: str) -> None:
    """In another process, without the run's own grown base: the merged model's logits, and commands that take it."""
    config = finetune_config(tmp_path, "run", "lora.rank=4")
    save_llm(Path(config.model), kind)
    merged = finetune.run(config)
    shutil.rmtree(tmp_path / "run" / "base")
    adapter = shutil.move(tmp_path / "run" / "adapter", tmp_path / "elsewhere")
    ids = torch.arange(3, 23)[None]
    wanted = load_llm(str(merged))[0](input_ids=ids).logits
    script = (
        "import sys, torch; from slm.generation import SpeechLM\n"
        "lm = SpeechLM.load(sys.argv[1])\n"
        "torch.save(lm.model(input_ids=torch.arange(3, 23)[None]).logits, sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(adapter), str(tmp_path / "logits.pt")], check=True)
    facts, (model, _, vocabulary) = describe_llm(str(adapter)), load_llm(str(adapter))
    own = slice(vocabulary.size)  # rows behind it only pad the table
    got = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(got[..., own], wanted[..., own].detach(), atol=1e-5, rtol=1e-5)
    assert facts.vocabulary == vocabulary is not None
    assert facts.n_parameters == sum(p.numel() for p in model.parameters())
    assert model.generation_config.to_diff_dict() == load_llm(str(merged))[0].generation_config.to_diff_dict()
    shutil.rmtree(config.model)
    with pytest.raises(ModelError, match="its base cannot be had"):
        load_llm(str(adapter))


def test_a_plan_names_all_that_is_missing(tmp_path, monkeypatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("slm.modeling.HfApi.model_info", unreachable)
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


def test_train_lm_recipe(tmp_path) -> None:
    lines = []
    for split, rows in (("train", utterances(12)), ("valid", utterances(3))):
        for row in rows:
            lines.append({"id": f"{split}{row['id']}", "audio": "none.wav", "text": row["text"] + "!", "split": split})
            lines[-1] |= {"speaker": "s", "duration": 1.0}
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = ["hidden_size=32", "layers=1", "heads=2", "key_value_heads=2", "intermediate_size=48", "vocab_size=280"]
    settings = ["steps=30", "tokens_per_step=100", "eval_steps=15", "save_steps=15", "learning_rate=0.01"]
    overrides = [f"run_dir={tmp_path / 'lm'}", f"data=[{{path: {tmp_path / 'manifest.jsonl'}}}]", "device=cpu"]
    overrides += ["precision=fp32", *(f"lm.{item}" for item in sizes), *(f"training.{item}" for item in settings)]
    config = load_config(train_lm.Config, None, overrides)
    plan = train_lm.plan(config)
    assert plan["sentences (train, valid)"] == [4, 3]
    folder = train_lm.run(config)
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()) == plan["parameters"]
    rows = [json.loads(line) for line in (tmp_path / "lm" / "metrics.jsonl").read_text().splitlines()]
    valid = [row["eval_text_loss"] for row in rows if "eval_text_loss" in row]
    assert valid[-1] < valid[0] < 6
    assert train_lm.run(config) == folder
    next_stage = load_config(finetune.Config, None, [f"model={folder}", f"corpus={write_corpus(tmp_path / 'codes')}"])
    assert finetune.plan(next_stage)["chat template"] is False
