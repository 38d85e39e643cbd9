"""Where the discriminators lie that a tokenizer was trained against: in an export, or in its run's last checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from recipes.config import ConfigError
from recipes.runs.embedded import model_path
from recipes.runs.lineage import run_of

DISCRIMINATORS, DISCRIMINATOR_WEIGHTS = "discriminators", "model.safetensors"


def discriminator_file(tokenizer: str | Path) -> tuple[Path, dict[str, Any]]:
    """The weights of the discriminators that belong to a tokenizer, and their configuration.

    Args:
        tokenizer: a folder that `slm export discriminators=true` wrote or a hub name of one, or the model folder of a
            run that still has its checkpoints.

    Raises:
        ConfigError: there are none.
    """
    folder = model_path(str(tokenizer))
    found = {"subfolder": DISCRIMINATORS, "_raise_exceptions_for_missing_entries": False}
    try:
        weights = cached_file(str(folder), DISCRIMINATOR_WEIGHTS, **found)
        settings = cached_file(str(folder), "config.json", **found)
    except OSError:  # neither a folder nor a name on the hub: the tokenizer itself will say so
        weights = settings = None
    if weights and settings:
        return Path(weights), json.loads(Path(settings).read_text(encoding="utf-8"))
    run = run_of(folder)
    checkpoints = sorted((run.folder / "checkpoints").glob("checkpoint-*/discriminator.safetensors")) if run else []
    if not checkpoints:
        raise ConfigError(
            f"{tokenizer} has no discriminators: neither {DISCRIMINATORS}/{DISCRIMINATOR_WEIGHTS} in it, as slm export "
            "discriminators=true writes it, nor a run around it with checkpoints of an adversarial training"
        )
    return checkpoints[-1], dict(run.settings.get("discriminator") or {})
