"""Which folders are ours: where a run may write, and what ``--restart`` may set aside.

A run writes names such as ``manifest.jsonl``, ``samples/`` or ``model/``: in a folder that somebody else filled it
would write over theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from recipes.config import ConfigError

CONFIG_FILE, RUN_FILE = "config.yaml", "run.json"
# What a shell, a scheduler or a desktop puts beside a run, and no recipe ever writes: it may be there before.
BESIDE_A_RUN = (".*", "*.log", "*.out", "*.err", "log.txt", "log-*.txt", "lost+found")
MOST_LEVELS = 4  # a pipeline's stages lie two below it: RUN_DIR/CELL/STAGE


def is_run_folder(folder: Path) -> bool:
    """Whether a run was begun there: it has a run.json, or the config.yaml of a run (which names its run_dir)."""
    if (folder / RUN_FILE).is_file():
        return True
    file = folder / CONFIG_FILE
    return file.is_file() and re.search(r"^run_dir:", file.read_text("utf-8", errors="replace"), re.M) is not None


def refuse_foreign(folder: Path) -> None:
    """Raises ConfigError where a folder holds something, but no run was begun there.

    Logs, hidden files, empty folders and the folders of other runs (a pipeline's stages that were run before it, what
    was set aside as ``.old-N``) are no hindrance.
    """
    if folder.is_dir() and not is_run_folder(folder) and (names := some_of(_strangers(folder))):
        raise ConfigError(
            f"run_dir {folder} holds {names}, but no run was begun there (it has no {RUN_FILE}, nor the {CONFIG_FILE} "
            "of a run): one might write over what is not its own. Name another run_dir=..., or move these away"
        )


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
    names = some_of(path.name for path in sorted(folder.iterdir()) if not _beside_a_run(path))
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


def _strangers(folder: Path) -> Iterator[str]:
    return (path.name for path in sorted(folder.iterdir()) if not _may_be_there(path, MOST_LEVELS))


def _may_be_there(path: Path, levels: int) -> bool:
    if _beside_a_run(path) or not path.is_dir():
        return _beside_a_run(path)
    return is_run_folder(path) or (levels > 0 and all(_may_be_there(inner, levels - 1) for inner in path.iterdir()))


def _beside_a_run(path: Path) -> bool:
    return any(fnmatchcase(path.name, pattern) for pattern in BESIDE_A_RUN)
