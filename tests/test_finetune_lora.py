"""``slm finetune`` with adapters, and of which parts of a model it changes the weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetuning import finetune_config
from safetensors.torch import load_file
from slm_tiny import save_llm, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

from recipes.commands import finetune
from slm.model.modeling import ModelError, describe_llm, load_llm


def test_finetune_recipe_lora(tmp_path) -> None:
    config = finetune_config(tmp_path, "run", "lora.rank=4", "training.keep=best")
    plan = finetune.plan(config)
    folder = finetune.run(config)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"adapter", "base", "model", "complete.json"}
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert plan["trainable parameters"] == sum(tensor.numel() for tensor in saved.values())
    (checkpoint, *_) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*/adapter_model.safetensors")
    assert load_file(checkpoint).keys() == saved.keys()  # not the whole embedding table beside it
    assert folder == tmp_path / "run" / "model" and AutoModelForCausalLM.from_pretrained(folder)
    bare = finetune_config(tmp_path, "bare", "lora.rank=4", "lora.merge=false")
    assert finetune.run(bare).name == "adapter" and not (tmp_path / "bare" / "model").exists()


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_lora_on_a_base_held_in_bf16_trains_and_resumes(tmp_path, kind: str) -> None:
    """What the shipped recipes do: PEFT holds the new rows in fp32 beside it, and the first step could not multiply."""
    own = ["lora.rank=4", "weights=bf16", "precision=bf16", "training.learning_rate=1e-2", "training.warmup_steps=0"]
    config = finetune_config(tmp_path, "run", *own)
    save_llm(Path(config.model), kind)
    finetune.run(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    model, _, _ = load_llm(str(tmp_path / "run" / "adapter"), "bf16")
    assert model.dtype == torch.bfloat16


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


@pytest.mark.parametrize("lora", [[], ["lora.rank=2"]])
def test_of_a_multimodal_model_the_text_model_learns_alone(tmp_path, lora: list[str]) -> None:
    """Adapters in the vision tower, which never runs, would be trained and move nothing."""
    config = finetune_config(tmp_path, "run", *lora, "training.learning_rate=1e-2", "training.warmup_steps=0")
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2)
    text = Gemma3TextConfig(
        **sizes, vocab_size=len(tiny_tokenizer()) + 5, num_hidden_layers=2, num_key_value_heads=1, head_dim=16
    )
    vision = SiglipVisionConfig(**sizes, num_hidden_layers=1, image_size=28, patch_size=14)
    torch.manual_seed(0)
    both = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    shutil.rmtree(config.model)
    Gemma3ForConditionalGeneration(both).save_pretrained(config.model)
    tiny_tokenizer().save_pretrained(config.model)
    plan = finetune.plan(config)
    folder = finetune.run(config)
    before, after = load_llm(config.model)[0], load_llm(str(folder))[0]
    old = dict(before.named_parameters())
    for name, value in after.named_parameters():
        if "vision_tower" in name or "projector" in name:
            assert torch.equal(value, old[name]), name
        elif name.endswith("proj.weight"):
            assert not torch.equal(value, old[name]), name
    if lora:
        saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
        assert saved and not [name for name in saved if "vision" in name or "projector" in name]
        assert plan["trainable parameters"] == sum(value.numel() for value in saved.values())
    else:
        towers = sum(v.numel() for n, v in after.named_parameters() if "vision" in n or "projector" in n)
        assert plan["trainable parameters"] == sum(p.numel() for p in after.parameters()) - towers


def test_the_new_rows_of_an_adapter_have_a_learning_rate_of_their_own(tmp_path) -> None:
    training = ["steps=2", "eval_steps=0", "learning_rate=3e-3", "embedding_learning_rate=0.0", "weight_decay=0.0"]
    finetune.run(finetune_config(tmp_path, "run", "lora.rank=2", *(f"training.{item}" for item in training)))
    base, adapted = (load_llm(str(tmp_path / "run" / name))[0] for name in ("base", "model"))
    assert torch.equal(base.get_input_embeddings().weight, adapted.get_input_embeddings().weight)
    assert not torch.equal(base.model.layers[0].mlp.up_proj.weight, adapted.model.layers[0].mlp.up_proj.weight)
