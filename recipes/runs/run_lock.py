"""One process at a time works in a run folder: a second start of the same command would write over the first one's.

The lock is the system's, on a file in the folder: it ends with the process, however that ends.
"""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from recipes.config import ConfigError
from recipes.runs.files import read_json
from recipes.runs.logs import log

LOCK_FILE = ".lock"
_held: dict[Path, FileLock] = {}


def lock(folder: Path) -> None:
    """Take a folder, which is there, for this process; nothing where it has it.

    A file system that knows no locks leaves the folder open to all, which the log says.

    Raises:
        ConfigError: another process is at work in it.
    """
    place = folder.resolve()
    if place in _held:
        return
    found = FileLock(place / LOCK_FILE, timeout=0)
    try:
        found.acquire()
    except Timeout:
        started = (read_json(folder / "run.json").get("starts") or ["a moment ago"])[-1]
        raise ConfigError(
            f"another process is at work in {folder} (begun {started}): wait until it is through, end it, or choose "
            "another run_dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        log.warning("%s cannot be locked (%s): start no second command in it", folder, error)
        return
    _held[place] = found


def unlock(folder: Path) -> None:
    """Let others work in a folder; nothing where this process does not have it."""
    if (found := _held.pop(folder.resolve(), None)) is not None:
        found.release()
