"""Multi-token heads through the commands: from fine-tuning to predictions and an export, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from slm_tiny import save_llm, write_corpus
from test_delay import StandIn

from recipes.commands import export, finetune, synthesize, train_lm, train_preference
from recipes.config import ConfigError, load_config
from recipes.inference import setup
from slm.model.modeling import load_llm
from slm.model.multi_token import (
    FILE_NAME,
    MultiTokenError,
    MultiTokenSettings,
    multi_token_heads_of,
    predicted_tokens,
)
from slm.training.config import TrainingConfig, TrainingError
from slm.training.objectives import check_objective


@pytest.mark.parametrize("lora", [[], ["lora.rank=2"]], ids=["full", "lora"])
def test_from_finetune_to_predictions_and_an_export(tmp_path, monkeypatch, lora: list[str]) -> None:
    monkeypatch.setattr(setup, "load_tokenizer", lambda name, device=None: StandIn())
    save_llm(tmp_path / "llm")
    corpus = write_corpus(tmp_path / "codes")
    short = ["steps=4", "tokens_per_step=260", "pack_length=64", "save_steps=2", "eval_steps=2", "log_steps=1"]
    own = [f"corpus={corpus}", "device=cpu", "precision=fp32", *lora, *(f"training.{item}" for item in short)]

    def config(name: str, *overrides: str) -> finetune.Config:
        model = [] if any("model=" in item for item in overrides) else [f"model={tmp_path / 'llm'}"]
        return load_config(finetune.Config, None, [f"run_dir={tmp_path / name}", *model, *own, *overrides])

    asked = config("run", "training.multi_token.tokens=3", "training.multi_token.loss_weight=0.5")
    plan = finetune.plan(asked)
    folder = finetune.run(asked)
    model, _, _ = load_llm(str(folder))
    if not lora:
        assert plan["trainable parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert plan["trainable parameters"] - finetune.plan(config("x"))["trainable parameters"] == 2 * 32 * 32
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in rows if "eval_loss" in row]
    assert told and all({"eval_tts_token_2_loss", "eval_tts_token_3_loss"} <= row.keys() for row in told)
    assert not any("eval_asr_token" in key for row in told for key in row)
    # A run that was cut off at its end goes on to the same weights.
    content = (folder / FILE_NAME).read_bytes()
    (tmp_path / "run" / "complete.json").unlink()
    shutil.rmtree(folder)
    assert (finetune.run(asked) / FILE_NAME).read_bytes() == content
    if lora:  # the adapter's folder holds all that is needed beside the base
        adapter = tmp_path / "run" / "adapter"
        other, _, _ = load_llm(str(adapter))
        assert predicted_tokens(adapter) == 3
        for a, b in zip(
            multi_token_heads_of(other).parameters(), multi_token_heads_of(model).parameters(), strict=True
        ):
            assert torch.equal(a, b) and a.any()
        return
    # What has heads goes on with them, and without where they are not trained; never with another number.
    again = finetune.run(config("again", f"model={folder}", "training.steps=1", "training.multi_token.tokens=3"))
    assert predicted_tokens(again) == 3
    assert predicted_tokens(finetune.run(config("plain", f"model={folder}", "training.steps=1"))) == 1
    with pytest.raises(MultiTokenError, match="tokens: 4, and the model has heads for 3"):
        finetune.run(config("other", f"model={folder}", "training.multi_token.tokens=4"))
    exported = export.run(export.Config(source=str(tmp_path / "run"), output=str(tmp_path / "out")))
    assert "| of these: multi-token heads |" in (exported / "README.md").read_text()
    limits = ["decoding.min_seconds=1", "decoding.seconds_per_character=0"]
    asked = [f"model={exported}", f"corpus={corpus}", "device=cpu", *limits]
    found = {}
    for n in (1, 3):
        run = tmp_path / f"tts-{n}"
        said = synthesize.run(
            load_config(synthesize.Config, None, [*asked, f"decoding.multi_token={n}", f"run_dir={run}"])
        )
        rows = [json.loads(line) for line in said.read_text().splitlines()]
        found[n] = [(row["n_codes"], row["finish_reason"], (run / row["audio"]).read_bytes()) for row in rows]
        sidecar = json.loads((run / "predictions.json").read_text())
        assert ("tokens_per_pass" in sidecar) == (n > 1)
    assert found[1] == found[3]
    assert 0.5 < sidecar["tokens_per_pass"] <= 3
    with pytest.raises(ConfigError, match="multi_token: 4, and .* predicts 3 a pass; set it to 3"):
        synthesize.plan(load_config(synthesize.Config, None, [*asked, "decoding.multi_token=4", f"run_dir={run}-4"]))


@pytest.mark.parametrize(
    ("options", "pattern", "message"),
    [
        ({"fsdp": "full_shard"}, "semantic", "training.fsdp"),
        ({"deepspeed": "deepspeed-zero2"}, "semantic", "training.deepspeed"),
        ({}, "delay", "pattern=delay"),
    ],
)
def test_what_training_cannot_do_is_refused(options: dict, pattern: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        check_objective(TrainingConfig(**options, multi_token=MultiTokenSettings()), pattern, True)


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        (finetune, ["training.multi_token.tokens=1"], "tokens: 1 must be at least 2"),
        (finetune, ["training.multi_token.loss_weight=0"], "loss_weight: 0 must be above 0"),
        (train_lm, ["training.multi_token.tokens=2"], "a text LM has not"),
        (train_preference, ["training.multi_token.tokens=2"], "it is for slm finetune"),
        (train_preference, ["decoding.multi_token=2"], "leave them at 1"),
        (synthesize, ["text=a", "decoding.multi_token=2", "decoding.guidance=2"], "not with guidance"),
        (synthesize, ["text=a", "decoding.multi_token=0"], "multi_token 0 must be"),
        (synthesize, ["text=a", "decoding.multi_token_verify=false"], "nothing is proposed"),
        (synthesize, ["text=a", "decoding.multi_token=2", "stream=true"], "stream: gives a token a pass"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(command, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(command.Config, None, ["run_dir=x", *overrides])
