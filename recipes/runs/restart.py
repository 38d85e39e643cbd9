"""``--restart``: an earlier result is set aside only once it is sure that the new one can be begun."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from recipes.config import ConfigError
from recipes.runs.own_folders import refuse_to_set_aside
from recipes.runs.run_folder import PROCESS_TIMEOUT_S, RunFolder

# Keys whose texts are no paths: a name may be the folder's too.
NAMES = ("name", "preset", "title", "text", "label", "notes", "rows", "only", "voices", "license")


def start_over(recipe: Any, settings: Any) -> Path | None:
    """Check the new run as if the earlier one were not there, then set that aside; returns where, None if none was.

    Args:
        recipe: its module; `recipe.plan` is its check.
        settings: its configuration. `run_dir` can be set; a class whose folders are no run folders names in
            `own_files` what they hold.

    Raises:
        ConfigError: there is no folder to set aside, it is not ours, or it is or holds an input.
        Exception: what `recipe.plan` raises.
    """
    if not settings.run_dir:
        raise ConfigError(
            "--restart: this command was given no folder to set aside. Name the result's (run_dir=..., or -o or "
            "OUT_DIR where that is a folder), or leave --restart"
        )
    folder, own_files = RunFolder(settings.run_dir), getattr(type(settings), "own_files", ())
    if folder.folder.exists():
        refuse_to_set_aside(folder.folder, own_files)
        anew = copy.copy(settings)
        anew.run_dir = str(folder.folder.with_name(f".{folder.folder.name}.anew"))
        _refuse_inputs_within(settings, anew, folder.folder)
        recipe.plan(anew)
    training = getattr(settings, "training", None)
    return folder.set_aside(own_files, getattr(training, "process_timeout_s", PROCESS_TIMEOUT_S))


def _refuse_inputs_within(settings: Any, anew: Any, folder: Path) -> None:
    """Raises ConfigError where a path of the configuration is the folder or lies in it.

    Only a text that stands in `anew` too counts: what differs there is the place of the result.
    """
    kept = set(_texts(asdict(anew)))
    for key, text in _texts(asdict(settings)):
        if (key, text) in kept and not (_is_name(key) and os.sep not in text) and _lies_in(text, folder):
            raise ConfigError(
                f"--restart: {folder} is not set aside, because {key} reads {text}, which is in it. Name another "
                "folder for the result, or another input"
            )


def _is_name(key: str) -> bool:
    """Whether a dotted key (`rows.0`) holds names; a judge's or teacher's name may be a folder."""
    parts = [part for part in key.split(".") if not part.isdigit()]
    return parts[-1] in NAMES and parts[-2:-1] not in (["judges"], ["teacher"])


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in a configuration; of a stage's ``key=value`` the value's texts too."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{key}.{index}")
    elif isinstance(value, str) and value:
        yield key, value
        _, _, assigned = value.partition("=")
        if assigned:
            try:
                inner = yaml.safe_load(assigned)
            except yaml.YAMLError:
                inner = assigned
            yield from ((key, text) for _, text in _texts(inner))


def _lies_in(text: str, folder: Path) -> bool:
    """Whether a text is a path in the folder, by its name or (a link) by where it leads."""
    path = os.path.expanduser(text)
    wholes = {os.path.abspath(folder), os.path.realpath(folder)}
    return any(
        place == whole or place.startswith(whole + os.sep)
        for place in (os.path.abspath(path), os.path.realpath(path))
        for whole in wholes
    )
