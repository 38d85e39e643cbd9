"""speech_vocabulary.json of a model folder: the fields of a vocabulary, written and read again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm.patterns import LATE
from slm.vocabulary.groups import MARKS, Group, VocabularyError

FILE_NAME = "speech_vocabulary.json"
FORMAT = "lmspt-speech-vocabulary/2"
# Without groups: four marks and the books, which is what the fields alone give.
FORMAT_1 = "lmspt-speech-vocabulary/1"
# With further books beside the LLM's ids, which a reader of the formats above would not see.
FORMAT_3 = "lmspt-speech-vocabulary/3"


def write_fields(
    folder: str | Path, fields: Mapping[str, Any], groups: Mapping[str, Group], pattern: str | None
) -> Path:
    """Writes the file whole or not at all.

    Args:
        folder: Of the model.
        fields: Of the vocabulary.
        groups: Its groups, which say what some of the fields do.
        pattern: How further books come, where they stand beside the LLM's ids; None: there are none.
    """
    path = Path(folder) / FILE_NAME
    temporary = path.with_name(f".{path.name}.tmp")
    kept = {
        name: {"first_id": group.first_id, "size": len(group.tokens)}
        | ({} if name.startswith("book ") else {"tokens": list(group.tokens)})
        for name, group in groups.items()
    }
    facts = {"format": FORMAT, "groups": kept} | dict(fields)
    if pattern is not None:
        facts |= {"format": FORMAT_3, "pattern": pattern}
    else:
        del facts["further_sizes"]
    if facts["prosody"] is None:  # as a model says it that has none
        del facts["prosody"]
    for name in ("codebook_sizes", "first_id", "added", "late"):  # which the groups say, and the pattern
        del facts[name]
    temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_fields(folder: str | Path) -> dict[str, Any]:
    """The fields of a folder's vocabulary.

    Raises:
        VocabularyError: No such file, or another format.
    """
    path = Path(folder) / FILE_NAME
    if not path.exists():
        raise VocabularyError(
            f"{folder}: no {FILE_NAME}, so it is not a speech language model; make one with `slm finetune`"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values.pop("format", None)
        if found not in (FORMAT, FORMAT_1, FORMAT_3):
            known = ", ".join(map(repr, (FORMAT_1, FORMAT, FORMAT_3)))
            raise VocabularyError(f"{path}: format {found!r}, this version reads {known}")
        if found == FORMAT_3:
            if (pattern := values.pop("pattern")) not in LATE:
                raise VocabularyError(
                    f"{path}: pattern {pattern!r}, this version knows {', '.join(LATE)} with books beside"
                )
            values["late"] = LATE[pattern]
        if found != FORMAT_1:
            values |= _read_groups(values.pop("groups"), path)
        return values
    except (TypeError, AttributeError, KeyError, json.JSONDecodeError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> VocabularyError:
    """What is raised where a file does not say what it should."""
    return VocabularyError(f"{path}: damaged ({error}); fine-tune again or copy it anew")


def _read_groups(groups: dict[str, dict], path: Path) -> dict[str, object]:
    """The fields that a file's groups stand for.

    Raises:
        VocabularyError: The ids have gaps, or the marks are not those that this version knows.
    """
    ordered = sorted(groups.items(), key=lambda item: item[1]["first_id"])
    starts = [group["first_id"] for _, group in ordered]
    ends = [group["first_id"] + group["size"] for _, group in ordered]
    books = [(name, group["size"]) for name, group in ordered if name.startswith("book ")]
    first = ordered[0][1]
    expected = ["marks", *(f"book {book}" for book in range(len(books)))]
    if (
        starts[1:] != ends[:-1]
        or tuple(first.get("tokens", ())) != MARKS
        or [n for n, _ in ordered][: len(expected)] != expected
    ):
        raise VocabularyError(
            f"{path}: groups must be marks ({', '.join(MARKS)}), book 0, book 1, ... and others, ids on end; copy the "
            "file anew from the folder that `slm finetune` wrote"
        )
    return {
        "codebook_sizes": [size for _, size in books],
        "first_id": first["first_id"],
        "added": [(name, group["tokens"]) for name, group in ordered[len(expected) :]],
    }
