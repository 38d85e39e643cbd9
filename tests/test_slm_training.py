"""Training: accumulation, resume, torn checkpoints, task weights, evaluation, what its settings mean."""

from __future__ import annotations

import contextlib
import math
import shutil
import types
from collections.abc import Container
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from slm_tiny import tiny_model
from test_sequences import speech_samples
from torch.nn import functional as F
from transformers import Lfm2Config, Lfm2ForCausalLM, TrainerCallback

from recipes.config import ConfigError
from recipes.runs.machine import training_device
from slm.training import config as training_config
from slm.training.batches import ONE_ROW, PackedBatches
from slm.training.checkpoints import CheckpointError, newest_checkpoint
from slm.training.config import TrainingConfig, TrainingError
from slm.training.finite_steps import FiniteSteps
from slm.training.packing import packing_leaks
from slm.training.samples import NoiseConfig
from slm.training.train import _EngineCheck, train

OPTIONS = {"tokens_per_step": 260, "pack_length": 64, "learning_rate": 3e-3, "warmup_steps": 2, "log_steps": 1}


class KillAt(TrainerCallback):
    """Ends the process's training as a kill would: in the middle of a step, without a last checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Poison(TrainerCallback):
    """Makes a gradient NaN in some steps, as a bad batch or an overflow does."""

    def __init__(self, steps: Container[int]) -> None:
        self.steps = steps

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step + 1 in self.steps:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            self.hook = parameter.register_hook(lambda gradient: gradient * torch.nan)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if state.global_step + 1 in self.steps:
            self.hook.remove()


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


def test_further_training_arguments_pass_through(tmp_path) -> None:
    trainer = fit(tmp_path, steps=1, optim="adafactor", trainer={"torch_empty_cache_steps": 7})
    assert trainer.args.torch_empty_cache_steps == 7
    assert type(trainer.optimizer.optimizer).__name__ == "Adafactor"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("learning_rate", "is set here by training.learning_rate"),
        ("label_smoothing_factor", "has no effect here: the loss is that of answers"),
        ("batch_size_of_dreams", "has no TrainingArgument"),
    ],
)
def test_a_training_argument_that_would_not_be_what_it_says_is_refused(name, reason) -> None:
    with pytest.raises(TrainingError, match=f"(?s){name}.*{reason}|{reason}.*{name}"):
        TrainingConfig(trainer={name: 0.1})


def test_every_training_argument_that_is_set_here_is_refused_by_name(tmp_path) -> None:
    """A further one of the same name would override a key of the configuration without a word."""
    given, config = {}, TrainingConfig(gradient_checkpointing=True)

    def arguments(**kwargs):
        given.update(kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_config, "TrainingArguments", arguments)
        settings = dict(evaluates=True, seed=0, device="cpu", precision="fp32", processes=1)
        training_config.training_arguments(config, tmp_path, **settings)
    free = {"logging_first_step", "dataloader_num_workers", "dataloader_pin_memory", "report_to"}
    for name in given.keys() - free:
        with pytest.raises(TrainingError, match=name):
            TrainingConfig(trainer={name: None})


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_the_tables_have_a_learning_rate_of_their_own(tmp_path, kind) -> None:
    """At rate 0 the tables stay, tied or not, and everything else moves; killed and resumed as unbroken."""
    samples = speech_samples()
    options = OPTIONS | {"eval_steps": 0, "steps": 4, "save_steps": 2, "weight_decay": 0.0}

    def trained(folder, rate, callbacks=()):
        config = TrainingConfig(**options, embedding_learning_rate=rate)
        return train(
            tiny_model(kind, samples.vocabulary.size), samples, None, config, folder, seed=7, callbacks=callbacks
        )

    before = dict(tiny_model(kind, samples.vocabulary.size).named_parameters())
    for name, after in trained(tmp_path / "0", 0.0).model.named_parameters():
        assert torch.equal(before[name], after) == ("embed_tokens" in name or "lm_head" in name), name
    same, own = trained(tmp_path / "same", OPTIONS["learning_rate"]), trained(tmp_path / "none", None)
    assert same_weights(same, own)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", 1e-2, [KillAt(3)])
    assert same_weights(trained(tmp_path / "killed", 1e-2), trained(tmp_path / "whole", 1e-2))


def test_one_row_without_padding_trains_as_rows_do(tmp_path) -> None:
    """What FlashAttention-2 needs: a micro-batch as one row. The same steps and losses as in rows of a length."""
    samples = speech_samples()
    packed, flat = (
        PackedBatches(samples, steps=3, tokens_per_step=260, micro_batches=2, pack_length=length, seed=1)
        for length in (64, ONE_ROW)
    )
    model = tiny_model("qwen2", samples.vocabulary.size)
    for a, b in zip(packed, flat, strict=True):
        assert b["input_ids"].shape == (1, int((a["labels"] != -100).sum() + _prompt_tokens(a)))
        assert sum_of_losses(model, a) == pytest.approx(sum_of_losses(model, b), rel=1e-5)
    assert not packing_leaks(model, samples.example(0, None).input_ids, samples.example(1, None).input_ids, rows=1)


def _prompt_tokens(batch) -> int:
    """Tokens without a loss that are no padding: ids of the padding are 0 and lie behind a sequence's last label."""
    return int(((batch["labels"] == -100) & (batch["input_ids"] != 0)).sum())


