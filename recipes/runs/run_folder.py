"""The folder of one run: whether it may begin, go on or is complete, and what it records."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from recipes.config import ConfigError, dump_config, flatten, from_values
from recipes.runs.files import atomic_write_text, disk_errors, read_json
from recipes.runs.machine import describe_machine, is_main_process, process_count, resolve_device
from recipes.runs.own_folders import CONFIG_FILE, RUN_FILE, refuse_foreign, refuse_to_set_aside, refuse_unwritable
from recipes.runs.run_lock import LOCK_FILE, lock, unlock
from recipes.runs.times import now, wall_seconds

COMPLETE_FILE = "complete.json"
PROCESS_TIMEOUT_S = 7200.0  # where a configuration has no key for it
VERSIONED = ("lmspt-slm", "torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "numpy", "jiwer")
VERSIONED += ("rapidfuzz", "whisper-normalizer", "num2words", "soxr", "pocketsphinx")
# A field with this metadata changes how a run is done, not what comes out: `field(..., metadata=ADJUSTABLE)`.
ADJUSTABLE = {"adjustable": True}
# One with this says how far a run goes: a larger value goes on from the last checkpoint, also of a complete run.
EXTENDABLE = {"extendable": True}
# The sibling whose value a null here stands for: null and that value are one setting.
NULL_MEANS = "null_means"
ABSENT = "(absent)"


class RunFolder:
    """The folder of one run: ``config.yaml``, ``run.json``, ``metrics.jsonl``, ``checkpoints/``, ``complete.json``.

    A complete run is skipped, an interrupted one goes on, one begun with another configuration is refused.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir)

    def path(self, *names: str) -> Path:
        """A path inside the folder."""
        return self.folder.joinpath(*names)

    @property
    def metrics(self) -> Path:
        """Where ``metrics.jsonl`` lies."""
        return self.path("metrics.jsonl")

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, made if need be."""
        folder = self.path("checkpoints")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def check(self, config: Any) -> None:
        """Raise ConfigError where a run with this configuration may not go on there (for plans and dry runs).

        The folder was begun with another configuration and holds something made with it, is none of ours and not empty
        (`refuse_foreign`), or nothing can be written there.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"run_dir {self.folder} is a file; name a folder")
        refuse_foreign(self.folder)
        if not self.complete:
            refuse_unwritable(self.folder, "run_dir")
        file = self.path(CONFIG_FILE)
        if not file.is_file() or not self.has_results():
            return
        try:
            before = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{file} cannot be read ({error}); use another run_dir, or --restart") from error
        with contextlib.suppress(ConfigError):  # a key that the folder lacks holds its default there
            before = yaml.safe_load(dump_config(from_values(type(config), before)))
        old, new = flatten(before), flatten(yaml.safe_load(dump_config(config)))
        grows = set(_marked(type(config), "extendable"))
        free = {*_marked(type(config), "adjustable"), *grows}
        # A folder's older default is no change of configuration: nobody asked for either value.
        former = getattr(type(config), "former_defaults", {})
        defaults = flatten(yaml.safe_load(dump_config(type(config)()))) if former else {}
        for key, value in former.items():
            if old.get(key) == value and new[key] == defaults[key]:
                old[key] = new[key]
        meant = [_as_meant(values, type(config)) for values in (old, new)]
        changed = [
            change
            for key in dict.fromkeys([*old, *new])
            if key not in free and meant[0].get(key, ...) != meant[1].get(key, ...)
            for change in _changes(key, old.get(key, ABSENT), new.get(key, ABSENT))
        ]
        if changed:
            raise ConfigError(
                f"{self.folder} was begun with a different configuration:\n  - "
                + "\n  - ".join(changed)
                + "\nEither choose another run_dir=..., or start over with --restart (sets the old folder aside as "
                f"{self.folder.name}.old-N, deletes nothing)."
            )
        for key in sorted(grows & {*old}):
            self._check_length(key, old[key], new[key])

    def has_results(self) -> bool:
        """Whether it holds more than a record: a run that its data stopped at once has made nothing to be kept."""
        record = {self.path(CONFIG_FILE), self.path(RUN_FILE), self.path(LOCK_FILE)}
        return any(path.is_file() and path not in record for path in self.folder.rglob("*"))

    def _check_length(self, key: str, before: int, now: int) -> None:
        """Raises ConfigError where a run cannot be as long as is asked for now."""
        checkpoints = [int(path.name.rsplit("-", 1)[1]) for path in self.path("checkpoints").glob("checkpoint-*")]
        reached = max([0, *checkpoints, *([before] if self.complete else [])])
        if now < before and now < reached:
            raise ConfigError(
                f"{key}: was {before}, is now {now}, but {self.folder} has reached step {reached} already: ask for "
                "no fewer, choose another run_dir=..., or start over with --restart (sets this folder aside)"
            )
        if now > before and self.complete and not checkpoints:
            raise ConfigError(
                f"{key}: was {before}, is now {now}, but {self.path('checkpoints')} holds no checkpoint any more to go "
                f"on from: choose another run_dir=... and start from {self.path('model')}, or keep {key}={before}"
            )

    def done(self, config: Any) -> bool:
        """Whether the run is complete, and this configuration, which `check` has let pass, asks for no more of it."""
        if not self.complete:
            return False
        before = flatten(yaml.safe_load(self.path(CONFIG_FILE).read_text(encoding="utf-8")) or {})
        now = flatten(yaml.safe_load(dump_config(config)))
        return all(now[key] <= before.get(key, now[key]) for key in _marked(type(config), "extendable"))

    def start(self, config: Any, data_fingerprint: str | None = None) -> RunFolder:
        """Open the folder for this configuration and record what runs.

        Args:
            config: the recipe's configuration (a dataclass).
            data_fingerprint: a hash of the input data, for the record.

        Returns:
            itself.

        Raises:
            ConfigError: the folder was begun with a different configuration (the message says which keys differ),
                holds what no run of ours put there, or another process is at work in it.
        """
        self.check(config)
        if not is_main_process():
            return self
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.done(config):
                lock(self.folder)
                atomic_write_text(self.path(CONFIG_FILE), dump_config(config))
                record = describe_run(config) | {"data_fingerprint": data_fingerprint}
                previous = read_json(self.path(RUN_FILE))
                record["starts"] = [*previous.get("starts", []), record.pop("started")]
                atomic_write_text(self.path(RUN_FILE), json.dumps(record, indent=2) + "\n")
        return self

    @property
    def complete(self) -> bool:
        """Whether the run was finished (and with the configuration that the folder now holds)."""
        marker, file = read_json(self.path(COMPLETE_FILE)), self.path(CONFIG_FILE)
        return bool(marker) and file.is_file() and marker.get("config_sha256") == _sha256(file)

    @property
    def summary(self) -> dict[str, Any]:
        """What the finished run reported; empty where it is not finished."""
        return read_json(self.path(COMPLETE_FILE)).get("summary", {}) if self.complete else {}

    @property
    def finished(self) -> str:
        """When the run was finished, ISO 8601 in UTC; empty where it is not."""
        return read_json(self.path(COMPLETE_FILE)).get("finished", "") if self.complete else ""

    def mark_complete(self, summary: dict[str, Any] | None = None) -> None:
        """Write the marker file: the very last thing that a run does."""
        if is_main_process():
            marker = {"config_sha256": _sha256(self.path(CONFIG_FILE)), "finished": now()}
            starts = read_json(self.path(RUN_FILE)).get("starts", [])
            marker |= {"wall_s": wall_seconds(starts, self.metrics, marker["finished"]), "summary": summary or {}}
            atomic_write_text(self.path(COMPLETE_FILE), json.dumps(marker, indent=2) + "\n")
            unlock(self.folder)

    def set_aside(self, own_files: Iterable[str] = (), timeout_s: float = PROCESS_TIMEOUT_S) -> Path | None:
        """Move the whole folder to ``<name>.old-N``; returns where, or None if there was nothing.

        Of several processes the first moves it; the others wait, or they would take the old folder for this run's.
        `timeout_s` is the run's own: who asks for the processes first decides how long they wait for each other.

        Raises:
            ConfigError: the folder is none of ours (`refuse_to_set_aside`, which explains `own_files`), or another
                process is at work in it.
        """
        if is_main_process():
            refuse_to_set_aside(self.folder, own_files)
        target = None
        if is_main_process() and self.folder.exists():
            lock(self.folder)
            unlock(self.folder)  # from here on it is no run of ours
            number = 1
            while (target := self.folder.with_name(f"{self.folder.name}.old-{number}")).exists():
                number += 1
            self.folder.rename(target)
        if process_count() > 1:
            from accelerate import PartialState

            state = PartialState(cpu=resolve_device() == "cpu", timeout=timedelta(seconds=timeout_s))
            state.wait_for_everyone()
        return target


