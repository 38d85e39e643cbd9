"""Notes of cells: what several say of folders of their own stands once, with the names of the cells."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def notes_once(notes: Mapping[str, Sequence[str]], folders: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Every note, in the order of its first cell.

    Args:
        notes: Of each cell.
        folders: Of each cell the folders of its stages, by the stage's name. Notes that differ in these alone are one,
            with the stage in the folder's place.

    >>> said = {cell: [f"runs/{cell}/asr/predictions.jsonl: 3 too many", "one machine"] for cell in ("a", "b")}
    >>> notes_once(said, {cell: {"asr": f"runs/{cell}/asr"} for cell in said})
    ['a, b: asr/predictions.jsonl: 3 too many', 'one machine']
    """
    said: dict[str, dict[str, str]] = {}  # the note without its cell -> cell -> as it is written
    for cell, own in notes.items():
        for note in own:
            said.setdefault(_without_folders(note, folders.get(cell, {})), {})[cell] = note
    return [_together(about, of_cells) for about, of_cells in said.items()]


def _together(about: str, of_cells: Mapping[str, str]) -> str:
    """The note as it is written where all its cells write it so, else what they have in common."""
    written = set(of_cells.values())
    return written.pop() if len(written) == 1 else f"{', '.join(of_cells)}: {about}"


def _without_folders(note: str, folders: Mapping[str, str]) -> str:
    """The note with the names of stages in the place of their folders."""
    for stage, folder in folders.items():
        note = re.sub(rf"{re.escape(str(Path(folder)))}(?=[/:;,)\s]|$)", lambda _, name=stage: name, note)
    return note
