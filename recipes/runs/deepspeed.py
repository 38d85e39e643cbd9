"""The DeepSpeed configuration that a fine-tuning names."""

from __future__ import annotations

import os
from pathlib import Path

from recipes.config import CONFIGS, ConfigError
from slm.training.config import TrainingConfig


def engine_config(training: TrainingConfig) -> str | None:
    """The path of the DeepSpeed configuration, a file or a shipped name.

    Raises:
        ConfigError: no such file, or an engine without a launcher.
    """
    if (training.deepspeed or training.fsdp) and "RANK" not in os.environ:
        raise ConfigError(
            "training.deepspeed and training.fsdp need a launcher: torchrun --nproc_per_node 2 -m recipes.cli "
            "finetune ..."
        )
    if not training.deepspeed:
        return None
    for path in (Path(training.deepspeed), CONFIGS / training.deepspeed, CONFIGS / f"{training.deepspeed}.json"):
        if path.is_file():
            return str(path)
    shipped = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))
    raise ConfigError(f"training.deepspeed: no file {training.deepspeed}; give a JSON or a shipped name ({shipped})")
