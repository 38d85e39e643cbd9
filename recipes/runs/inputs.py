"""Whether what a run reads is still what it was begun with: a folder belongs to its inputs as to its settings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from recipes.config import ConfigError, Problems
from recipes.runs.files import read_json
from recipes.runs.own_folders import RUN_FILE
from recipes.runs.run_folder import COMPLETE_FILE, RunFolder
from tokenizer.data.manifest import check_utterances, read_source
from tokenizer.data.utterances import DataSource

HASHED_BYTES, BLOCK_BYTES = 64 << 20, 1 << 20


def digest(*parts: str | Path | Iterable[str]) -> str:
    """A hash of texts, of files, of the files of folders (a model, a coded corpus's index), and of other names."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path) and part.is_dir():
            for path in sorted([*part.glob("*.json"), *part.glob("*.safetensors")]):
                if path.name not in (RUN_FILE, COMPLETE_FILE):  # times and commands: not contents
                    found.update(f"{path.name} {path.stat().st_size}\0".encode())
                    _add_file(found, path)
        elif isinstance(part, str | Path):
            found.update(f"{part}\0".encode())
            if isinstance(part, Path) and part.is_file():
                found.update(f"{part.stat().st_size}\0".encode())
                _add_file(found, part)
        else:
            for text in part:
                found.update(f"{text}\0".encode())
        found.update(b"\1")
    return found.hexdigest()


def _add_file(found: hashlib._Hash, path: Path) -> None:
    """A file whole up to 64 MiB, a larger one by as many blocks spread over it.

    Large models are not read whole; their first part alone would not do: LoRA leaves an embedding's text rows as they
    were.
    """
    size, n_blocks = path.stat().st_size, HASHED_BYTES // BLOCK_BYTES
    with path.open("rb") as stream:
        if size <= HASHED_BYTES:
            found.update(stream.read())
            return
        for block in range(n_blocks):
            stream.seek((size - BLOCK_BYTES) * block // (n_blocks - 1))
            found.update(stream.read(BLOCK_BYTES))


def source_name(path: str) -> str:
    """What tables call a data source: the name of its folder, also of a manifest in the working directory.

    >>> source_name("corpora/grid-s1/manifest.jsonl"), source_name("corpora/grid-s1"), source_name("owner/name")
    ('grid-s1', 'grid-s1', 'name')
    """
    folder = Path(path).parent if Path(path).suffix else Path(path)
    return folder.name or folder.resolve().name


def check_sources(
    problems: Problems, sources: Sequence[DataSource], splits: Sequence[str], needs_text: bool = True
) -> None:
    """Notes every source that cannot be read, where reading them together names the first alone; or that none is."""
    if not sources:
        problems.attempt(check_utterances, [], sources, splits[0])
    for source in sources:
        for split in () if source.stream else splits:
            problems.attempt(read_source, source, split, needs_text)


def refuse_other_inputs(folder: RunFolder, fingerprint: str, what: str) -> None:
    """Raises ConfigError where the run folder holds something made of other inputs; `what` names them."""
    before = read_json(folder.path(RUN_FILE)).get("data_fingerprint")
    if before not in (None, fingerprint) and folder.has_results():
        raise ConfigError(
            f"{folder.folder} was begun with other contents of {what}, which have changed since: choose another "
            "run_dir=..., or start over with --restart (sets the old folder aside)"
        )
