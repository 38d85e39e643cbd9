"""The DeepSpeed configuration that a fine-tuning names."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path

from recipes.config import CONFIGS, ConfigError
from recipes.runs.logs import log
from recipes.suggestions import did_you_mean
from slm.training.config import TrainingConfig

ENGINES = CONFIGS / "engines"
OLD_LOCK_MINUTES = 5  # a build takes less than one


def engine_config(training: TrainingConfig) -> str | None:
    """The path of the DeepSpeed configuration, a file or a shipped name.

    Raises:
        ConfigError: no such file, an engine without a launcher or not installed, or settings that would lose the model.
    """
    if (training.deepspeed or training.fsdp) and "RANK" not in os.environ:
        raise ConfigError(
            "training.deepspeed and training.fsdp need a launcher: torchrun --nproc_per_node 2 -m recipes.cli "
            "finetune ..."
        )
    if not training.deepspeed:
        return None
    path = deepspeed_file(training.deepspeed)
    _check(path, training)
    _warn_of_locks()
    return str(path)


def deepspeed_file(name: str) -> Path:
    """The JSON that `training.deepspeed` names: a file, or a shipped one. Raises ConfigError where there is none."""
    for path in (Path(name), CONFIGS / name, ENGINES / f"{name}.json"):
        if path.is_file():
            return path
    shipped = sorted(path.stem for path in ENGINES.glob("*.json"))
    guess = did_you_mean(name, shipped)
    raise ConfigError(
        f"training.deepspeed: no file {name}; {guess}give a JSON or a shipped name ({', '.join(shipped)})"
    )


def set_deepspeed_device(device: str) -> None:
    """Names the CPU to DeepSpeed, which the Trainer imports wherever it is installed and which else warns of it."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _warn_of_locks() -> None:
    """Warns of what a build of an operation leaves when it is killed: the next one waits for it for ever."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch_extensions"
    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache).expanduser().rglob("lock"):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if minutes > OLD_LOCK_MINUTES:
            log.warning(
                "training.deepspeed: %s is %.0f minutes old: a process that built a part of DeepSpeed may have been "
                "killed, and the training will wait for it; if no other process builds one, remove the file",
                lock,
                minutes,
            )


def _check(path: Path, training: TrainingConfig) -> None:
    """Raises ConfigError for what would only show at the end of a training, or not at all."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("training.deepspeed: DeepSpeed is not installed; pip install deepspeed")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"training.deepspeed: {path} is no JSON ({error})") from error
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ConfigError(
            f"training.deepspeed: {path} has stage 3 without stage3_gather_16bit_weights_on_model_save: the trained "
            "model could not be gathered and saved; set it to true in zero_optimization"
        )
    if "optimizer" in settings and training.embedding_learning_rate is not None:
        raise ConfigError(
            f"training.embedding_learning_rate: {path} brings an optimizer of its own, which knows one rate; remove "
            "`optimizer` from it"
        )
