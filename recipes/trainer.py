"""What the recipes that train with transformers' Trainer share."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from transformers.trainer_pt_utils import safe_globals

from recipes.runtime import is_main_process, log

NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest `checkpoint-N` in `folder` that can be resumed from; torn ones are set aside as `torn-checkpoint-N`.

    Trainer raises on a torn checkpoint instead of taking the one before, and it counts anything called checkpoint-N.
    """
    numbered = [c for c in folder.glob("checkpoint-*") if c.name.rpartition("-")[2].isdigit()]
    for checkpoint in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        fault = _fault(checkpoint)
        if fault is None:
            return str(checkpoint)
        log.warning("%s is torn (%s): set aside, the one before is used", checkpoint, fault)
        if is_main_process():
            number = 0
            while (aside := checkpoint.with_name(f"torn-{checkpoint.name}{f'-{number}' if number else ''}")).exists():
                number += 1
            checkpoint.rename(aside)
    return None


def _fault(checkpoint: Path) -> str | None:
    missing = [name for name in NEEDED if not (checkpoint / name).is_file()]
    if missing:
        return f"no {', '.join(missing)}"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        weights = list(checkpoint.glob("*.safetensors"))
        if not weights:
            return "no weights"
        for file in weights:
            with safe_open(file, "pt"):  # checks the header against the file's length
                pass
        import torch

        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, weights_only=True, map_location="meta")
        for file in checkpoint.glob("rng_state*.pth"):
            with safe_globals():
                torch.load(file, weights_only=True)
    # A torn pickle raises whatever its last bytes happen to mean: IndexError, UnpicklingError, ...
    except Exception as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return None
