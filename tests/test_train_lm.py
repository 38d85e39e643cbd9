"""``slm train-lm``: a small text LM from the texts of a manifest, as `slm finetune` begins from it."""

from __future__ import annotations

import json

from slm_tiny import utterances, write_corpus
from transformers import (
    AutoModelForCausalLM,
)

from recipes.commands import finetune, train_lm
from recipes.config import load_config


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