def sum_of_losses(model, batch) -> float:
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    return float((each * batch["loss_weights"][:, 1:].flatten()).sum())


def test_a_training_on_a_gpu_by_number_is_refused(monkeypatch) -> None:
    """transformers' Trainer takes the first GPU that it sees, whatever number was asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training_device("cuda:0") == "cuda:0" and training_device("cuda") == "cuda"
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=1 and device=cuda"):
        training_device("cuda:1")


@pytest.mark.parametrize(("wrapper", "deepspeed"), [("DeepSpeedEngine", True), ("DistributedDataParallel", False)])
def test_an_engine_of_accelerate_launch_is_the_one_asked_for(wrapper: str, deepspeed: bool) -> None:
    """`accelerate launch` may name an engine in a file of its own, which the configuration does not know of."""
    model = type(wrapper, (), {})()
    trainer = types.SimpleNamespace(model_wrapped=model, is_deepspeed_enabled=deepspeed, is_fsdp_enabled=False)
    arguments = types.SimpleNamespace(world_size=2)
    _EngineCheck(trainer, TrainingConfig()).on_train_begin(arguments, None, None)
    trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = deepspeed, not deepspeed
    with pytest.raises(TrainingError, match=f"asked for .* but the model is wrapped as {wrapper}"):
        _EngineCheck(trainer, TrainingConfig()).on_train_begin(arguments, None, None)


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


def test_a_training_whose_checkpoints_are_gone_does_not_begin_at_step_0(tmp_path) -> None:
    fit(tmp_path, steps=4)
    for path in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="had saved step 4, and no whole checkpoint is left.*--restart"):
        fit(tmp_path)


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


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_that_is_not_finite_is_left_out_and_told(tmp_path, caplog, accumulation: int) -> None:
    """It had made NaN of all weights, under losses that looked well."""
    weights: dict[int, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            weights[state.global_step] = torch.cat([p.detach().flatten() for p in model.parameters()])

    fit(tmp_path, [Poison({3, 5}), Keep()], gradient_accumulation=accumulation)
    assert all(torch.isfinite(values).all() for values in weights.values())
    unmoved = {step for step in range(2, 7) if torch.equal(weights[step], weights[step - 1])}
    assert unmoved == {3, 5}
    said = [record.message for record in caplog.records if "not finite" in record.message]
    assert len(said) == 2 and said[0].startswith("step 3: ") and said[1].startswith("2 of 6 steps were left out")


def test_steps_that_are_never_finite_stop_the_training(tmp_path) -> None:
    """The newest checkpoint holds the weights from before, and a start without the fault goes on from there."""
    with pytest.raises(FloatingPointError, match=r"5 steps in a row, to step 7, .*not finite.*learning_rate"):
        fit(tmp_path, [Poison(range(3, 99))], steps=8)
    assert newest_checkpoint(tmp_path).name == "checkpoint-6"
    resumed = fit(tmp_path, steps=8)
    assert resumed.state.global_step == 8
    assert all(torch.isfinite(p).all() for p in resumed.model.parameters())


def test_fp16_s_loss_scale_has_time_to_find_its_place_and_no_more() -> None:
    model = torch.nn.Linear(1, 1)
    watch = FiniteSteps(types.SimpleNamespace(is_deepspeed_enabled=False, is_fsdp_enabled=False))
    arguments = types.SimpleNamespace(fp16=True, bf16=False, output_dir="run/checkpoints")
    state = types.SimpleNamespace(global_step=0, is_world_process_zero=True, max_steps=99)
    model.bias.grad = torch.tensor([1.0])
    for finite in (False, True):
        model.weight.grad = torch.tensor([[1.0 if finite else torch.inf]])
        for _ in range(29):
            watch.on_pre_optimizer_step(arguments, state, None, model=model)
        assert model.weight.grad is not None  # the scale itself leaves the step out
    model.weight.grad = torch.tensor([[torch.nan]])
    with pytest.raises(FloatingPointError, match="30 steps in a row"):
        for _ in range(30):
            watch.on_pre_optimizer_step(arguments, state, None, model=model)


@pytest.mark.parametrize(
    ("fp16", "norm", "stops"), [(False, math.nan, True), (True, math.inf, False), (False, 1.0, False)]
)
def test_an_engine_that_has_taken_such_a_step_is_stopped_at_its_log(fp16: bool, norm: float, stops: bool) -> None:
    """Gradients that are sharded are not to be had; those of fp16 overflow until its scale is found."""
    version_1 = types.SimpleNamespace(is_fsdp2=False)
    trainer = types.SimpleNamespace(is_deepspeed_enabled=False, is_fsdp_enabled=True, accelerator=version_1)
    arguments = types.SimpleNamespace(fp16=fp16, bf16=True, output_dir="run/checkpoints")
    state = types.SimpleNamespace(global_step=20)
    watch = FiniteSteps(trainer)
    watch.on_log(arguments, state, None, {"eval_loss": 1.0})
    with pytest.raises(FloatingPointError, match="step 20 is not finite") if stops else contextlib.nullcontext():
        watch.on_log(arguments, state, None, {"loss": 1.0, "grad_norm": norm})


@pytest.mark.parametrize(("skipped", "fp16", "steps"), [(False, False, 1), (True, False, 5), (False, True, 30)])
def test_deepspeed_s_step_is_looked_at_each_time(skipped: bool, fp16: bool, steps: int) -> None:
    """Not only where it is logged: a step that it took stops the training, those that it left out are counted."""
    norms = [None, 1.0, *[math.nan] * (steps - 1), 1.0, *[-1.0] * (steps - 1)]
    told = iter([*norms, math.nan])
    accelerator = types.SimpleNamespace(clip_grad_norm_=lambda *_: next(told), optimizer_step_was_skipped=skipped)
    trainer = types.SimpleNamespace(is_deepspeed_enabled=True, is_fsdp_enabled=False, accelerator=accelerator)
    arguments = types.SimpleNamespace(fp16=fp16, bf16=False, output_dir="run/checkpoints")
    state = types.SimpleNamespace(global_step=2, is_world_process_zero=True, max_steps=99)
    watch = FiniteSteps(trainer)
    for _ in norms:
        watch.on_pre_optimizer_step(arguments, state, None, model=None)
    with pytest.raises(FloatingPointError, match="not finite.*run/checkpoints are from before"):
        watch.on_pre_optimizer_step(arguments, state, None, model=None)


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
