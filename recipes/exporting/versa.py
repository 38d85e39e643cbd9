"""The files that VERSA reads: lists of audio and texts in Kaldi's form, an id and its value on each line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import soundfile

from recipes.config import ConfigError
from recipes.runs.files import atomic_write_text, disk_errors
from recipes.scoring.predictions import Predictions, predictions_sha256
from tokenizer.data.audio import load_audio
from tokenizer.data.utterances import AudioError, Utterance

PRED_FILE, GT_FILE, TEXT_FILE = "pred.scp", "gt.scp", "text"
ABOUT_FILE, SCORES_FILE = "versa.json", "scores.jsonl"
RECORDINGS = "recordings"  # folder of those that are copied


@dataclass
class Export:
    """What goes to VERSA: id -> file and id -> text, and why other utterances do not."""

    audio: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def plan_export(predictions: Predictions, recordings: Mapping[str, Utterance]) -> Export:
    """Which utterances go to VERSA.

    Args:
        predictions: of speech.
        recordings: id -> the recording, where measures are to compare with it; empty: none.

    Raises:
        ConfigError: the predictions are texts, an id or a path has no place on a line of Kaldi's form, an answer's
            recording is missing, or nothing is left.
    """
    if predictions.answers != "speech":
        raise ConfigError(f"predictions: {predictions.path} holds texts ({predictions.task}); VERSA measures speech")
    found = Export()
    for utterance_id, line in predictions.lines.items():
        if not utterance_id or any(character.isspace() for character in utterance_id):
            raise ConfigError(
                f"predictions: {predictions.path}: id {utterance_id!r} has a space, which ends a Kaldi id"
            )
        if line.get("error") or not line.get("audio"):
            found.left_out[utterance_id] = f"no answer ({line.get('error') or 'no audio'})"
            continue
        path = (predictions.path.parent / line["audio"]).resolve()
        if not path.is_file():
            found.left_out[utterance_id] = f"{path} does not exist"
            continue
        if "\n" in str(path) or str(path) != str(path).strip() or str(path).endswith("|"):
            raise ConfigError(f"predictions: {path} cannot stand on a line of {PRED_FILE}; move it")
        text = " ".join(predictions.reference(utterance_id).split())
        if not text:
            found.left_out[utterance_id] = "no text, at which VERSA stops"
            continue
        found.audio[utterance_id], found.texts[utterance_id] = path, text
    if not found.audio:
        raise ConfigError(f"predictions: {predictions.path} has no audio with a text to measure")
    if recordings and (missing := [i for i in found.audio if i not in recordings]):
        raise ConfigError(
            f"data: there is no recording of {len(missing)} of {len(found.audio)} utterances, such as {missing[0]!r}; "
            "give the data (and split) that the predictions were made from"
        )
    return found


def write_export(
    folder: Path, predictions: Predictions, export: Export, recordings: Mapping[str, Utterance], sampling_rate: int
) -> None:
    """Write the files, ``versa.json`` last; the predictions stay where they are.

    Args:
        folder: where to.
        predictions: what they are of.
        export: of :func:`plan_export`.
        recordings: as there.
        sampling_rate: Hz of recordings that are copied, since VERSA reads files.

    Raises:
        ConfigError: a recording cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / PRED_FILE, _lines(export.audio))
    atomic_write_text(folder / TEXT_FILE, _lines(export.texts))
    if recordings:
        named = {i: _recording(recordings[i], i, folder / RECORDINGS, sampling_rate) for i in export.audio}
        atomic_write_text(folder / GT_FILE, _lines(named))
    about = {
        "predictions": str(predictions.path.resolve()),
        "predictions_sha256": predictions_sha256(predictions),
        "task": predictions.task,
        "model": predictions.model,
        "ids": list(export.audio),
        "left_out": export.left_out,
    }
    atomic_write_text(folder / ABOUT_FILE, json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def _lines(values: Mapping[str, object]) -> str:
    return "".join(f"{key} {value}\n" for key, value in sorted(values.items()))


def _recording(utterance: Utterance, utterance_id: str, folder: Path, sampling_rate: int) -> Path:
    """The recording's own file, or a copy where it lies inside another one."""
    if isinstance(utterance.audio, str) and (own := Path(utterance.audio).resolve()).is_file():
        return own
    folder.mkdir(parents=True, exist_ok=True)
    target = (folder / f"{utterance_id.replace('/', '_')}.wav").resolve()
    try:
        audio = load_audio(utterance, sampling_rate)
        with disk_errors(target):
            soundfile.write(target, audio, sampling_rate, subtype="PCM_16")
    except AudioError as error:
        raise ConfigError(f"data: {error}") from error
    return target
