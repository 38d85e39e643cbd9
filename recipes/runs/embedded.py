"""Embedded models in configurations: their names stand wherever a folder or a hub name may."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import slm.embedded
import tokenizer.embedded
from eval.judges.config import JudgeConfig
from recipes.config import ConfigError
from recipes.suggestions import did_you_mean

TOKENIZERS = tokenizer.embedded.TOKENIZERS
RECOGNISERS = tokenizer.embedded.RECOGNISERS
EMBEDDED = (*tokenizer.embedded.EMBEDDED, *slm.embedded.EMBEDDED)


class EmbeddedError(ConfigError):
    """There is no such embedded model, or its files are missing from this installation."""


def resolve(name: str) -> str:
    """The folder of an embedded model; any other name as it is.

    Raises:
        EmbeddedError: the name has the form of an embedded one (`embedded-...`) and is none, or its files are missing.
    """
    if not name.startswith("embedded-") or "/" in name or (name not in EMBEDDED and Path(name).exists()):
        return name
    if name not in EMBEDDED:
        guess = did_you_mean(name, EMBEDDED)
        raise EmbeddedError(f"no embedded model is called {name!r}; {guess}there are {', '.join(EMBEDDED)}")
    island = slm.embedded if name in slm.embedded.EMBEDDED else tokenizer.embedded
    try:
        return str(island.embedded_folder(name))
    except ValueError as error:
        raise EmbeddedError(str(error)) from error


def model_path(name: str | None) -> Path | str:
    """Where a model lies, as `recipes.runs.inputs.digest` takes it; an empty text where none is named."""
    return Path(resolve(name)).expanduser() if name else ""


def resolve_judge(judge: JudgeConfig) -> JudgeConfig:
    """A judge whose name is a folder or a hub name; an embedded one keeps its own name in tables and protocols."""
    where = resolve(judge.name)
    return judge if where == judge.name else replace(judge, name=where, label=judge.label or judge.name)


def check_embedded(configs: Iterable[Any]) -> None:
    """Raises EmbeddedError where recipes' configurations name an embedded model that is not installed: at once, not
    stages later.
    """
    for config in configs:
        for name in _texts(config):
            if name in EMBEDDED:
                resolve(name)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _texts(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
