"""What `slm evaluate` scores: recordings, what a tokenizer makes of them, and the SLM's predictions.

Shapes: B items, S samples, K books, F frames; waveforms (S,), codes (K, F).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.codes import nominal_bitrate
from recipes.config import ConfigError
from recipes.encode_audio import encode_batch
from recipes.progress import progress
from recipes.runtime import log
from tokenizer.data import AudioError, Utterance, load_audio
from tokenizer.precision import LOWER

PREDICTIONS_FILE, SIDECAR_FILE = "predictions.jsonl", "predictions.json"
# Folder names that say what a model is but not which one: a label takes the folder above along.
STAGES = ("train-teacher", "train-tokenizer", "train-lm", "finetune", "teacher", "tokenizer", "lm", "slm")


@dataclass
class System:
    """One thing to score. ``audios`` (to be read by judges) or ``texts`` (the SLM's own): utterance id -> value.

    None stands where the system failed. ``facts`` are further fields of :class:`eval.schema.Row`.
    """

    name: str
    kind: str
    model: str
    sampling_rate: int = 0
    audios: dict[str, np.ndarray | None] = field(default_factory=dict)
    texts: dict[str, str | None] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None  # of the tokenizer that the audio went through


@dataclass
class Predictions:
    """The lines of one ``predictions.jsonl`` and what its sidecar says of how they were made."""

    path: Path
    task: str
    lines: dict[str, dict[str, Any]]
    sidecar: dict[str, Any]

    @property
    def model(self) -> str:
        return model_label(str(self.sidecar.get("model", self.path.parent.name)))

    def reference(self, utterance_id: str) -> str:
        line = self.lines[utterance_id]
        return str(line["reference"] if self.task == "asr" else line["text"])


def model_label(name: str) -> str:
    """A short name of a model for tables.

    Of ``runs/nano-12.5/model`` that is "nano-12.5"; of a pipeline's stage, ``runs/quickstart/finetune/model``, it is
    "quickstart/finetune".
    """
    path = Path(name)
    if not path.exists():
        return name
    parts = [part for part in path.resolve().parts if part not in ("model", "/")]
    return "/".join(parts[-2:] if parts and parts[-1] in STAGES else parts[-1:]) or name


def read_predictions(name: str) -> Predictions:
    """Read what ``slm transcribe`` or ``slm synthesize`` wrote, from its folder or the file itself.

    Raises:
        ConfigError: the file is missing, empty, torn, of an unknown task, or has an id twice.
    """
    path = Path(name) / PREDICTIONS_FILE if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ConfigError(f"predictions: {path} does not exist; `slm transcribe` and `slm synthesize` write it")
    lines: dict[str, dict[str, Any]] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            utterance_id, task = str(line["id"]), line["task"]
            needed = {"asr": ("reference", "hypothesis"), "tts": ("text", "audio")}[task]
            missing = [key for key in needed if key not in line]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"predictions: {path}, line {number}: not a prediction ({error!r})") from error
        if missing:
            raise ConfigError(f"predictions: {path}, line {number}: {', '.join(missing)} is missing")
        if utterance_id in lines:
            raise ConfigError(f"predictions: {path}, line {number}: id {utterance_id!r} occurs twice")
        lines[utterance_id] = line
    tasks = {line["task"] for line in lines.values()}
    if len(tasks) != 1:
        raise ConfigError(f"predictions: {path} holds {len(tasks)} tasks; write one file for each of asr and tts")
    sidecar = path.with_name(SIDECAR_FILE)
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else {}
    except ValueError as error:
        raise ConfigError(
            f"predictions: {sidecar}: not readable as JSON ({error}); make the predictions anew"
        ) from error
    return Predictions(path, tasks.pop(), lines, facts)


def predictions_sha256(predictions: Predictions) -> str:
    """Digest of the file, to notice that it was made anew."""
    return hashlib.sha256(predictions.path.read_bytes()).hexdigest()


def precision_of(tokenizer: Any, fingerprints: Iterable[str | None]) -> str:
    """The precision in which a tokenizer makes the codes of these fingerprints; fp32 where there is none or none fits.

    What is made from codes is compared with what the same codes give, so it is the codes that decide.
    """
    given = set(fingerprints)
    return next((name for name in ("fp32", *LOWER) if tokenizer.fingerprint(name) in given), "fp32")


def load_recordings(utterances: Sequence[Utterance], sampling_rate: int, strict: bool) -> tuple[System, list[str]]:
    """The recordings themselves, and a note for each that cannot be read (with ``strict`` the first one raises)."""
    system = System("ground truth", "ground_truth", "", sampling_rate)
    notes = []
    for utterance in progress(utterances, "recordings", total=len(utterances)):
        try:
            system.audios[utterance.id] = load_audio(utterance, sampling_rate)
        except AudioError as error:
            if strict:
                raise
            log.warning("counted as failed: %s", error)
            notes.append(f"counted as failed: {error}")
            system.audios[utterance.id] = None
    return system, notes


def batches_of(audios: dict[str, np.ndarray], batch_samples: float) -> list[list[str]]:
    """Ids in batches of clips of like length, none above ``batch_samples`` with its padding (one clip may be)."""
    batches: list[list[str]] = []
    for name in sorted(audios, key=lambda name: (len(audios[name]), name)):
        if batches and (len(batches[-1]) + 1) * len(audios[name]) <= batch_samples:
            batches[-1].append(name)
        else:
            batches.append([name])
    return batches


def codec_systems(
    tokenizer: Any, label: str, recordings: System, batch_seconds: float, precision: str, device: str
) -> tuple[list[System], list[np.ndarray]]:
    """Encode every recording once, and decode it in the ways that the tokenizer has.

    Returns:
        Reconstruction (main decoder, all books), semantic reconstruction (main decoder, book 0) and resynthesis
        (auxiliary decoder, book 0), each with its cost; and the codes (K, F) of every recording that could be read.
    """
    config = tokenizer.config
    rate, frame_rate, sizes = config.sampling_rate, config.frame_rate, list(config.codebook_sizes)
    fingerprint = tokenizer.fingerprint(precision)
    known: dict[str, tuple[int, Callable[[torch.Tensor], Any]]] = {
        "reconstruction": (len(sizes), lambda codes: tokenizer.decode(codes)),
        "semantic_reconstruction": (1, lambda codes: tokenizer.decode(codes[:, :1])),
        "resynthesis": (1, lambda codes: tokenizer.resynthesize(codes)),
    }
    ways = [
        (kind, n_books, config.auxiliary_sampling_rate if kind == "resynthesis" else rate, decode)
        for kind, (n_books, decode) in known.items()
        if kind in tokenizer.ways_back
    ]
    systems = [
        System(kind.replace("_", " "), kind, label, way_rate, fingerprint=fingerprint) for kind, _, way_rate, _ in ways
    ]
    readable = {name: audio for name, audio in recordings.audios.items() if audio is not None}
    walls = [0.0] * len(ways)
    all_codes: list[np.ndarray] = []
    batches = batches_of(readable, batch_seconds * rate)
    for batch in progress(batches, f"{label}: encode, decode", total=len(batches)):
        started = time.perf_counter()
        codes = encode_batch(tokenizer, [readable[name] for name in batch], precision, device)
        encode_s = time.perf_counter() - started
        all_codes += codes
        padded = torch.full((len(batch), len(sizes), max(c.shape[1] for c in codes)), -1, dtype=torch.int64)
        for row, item in enumerate(codes):
            padded[row, :, : item.shape[1]] = torch.from_numpy(item)
        for i, (_, _, way_rate, decode) in enumerate(ways):
            started = time.perf_counter()
            with torch.inference_mode():
                values = decode(padded.to(device)).audio_values[:, 0].float().cpu().numpy()
            walls[i] += encode_s + time.perf_counter() - started
            for row, name in enumerate(batch):
                audio = values[row, : -(-len(readable[name]) * way_rate // rate)].copy()
                systems[i].audios[name] = audio if np.isfinite(audio).all() else None
    seconds = sum(len(audio) for audio in readable.values()) / rate
    for i, (_, n_books, _, _) in enumerate(ways):
        systems[i].audios |= {name: None for name in recordings.audios if name not in readable}
        systems[i].facts = {
            "frame_rate_hz": float(frame_rate),
            "tokens_per_second": float(frame_rate) * n_books,
            "bitrate_bps": nominal_bitrate(frame_rate, sizes[:n_books]),
            "wall_s": walls[i],
            "real_time_factor": walls[i] / seconds if seconds else None,
        }
    return systems, all_codes


def predicted_system(predictions: Predictions, ids: Sequence[str], sampling_rate: int) -> tuple[System, list[str]]:
    """The SLM's answers for the test set; an utterance without an answer counts as failed.

    Returns:
        The system, its ASR texts or TTS waveforms at ``sampling_rate``; and notes on what failed.
    """
    facts, notes = predictions.sidecar, []
    names = {"asr": "SLM ASR", "tts": "SLM TTS"}
    system = System(names[predictions.task], predictions.task, predictions.model, sampling_rate)
    system.fingerprint = facts.get("fingerprint")
    system.facts = {key: facts[key] for key in ("real_time_factor", "wall_s") if facts.get(key) is not None}
    if facts.get("frame_rate") is not None:
        system.facts["frame_rate_hz"] = facts["frame_rate"]
        system.facts["tokens_per_second"] = facts["frame_rate"] * facts.get("n_codebooks", 1)
    system.facts["generation"] = {k: v for k, v in facts.items() if k not in ("real_time_factor", "wall_s", "audio_s")}
    system.facts["n_truncated"] = sum(
        bool(predictions.lines[i].get("truncated")) for i in ids if i in predictions.lines
    )
    absent = [i for i in ids if i not in predictions.lines]
    if absent:
        notes.append(f"{predictions.path}: no prediction for {len(absent)} of {len(ids)} utterances, counted as failed")
    if outside := len(predictions.lines) - (len(ids) - len(absent)):
        notes.append(f"{predictions.path}: {outside} further predictions are not of these utterances, not scored")
    for utterance_id in ids:
        line = predictions.lines.get(utterance_id, {"error": "no prediction"})
        if predictions.task == "asr":
            system.texts[utterance_id] = None if line.get("error") else line.get("hypothesis")
            continue
        system.audios[utterance_id] = None
        if not line.get("error") and line.get("audio"):
            try:
                file = predictions.path.parent / line["audio"]
                system.audios[utterance_id] = load_audio(file, sampling_rate)
            except AudioError as error:
                notes.append(f"counted as failed: {error}")
    errors = [i for i in ids if predictions.lines.get(i, {}).get("error")]
    if errors:
        example = f"{errors[0]}: {predictions.lines[errors[0]]['error']}"
        notes.append(
            f"{predictions.path}: {len(errors)} of {len(ids)} utterances have no answer, counted as failed ({example})"
        )
    for note in notes:
        log.warning("%s", note)
    return system, notes
