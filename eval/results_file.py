"""``results.json``: results written and read back, those of earlier versions too."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from eval.schema import Results
from eval.speech.quality import QualitySummary
from eval.systems import SYSTEM_NAMES

__all__ = ["RESULTS_FILE", "SCHEMA_VERSION", "load_results", "save_results"]

SCHEMA_VERSION = 2
RESULTS_FILE = "results.json"
# An entry of `quality` holds a number under the key of each measure beside these: a new measure is one key more.
_QUALITY_FIELDS = {field.name for field in dataclasses.fields(QualitySummary)}


def save_results(results: Results, folder: Path | str) -> Path:
    """Write ``results.json`` into a folder; clips are named relative to it. Replaces the file in one step."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(results)}
    for item in content["quality"]:
        item |= item.pop("values")
    for sample in content["samples"]:
        for clip in sample["clips"]:
            clip["audio"] = (
                os.path.relpath(clip["audio"], folder) if Path(clip["audio"]).is_absolute() else clip["audio"]
            )
    target = folder / RESULTS_FILE
    temporary = target.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    temporary.replace(target)
    return target


def load_results(path: Path | str) -> Results:
    """Read ``results.json`` (or the folder that holds it); clips' paths come back absolute.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of a schema version that this code does not know, or not a results file.
    """
    path = Path(path)
    path = path / RESULTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: `slm evaluate` writes it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("schema_version", None)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a results file: {error}") from error
    if version not in range(1, SCHEMA_VERSION + 1):
        raise ValueError(
            f"{path} has schema version {version}, this code reads versions 1 to {SCHEMA_VERSION}: run `slm evaluate` "
            "again"
        )
    try:
        if version == 1:
            _upgrade(content)
        for item in content.get("quality", []):
            item["values"] = {key: item.pop(key) for key in [key for key in item if key not in _QUALITY_FIELDS]}
        results = TypeAdapter(Results).validate_python(content)
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a results file of version {version}: {error!r}") from error
    for sample in results.samples:
        for clip in sample.clips:
            clip.audio = str((path.parent / clip.audio).resolve())
    return results


def _upgrade(content: dict[str, Any]) -> None:
    """Version 1 to 2, in place: a cell stood before names there, and other words stood for ``n_scored``."""
    kinds = {name: kind for kind, name in SYSTEM_NAMES.items()}
    for row in content["rows"]:
        cell, colon, rest = row["name"].rpartition(f": {SYSTEM_NAMES.get(row['system'], '')}")
        if colon:
            row |= {"cell": cell, "name": colon.removeprefix(": ") + rest}
    for item in content.get("quality", []):
        cell, _, name = item["name"].rpartition(": ")
        item |= {"cell": cell, "name": name, "system": kinds.get(name, ""), "n_scored": item.pop("n_clips")}
    for item in content.get("codes", []):
        cell, _, name = item["name"].rpartition(": ")
        item |= {"cell": cell, "name": name, "n_scored": item.pop("n_utterances")}