def describe_run(config: Any) -> dict[str, Any]:
    """Versions, commit, machine and seed, as they go into ``run.json``."""
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "recipe": getattr(config, "recipe", type(config).__module__.rsplit(".", 1)[-1].replace("_", "-")),
        "command": _command(),
        "started": now(),
        "seed": getattr(config, "seed", None),
        "commit": git_commit(),
        "versions": versions,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "machine": describe_machine(),
        "processes": process_count(),
    }


def command_text() -> str:
    """What was typed, as a shell takes it."""
    return shlex.join(_command())


def _command() -> list[str]:
    name = Path(sys.argv[0]).name
    return ["slm" if name == "cli.py" else name, *sys.argv[1:]]  # `python -m recipes.cli`, as torchrun takes it


def git_commit() -> str | None:
    """The project's commit, with ``+changes`` where the tree differs from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _marked(config_class: type, mark: str, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields, those of nested configurations too, whose metadata has the mark."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if field.metadata.get(mark):
            yield f"{prefix}{field.name}"
        elif dataclasses.is_dataclass(hints[field.name]):
            yield from _marked(hints[field.name], mark, f"{prefix}{field.name}.")


def _changes(key: str, before: Any, now: Any) -> Iterator[str]:
    """What differs between two values of a key, down to the entry of a list and its own key (``data.1.weight``)."""
    if isinstance(before, list) and isinstance(now, list):
        for number, (old, new) in enumerate(zip_longest(before, now, fillvalue=ABSENT)):
            yield from _changes(f"{key}.{number}", old, new)
    elif isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            yield from _changes(f"{key}.{name}", before.get(name, ABSENT), now.get(name, ABSENT))
    elif before != now:
        yield f"{key}: was {before!r}, is now {now!r}"


def _as_meant(values: dict[str, Any], config_class: type, prefix: str = "") -> dict[str, Any]:
    """Flat values with each null that stands for its sibling's value replaced by it."""
    hints, meant = typing.get_type_hints(config_class), dict(values)
    for field in dataclasses.fields(config_class):
        key = f"{prefix}{field.name}"
        if NULL_MEANS in field.metadata and meant.get(key) is None:
            meant[key] = values.get(f"{prefix}{field.metadata[NULL_MEANS]}")
        elif dataclasses.is_dataclass(hints[field.name]):
            meant = _as_meant(meant, hints[field.name], f"{key}.")
    return meant


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
