"""Which folders are ours: where a run may write, and what ``--restart`` may set aside.

A run writes names such as ``manifest.jsonl``, ``samples/`` or ``model/``: in a folder that somebody else filled it
would write over theirs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from recipes.config import ConfigError

CONFIG_FILE, RUN_FILE = "config.yaml", "run.json"
# What runs write, at the top of their folders.
WRITTEN = (CONFIG_FILE, "complete.json", "metrics.jsonl", "model", "base", "adapter", "checkpoints")
WRITTEN += ("manifest.jsonl", "audio", "index.json", "*.parquet", "skipped.jsonl", "precision.json")
WRITTEN += (
    "codes.json",
    "parts",
    "predictions.json*",
    "results.*",
    "report.html",
    "samples",
    "contrasts.*",
    "errors-*.txt",
    "transcripts",
)
# What a shell, a scheduler or a desktop puts beside a run, and no recipe ever writes.
IGNORED = (".*", "*.log", "*.out", "*.err", "log.txt", "log-*.txt", "lost+found")


def is_run_folder(folder: Path) -> bool:
    """Whether a run was begun there: it has a run.json, or the config.yaml of a run (which names its run_dir)."""
    if (folder / RUN_FILE).is_file():
        return True
    file = folder / CONFIG_FILE
    return file.is_file() and re.search(r"^run_dir:", file.read_text("utf-8", errors="replace"), re.M) is not None


def refuse_foreign(folder: Path) -> None:
    """Raises ConfigError where a folder holds what a run would write over, but no run was begun there.

    Notes, configurations of other names, scripts, logs and the folders of other runs (a pipeline's stages that were run
    before it) are no hindrance.
    """
    if not folder.is_dir() or is_run_folder(folder) or not (names := some_of(_in_the_way(folder))):
        return
    if is_run_folder(folder):  # another process of this run has just begun it
        return
    raise ConfigError(
        f"run_dir {folder} holds {names}, but no run was begun there (it has no {RUN_FILE}, nor the {CONFIG_FILE} of a "
        "run): one would write over what is not its own. Name another run_dir=..., or move these away"
    )


def refuse_unwritable(folder: Path, key: str) -> None:
    """Raises ConfigError where a folder cannot be written to, or cannot be made: before a run has worked for it.

    Args:
        folder: where a run would write; it need not be there.
        key: what the user calls it.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written to by this user, or is of a read-only file system"
        raise ConfigError(f"{key} {folder}: {there} {why}; name another folder")


def refuse_to_set_aside(folder: Path, own_files: Iterable[str] = ()) -> None:
    """Raises ConfigError where a folder is not one that this project made, or the working folder is in it.

    Args:
        folder: what would be set aside; one that is not there, or has nothing but logs in it, may be.
        own_files: patterns, all of which a folder of this kind has files for; empty: that of a run.
    """
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ConfigError(f"{folder} is the working folder or above it: it is not set aside; name another folder")
    if not folder.is_dir():
        if folder.exists():
            raise ConfigError(f"{folder} is a file: it is not set aside; name another folder")
        return
    own = all(any(folder.glob(name)) for name in own_files) if own_files else is_run_folder(folder)
    names = some_of(path.name for path in sorted(folder.iterdir()) if not _is_ignored(path))
    if names and not own:
        missing = " and ".join(own_files) or f"{RUN_FILE} or {CONFIG_FILE} of a run"
        raise ConfigError(
            f"{folder} is not set aside: it holds {names}, but not what this command writes there ({missing}). Name "
            "another folder, or move it yourself"
        )


def some_of(names: Iterable[str], most: int = 3) -> str:
    """``a, b, c and others``; empty where there are none."""
    found = [name for name, _ in zip(names, range(most + 1), strict=False)]
    return ", ".join(found[:most]) + " and others" * (len(found) > most)


def _in_the_way(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if _fits(path, WRITTEN) and not (path.is_dir() and (is_run_folder(path) or _is_hollow(path))):
            yield path.name


def _is_hollow(folder: Path) -> bool:
    """Whether no file lies in a folder or below it."""
    return all(path.is_dir() for path in folder.rglob("*"))


def _is_ignored(path: Path) -> bool:
    return _fits(path, IGNORED)


def _fits(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path.name, pattern) for pattern in patterns)
