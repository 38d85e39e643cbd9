"""Files of run folders: written whole or not at all, read without surprises, and a full disk explained."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import soundfile
from safetensors import SafetensorError

from tokenizer.data.utterances import text_of


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is absent or torn."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises OSError, on a full disk with the file's name and what to do."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text."""
    atomic_write_bytes(path, text.encode("utf-8"))


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one row a line, the whole file or none of it."""
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn a full disk into an error that names the place and says that nothing made so far is lost.

    Raises:
        OSError: as the system said; of a sound file that cannot be written, which libsndfile says of no errno.
    """
    try:
        yield
    except soundfile.LibsndfileError as error:
        why = "there is a folder of that name" if Path(path).is_dir() else "no space left, or no right to write there"
        raise OSError(f"{path} cannot be written: {why} ({error})") from error
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if isinstance(error, SafetensorError):  # its text alone says what the system said
            number = next((n for n in (errno.ENOSPC, errno.EDQUOT) if f"os error {n})" in str(error)), None)
        if number in (errno.ENOSPC, errno.EDQUOT) and "the same command goes on" not in str(error):
            message = f"no space left for {path}: free some, and the same command goes on; what was made so far is kept"
            raise OSError(number, message) from error
        raise


def text_lines(path: Path) -> list[str]:
    """The lines of a text file, of JSONL above all: only a newline ends one, as U+2028 or U+0085 stand in texts.

    Raises:
        DataError: it is not UTF-8, or no text at all.
    """
    lines = text_of(path).split("\n")
    return lines if lines[-1] else lines[:-1]
