"""Short, distinct names of models and recordings, for tables and as parts of file names."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

# Folder names that say what a model is but not which one: a label takes the folder above along.
STAGES = ("train-teacher", "train-tokenizer", "train-lm", "finetune", "teacher", "tokenizer", "lm", "slm")


def model_label(name: str) -> str:
    """A short name of a model for tables.

    Of ``runs/nano-12.5/model`` that is "nano-12.5"; of a pipeline's stage, ``runs/quickstart/finetune/model``, it is
    "quickstart/finetune".
    """
    path = Path(name)
    return (label_of_path(path.resolve()) or name) if path.exists() else name


def label_of_path(path: str | PurePath) -> str:
    """What `model_label` calls the model of a path, whether that is there or not."""
    parts = [part for part in PurePath(path).parts if part not in ("model", "/")]
    return "/".join(parts[-2:] if parts and parts[-1] in STAGES else parts[-1:])


def labels_of(names: list[str]) -> list[str]:
    """As many last parts of each model's path or hub name as tell it from the others, joined by hyphens.

    Parts that say what a model is but not which one are left out: of ``runs/nano/tokenizer/model`` that is "nano".
    """
    paths = [_telling_parts(name) for name in names]
    for n in range(1, max(map(len, paths)) + 1):
        labels = [file_name("-".join(parts[-n:])) for parts in paths]
        if len({label.casefold() for label in labels}) == len(labels):
            break
    return distinct(labels)


def _telling_parts(name: str) -> list[str]:
    path = Path(name).resolve() if Path(name).exists() else Path(name)
    parts = [part for part in PurePath(path).parts if part not in ("model", "/")]
    if len(parts) > 1 and parts[-1] in STAGES and parts[-2] != "runs":
        parts.pop()
    return parts or [name]


def file_name(text: str) -> str:
    """A text as part of a file name: letters of any script stay."""
    return re.sub(r"[^\w.]+", "-", text).strip("-.") or "audio"


def distinct(names: list[str]) -> list[str]:
    """The names, with a number behind each that has occurred (whatever its case: some file systems fold it)."""
    found: list[str] = []
    for name in names:
        new, number = name, 1
        while new.casefold() in {other.casefold() for other in found}:
            number += 1
            new = f"{name}-{number}"
        found.append(new)
    return found
