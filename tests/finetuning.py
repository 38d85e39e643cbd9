"""Configurations of `slm finetune` for the tests: a tiny LLM, a tiny coded corpus, four steps."""

from __future__ import annotations

from pathlib import Path

from slm_tiny import save_llm, write_corpus

from recipes.commands import finetune
from recipes.config import load_config


def finetune_config(tmp_path: Path, name: str, *overrides: str) -> finetune.Config:
    if not (tmp_path / "llm").exists():
        save_llm(tmp_path / "llm")
        write_corpus(tmp_path / "codes")
    settings = ["steps=4", "tokens_per_step=260", "pack_length=64", "save_steps=2", "eval_steps=2", "log_steps=1"]
    own = [f"run_dir={tmp_path / name}", f"model={tmp_path / 'llm'}", f"corpus={tmp_path / 'codes'}"]
    own += ["device=cpu", "precision=fp32", *(f"training.{item}" for item in settings)]
    return load_config(finetune.Config, None, [*own, *overrides])
