"""VERSA's result as measures of the report: means with intervals over the clips, under the names that VERSA gives them.

VERSA writes one JSON object for each utterance: ``key`` and a value for each of its measures. Numbers become measures.
Counts of a recogniser's errors (``whisper_wer_delete``, ``_insert``, ``_replace``, ``_equal``) become one error rate
over the corpus, which a mean of counts or of rates would not be. What is no number, such as a transcript, is named in a
note and left out.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.speech.measures.registry import VERSA_PREFIX
from eval.speech.quality import QualitySummary
from eval.stats import bootstrap_interval, mean_interval
from eval.systems import system_name, task_system
from recipes.config import ConfigError
from recipes.exporting.versa import ABOUT_FILE, SCORES_FILE
from recipes.runs.files import text_lines

COUNTS = re.compile(r"(.+_(?:wer|cer))_(delete|insert|replace|equal)")


@dataclass(frozen=True)
class VersaScores:
    """What VERSA said of one system's speech: utterance id -> measure -> number, None where it is not finite."""

    folder: Path
    task: str
    model: str
    exported: list[str]  # ids that VERSA was given
    lines: dict[str, dict[str, float | None]]
    no_numbers: list[str]  # measures that are left out
    sha256: str


def read_versa(name: str) -> VersaScores:
    """Read VERSA's result from a folder of `slm export-versa`.

    Raises:
        ConfigError: it is no such folder, VERSA has not run yet, a line is not of its form or of another utterance, or
            the predictions have been made anew since.
    """
    folder = Path(name)
    about_file, scores = folder / ABOUT_FILE, folder / SCORES_FILE
    if not about_file.is_file():
        raise ConfigError(f"versa: {folder} holds no {ABOUT_FILE}; `slm export-versa run_dir={folder}` writes it")
    if not scores.is_file():
        raise ConfigError(f"versa: {scores} does not exist; run VERSA with --output_file {scores}")
    about = json.loads(about_file.read_text(encoding="utf-8"))
    predictions = Path(about["predictions"])
    if predictions.is_file() and hashlib.sha256(predictions.read_bytes()).hexdigest() != about["predictions_sha256"]:
        raise ConfigError(f"versa: {predictions} was made anew since {folder} was; export it and run VERSA again")
    lines: dict[str, dict[str, float | None]] = {}
    others: dict[str, None] = {}
    known = set(about["ids"])
    for number, text in enumerate(text_lines(scores), start=1):
        if not text.strip():
            continue
        row = _row(text, f"versa: {scores}, line {number}")
        key = str(row.pop("key"))
        if key not in known:
            raise ConfigError(f"versa: {scores}, line {number}: {key!r} is no utterance of {folder}")
        if key in lines:
            raise ConfigError(f"versa: {scores}, line {number}: {key!r} occurs twice; VERSA appends, so begin anew")
        numbers = {name: _number(value) for name, value in row.items() if _is_number(value)}
        others |= dict.fromkeys(name for name in row if name not in numbers)
        lines[key] = numbers
    if not lines:
        raise ConfigError(f"versa: {scores} is empty; VERSA did not come to its end")
    digest = hashlib.sha256(scores.read_bytes()).hexdigest()
    return VersaScores(folder, about["task"], about["model"], about["ids"], lines, list(others), digest)


def _row(text: str, where: str) -> dict[str, Any]:
    """One line. Older versions of VERSA wrote Python's form of a dictionary."""
    try:
        row = json.loads(text)
    except ValueError:
        try:
            row = ast.literal_eval(re.sub(r"(?<=: )(-?)(?:nan|inf)\b", "None", text))
        except (ValueError, SyntaxError) as error:
            raise ConfigError(f"{where}: neither JSON nor a dictionary") from error
    if not isinstance(row, dict) or "key" not in row:
        raise ConfigError(f"{where}: no `key`, which names the utterance")
    return row


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def summarise_versa(
    scores: VersaScores,
    ids: Sequence[str],
    test_set: str,
    samples: int,
    seed: int,
    speakers: dict[str, str] | None = None,
) -> QualitySummary:
    """The means of one system, each under VERSA's name for it; rates of counted errors in per cent.

    Args:
        scores: what VERSA said.
        ids: the test set's utterances; what VERSA has no line for counts as failed.
        test_set: their name.
        samples: resamples of the bootstrap.
        seed: of it.
        speakers: id -> speaker, to draw speakers and not clips.
    """
    there = [i for i in ids if i in scores.lines]
    names = dict.fromkeys(name for i in there for name in scores.lines[i])
    counted = {match[1] for name in names if (match := COUNTS.fullmatch(name))}
    counted = {name for name in counted if f"{name}_equal" in names}
    values: dict[str, float | None] = {}
    measured: dict[str, int] = {}
    intervals: dict[str, tuple[float, float]] = {}

    def keep(name: str, some: list[str], value: float | None, interval: tuple[float, float] | None) -> None:
        key = VERSA_PREFIX + name
        values[key], measured[key] = value, len(some)
        if interval is not None:
            intervals[key] = interval

    drawing: dict[str, Any] = {"samples": samples, "seed": seed}
    for name in names:
        match = COUNTS.fullmatch(name)
        if match and match[1] in counted:
            if match[2] != "equal":
                continue
            some = [i for i in there if scores.lines[i].get(name) is not None]
            parts = {kind: [_count(scores, i, match[1], kind) for i in some] for kind in _KINDS}
            errors = [sum(parts[kind][at] for kind in ("delete", "insert", "replace")) for at in range(len(some))]
            words = [sum(parts[kind][at] for kind in ("delete", "replace", "equal")) for at in range(len(some))]
            who = [speakers[i] for i in some] if speakers else None
            interval = bootstrap_interval(errors, words, speakers=who, **drawing) if len(some) > 1 else None
            rate = 100 * sum(errors) / sum(words) if sum(words) else None
            keep(f"{match[1]} %", some, rate, interval and (100 * interval[0], 100 * interval[1]))
            continue
        some = [i for i in there if scores.lines[i].get(name) is not None]
        found = [scores.lines[i][name] for i in some]
        who = [speakers[i] for i in some] if speakers else None
        keep(name, some, float(np.mean(found)) if found else None, mean_interval(found, speakers=who, **drawing))
    notes = [f"VERSA: {', '.join(scores.no_numbers)}: no numbers, left out"] if scores.no_numbers else []
    kind = task_system(scores.task)
    return QualitySummary(
        system_name(kind),
        scores.model,
        len(there),
        values,
        measured,
        notes,
        intervals,
        test_set=test_set,
        n_failed=len(ids) - len(there),
        system=kind,
    )


_KINDS = ("delete", "insert", "replace", "equal")


def _count(scores: VersaScores, utterance_id: str, name: str, kind: str) -> int:
    return round(scores.lines[utterance_id].get(f"{name}_{kind}") or 0)


def with_versa(quality: Sequence[QualitySummary], versa: Sequence[QualitySummary]) -> list[QualitySummary]:
    """VERSA's measures beside our own of the same system, or in a line of their own where we measured none."""
    found = list(quality)
    for one in versa:
        at = next((i for i, own in enumerate(found) if (own.system, own.model) == (one.system, one.model)), None)
        if at is None:
            found.append(one)
            continue
        own = found[at]
        found[at] = replace(
            own,
            values=own.values | one.values,
            n_measured=own.n_measured | one.n_measured,
            intervals=own.intervals | one.intervals,
            notes=[*own.notes, *one.notes],
        )
    return found
