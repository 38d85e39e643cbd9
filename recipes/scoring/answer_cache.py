"""Transcripts that judges gave, kept on disk as they come, so that what was killed goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.runs.files import disk_errors
from recipes.runs.logs import log


class AnswerCache(Mapping[str, Any]):
    """Key -> JSON value, in a JSONL file to which lines are only ever added.

    A kill costs what was not added yet, and at most tears the last line, which then counts as absent. Several processes
    may add to one file: a line goes there in one piece, and the same key has the same value for all.

    Args:
        path: the file, made with the first line; None: nothing is kept on disk.
        header: what the answers hold for, in words for whoever reads the file; its first line.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any] | None = None) -> None:
        self.path, self.header = path, dict(header or {})
        self._values: dict[str, Any] = dict(self._read())

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep more answers. Raises OSError: the disk is full (what was kept before stays)."""
        self._values |= answers
        if self.path is None or not answers:
            return
        lines = [json.dumps({"key": key, "value": value}, ensure_ascii=False) for key, value in answers.items()]
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+", buffering=0) as file:
                size = file.tell()
                if not size:
                    lines.insert(0, json.dumps({"kept": self.header}, ensure_ascii=False))
                elif file.seek(size - 1) and file.read(1) != b"\n":
                    lines.insert(0, "")  # ends the line that a kill tore
                data = "".join(f"{line}\n" for line in lines).encode()
                while data:  # one call writes all but on a disk that is full
                    data = data[file.write(data) :]

    def forget(self) -> None:
        """Delete the file, once what it was kept for is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self) -> Iterator[tuple[str, Any]]:
        if self.path is None or not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():  # where a torn line was ended
                    continue
                try:
                    found = json.loads(line)
                    if "kept" not in found:
                        yield str(found["key"]), found["value"]
                except (ValueError, KeyError, TypeError):
                    log.info("%s, line %d: torn, as by a kill; what it held is made anew", self.path, number)
