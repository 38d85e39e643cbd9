"""Whether what a run reads is still what it was begun with: a folder belongs to its inputs as to its settings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from recipes.config import ConfigError
from recipes.runtime import RUN_FILE, RunFolder, read_json

HASHED_BYTES = 64 << 20


def digest(*parts: str | Path | Iterable[str]) -> str:
    """A hash of texts, of the files of folders (a model, a coded corpus's index), and of names that are neither."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path) and part.is_dir():
            # Weights by size and first 64 MiB: training changes every tensor, and large models are not read twice.
            for path in sorted([*part.glob("*.json"), *part.glob("*.safetensors")]):
                with path.open("rb") as stream:
                    found.update(f"{path.name} {path.stat().st_size}\0".encode() + stream.read(HASHED_BYTES))
        elif isinstance(part, str | Path):
            found.update(f"{part}\0".encode())
        else:
            for text in part:
                found.update(f"{text}\0".encode())
        found.update(b"\1")
    return found.hexdigest()


def refuse_other_inputs(folder: RunFolder, fingerprint: str, what: str) -> None:
    """Raises ConfigError where the run folder was begun with other inputs; `what` names them."""
    before = read_json(folder.path(RUN_FILE)).get("data_fingerprint")
    if before is not None and before != fingerprint:
        raise ConfigError(
            f"{folder.folder} was begun with other contents of {what}, which have changed since: choose another "
            "run_dir=..., or start over with --restart (sets the old folder aside)"
        )
