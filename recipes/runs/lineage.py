"""The runs behind a trained model: what made it, what that was made from, on which data, how long it took.

Read from the run folders alone (`config.yaml`, `run.json`, `complete.json`, `metrics.jsonl`), so it holds for any run
of this project, also for one that a pipeline started.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipes.runs.embedded import EMBEDDED
from recipes.runs.files import read_json, text_lines
from recipes.runs.own_folders import CONFIG_FILE, RUN_FILE
from recipes.runs.run_folder import COMPLETE_FILE
from recipes.runs.times import wall_seconds

# Keys that tell recipes apart in a config.yaml: for runs whose run.json does not name theirs yet.
_MARKS = {
    "crops": "train-tokenizer",
    "lm": "train-lm",
    "task_weights": "finetune",
    "copies": "encode",
    "n_commands": "prepare-corpus",
    "augmentation": "train-teacher",
}
NOT_STATED = "not stated"


@dataclass
class PastRun:
    """One run that is done, as its folder tells it."""

    folder: Path
    recipe: str
    settings: dict[str, Any]
    record: dict[str, Any]
    marker: dict[str, Any]
    base: Path  # the folder that relative paths of its configuration start from

    @property
    def summary(self) -> dict[str, Any]:
        return self.marker.get("summary", {})

    @property
    def complete(self) -> bool:
        return bool(self.marker)

    @property
    def wall_s(self) -> float | None:
        """Seconds over all its starts; None where they were not recorded."""
        starts, finished = self.record.get("starts", []), self.marker.get("finished", "")
        return wall_seconds(starts, self.folder / "metrics.jsonl", finished)

    @property
    def command(self) -> str:
        """What was typed; a stage of a pipeline says which stage it is."""
        words = [str(word) for word in self.record.get("command", [])][1:]
        words = [word for word in words if word not in ("--debug", "--restart")]
        processes = self.record.get("processes") or 1
        start = f"torchrun --nproc_per_node {processes} -m recipes.cli" if processes > 1 else "slm"
        line = f"{start} {shlex.join(words)}" if words else f"{start} {self.recipe} --config {CONFIG_FILE}"
        return line if not words or words[0] == self.recipe else f"{line}  # its stage {self.settings.get('run_dir')}"

    def inputs(self) -> Iterator[str]:
        """Names and paths of what it was made from, apart from recordings that no run made."""
        settings = self.settings
        heard_by = (settings.get(key) for key in ("teacher", "encoder"))
        names = [value.get("name") for value in heard_by if isinstance(value, dict)]
        for value in (settings.get("init_from"), *names):
            if value:
                yield value
        for key in ("model", "corpus", "decoder_corpus", "tokenizer", "acoustic"):
            if isinstance(settings.get(key), str) and settings[key]:
                yield settings[key]
        for source in (*(settings.get("data") or []), *(settings.get("corpora") or [])):
            yield source["path"]


def read_run(folder: Path) -> PastRun | None:
    """The run that a folder holds; None where it is no run folder."""
    try:
        settings = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    if not isinstance(settings, dict) or not (folder / RUN_FILE).is_file():
        return None
    record, marker = read_json(folder / RUN_FILE), read_json(folder / COMPLETE_FILE)
    recipe = record.get("recipe") or next((name for key, name in _MARKS.items() if key in settings), "")
    # A run in BASE/runs/x was configured as runs/x, relative to BASE like its other paths.
    whole, own = folder.resolve(), Path(str(settings.get("run_dir", "")))
    inside = own.parts and whole.parts[-len(own.parts) :] == own.parts
    base = Path(*whole.parts[: -len(own.parts)]) if inside and not own.is_absolute() else Path.cwd()
    return PastRun(folder, recipe, settings, record, marker, base)


def run_of(path: str | Path, base: Path = Path()) -> PastRun | None:
    """The run that wrote a model folder, a manifest or a coded corpus; None where no run folder is there."""
    place = base / Path(path).expanduser()
    for folder in (place, place.parent):
        if (found := read_run(folder)) is not None:
            return found
    return None


@dataclass
class Lineage:
    """A run and all before it, the first first; `outside` are inputs that no run folder here explains."""

    runs: list[PastRun] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)


def lineage(run: PastRun) -> Lineage:
    """Follows a run's inputs (initial weights, teacher, corpus, text LM, prepared data) back to where they end."""
    found = Lineage()
    seen: set[Path] = set()

    def follow(current: PastRun) -> None:
        if current.folder.resolve() in seen:
            return
        seen.add(current.folder.resolve())
        for name in current.inputs():
            before = None if name in EMBEDDED else run_of(name, current.base)
            if before is not None:
                follow(before)
            elif name not in found.outside and not _is_data(current, name):
                found.outside.append(name)
        found.runs.append(current)

    follow(run)
    return found


def _is_data(run: PastRun, name: str) -> bool:
    return any(source["path"] == name for source in run.settings.get("data") or [])


@dataclass
class DataRow:
    """What one corpus gave to one split. `hours` is None where the source does not tell durations."""

    corpus: str
    split: str
    n: int | None = None
    hours: float | None = None
    n_speakers: int | None = None
    licences: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    read_by: list[str] = field(default_factory=list)


def data_rows(runs: list[PastRun], splits: tuple[str, ...] = ("train", "valid")) -> list[DataRow]:
    """A row for each corpus and split that any of the runs read, counted in its manifest."""
    rows: dict[tuple[str, str, Any], DataRow] = {}
    for run in runs:
        for base, source in _recordings(run):
            place = base / Path(source["path"]).expanduser()
            manifest = place / "manifest.jsonl" if place.is_dir() else place
            for split in splits:
                key = (str(manifest), split, source.get("limit"))
                if key not in rows:
                    row = _count(manifest, source, split)
                    if row is None:
                        continue
                    rows[key] = row
                rows[key].read_by = list(dict.fromkeys([*rows[key].read_by, run.recipe]))
    return list(rows.values())


def _recordings(run: PastRun) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The data sources that a run read, and where their paths start.

    A manifest that another run made of data (`slm align`) stands for that data, whose licences it may not repeat.
    """
    for source in run.settings.get("data") or []:
        made_by = run_of(source["path"], run.base)
        if made_by is not None and made_by.settings.get("data"):
            yield from _recordings(made_by)
        else:
            yield run.base, source


def _count(manifest: Path, source: dict[str, Any], split: str) -> DataRow | None:
    """A manifest's lines of one split; None where it has none of them."""
    whole = manifest.resolve()
    corpus = whole.parent.name if whole.suffix else whole.name
    if manifest.suffix != ".jsonl" or not manifest.is_file():
        # Another kind of source, or one that is not here: it has a name and no figures.
        return DataRow(corpus, split) if split == (source.get("split") or "train") else None
    lines = [json.loads(line) for line in text_lines(manifest) if line.strip()]
    mine = [line for line in lines if (source.get("split") or line.get("split", "train")) == split]
    mine = mine[: source.get("limit")]
    if not mine:
        return None
    seconds = [line.get("duration") for line in mine]

    def values(key: str) -> tuple[str, ...]:
        return tuple(sorted({str(line.get(key) or NOT_STATED) for line in mine}))

    return DataRow(
        corpus,
        split,
        len(mine),
        sum(seconds) / 3600 if all(isinstance(item, int | float) for item in seconds) else None,
        len({line.get("speaker") for line in mine}),
        values("license"),
        values("source"),
    )
