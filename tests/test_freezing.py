"""Layers that stay the text LM's: what must not move does not, to the bit, and what must does."""

from __future__ import annotations

import shutil

import pytest
import torch
from finetuning import finetune_config
from safetensors.torch import load_file
from slm_tiny import tiny_model
from test_slm_training import KillAt

from recipes.commands import finetune, train_lm
from recipes.config import ConfigError, load_config
from slm.model.freezing import freeze_lower_layers, keep_text_rows
from slm.model.modeling import ModelError, has_tied_head, load_llm
from slm.vocabulary import SpeechVocabulary

FROZEN = ("training.freeze_layers=1", "training.weight_decay=0.5")


@pytest.mark.parametrize("more", [(), ("training.embedding_learning_rate=0.01",)], ids=["one rate", "two rates"])
def test_only_the_upper_layers_and_the_new_rows_move(tmp_path, more) -> None:
    """Weight decay and the tables' own learning rate too: both reach rows that have no gradient."""
    config = finetune_config(tmp_path, "run", *FROZEN, *more)
    model, _, vocabulary = finetune.build_model(
        config, finetune.RunFolder(config.run_dir), finetune.open_corpora(config)
    )
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    after = load_file(finetune.run(config) / "model.safetensors")
    text = vocabulary.first_id
    for name, weight in after.items():
        same = torch.equal(weight, before[name])
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(weight[:text], before[name][:text]) and not same, name
        elif ".layers.0." in name:
            assert same, name
        elif ".layers.1." in name and weight.ndim > 1:
            assert not same, name


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma"])
def test_architectures_and_untied_heads(kind) -> None:
    model = tiny_model(kind, 64)
    vocabulary = SpeechVocabulary(codebook_sizes=(8,), first_id=40, end_id=2)
    freeze_lower_layers(model, 1)
    tables = keep_text_rows(model, vocabulary)
    assert len(tables) == 2 - has_tied_head(model)
    model(input_ids=torch.arange(30, 60)[None], labels=torch.arange(30, 60)[None]).loss.backward()
    for table in tables:
        assert not table.grad[:40].any() and table.grad[40:].any()
    with pytest.raises(ModelError, match="leave none to learn speech; give at most 1"):
        freeze_lower_layers(model, 2)


def test_resumed_is_uninterrupted(tmp_path, monkeypatch) -> None:
    whole = load_file(finetune.run(finetune_config(tmp_path, "whole", *FROZEN)) / "model.safetensors")
    config = finetune_config(tmp_path, "cut", *FROZEN)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "TrainerProgress", lambda name: KillAt(3))
        finetune.run(config)
    assert list(finetune.RunFolder(config.run_dir).checkpoints.glob("checkpoint-*"))
    again = load_file(finetune.run(config) / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())


def test_what_it_does_not_go_with(tmp_path) -> None:
    with pytest.raises(ConfigError, match="freeze_layers: adapters leave"):
        finetune_config(tmp_path, "lora", *FROZEN, "lora.rank=2")
    with pytest.raises(ConfigError, match="freeze_layers: not with an engine"):
        finetune_config(tmp_path, "engine", *FROZEN, "training.deepspeed=deepspeed-zero2")
    with pytest.raises(ConfigError, match="freeze_layers: a new text LM has nothing"):
        load_config(train_lm.Config, None, ["training.freeze_layers=1"])
    config = finetune_config(tmp_path, "deep", "training.freeze_layers=9")
    with pytest.raises(ModelError, match="freeze_layers: 9 of the model's 2 layers"):
        finetune.plan(config)
    plans = [finetune.plan(finetune_config(tmp_path, str(n), f"training.freeze_layers={n}")) for n in (0, 1)]
    model, _, _ = load_llm(str(tmp_path / "llm"))
    layer = sum(p.numel() for name, p in model.named_parameters() if ".layers.0." in name)
    rows = sum(p[: len(_text(tmp_path))].numel() for name, p in model.named_parameters() if "embed_tokens" in name)
    assert plans[0]["trainable parameters"] - plans[1]["trainable parameters"] == layer + rows
    shutil.rmtree(tmp_path / "llm")


def _text(tmp_path) -> range:
    """The ids of text of the tiny LLM."""
    config = finetune_config(tmp_path, "text")
    model, _, vocabulary = finetune.build_model(
        config, finetune.RunFolder(config.run_dir), finetune.open_corpora(config)
    )
    return range(vocabulary.first_id)
