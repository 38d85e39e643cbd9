"""What `slm evaluate` scores: recordings, what a tokenizer makes of them, and the SLM's predictions.

Audio comes a batch at a time, as :class:`SystemAudio`, and is gone with it: memory does not grow with the test set.

Shapes: B items, S samples, K books, F frames; waveforms (S,), codes (K, F).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from eval.codes import nominal_bitrate
from eval.schema import system_name, task_system
from eval.speech.audio import length_batches
from recipes.config import ConfigError
from recipes.encoding.encoder import encode_batch
from recipes.encoding.plan import durations_of
from recipes.inference.predictions import FAULTS
from recipes.inference.speech_files import padded
from recipes.runs.files import text_lines
from recipes.runs.logs import log
from recipes.runs.machine import describe_machine, machine_text
from recipes.runs.progress import progress
from recipes.scoring.acoustic import SpeakerVoices
from tokenizer.data.audio import load_audio
from tokenizer.data.utterances import AudioError, Utterance
from tokenizer.long_form.chunking import decode_latents_long, decode_long, resynthesize_long
from tokenizer.precision import LOWER

PREDICTIONS_FILE, SIDECAR_FILE = "predictions.jsonl", "predictions.json"
# Folder names that say what a model is but not which one: a label takes the folder above along.
STAGES = ("train-teacher", "train-tokenizer", "train-lm", "finetune", "teacher", "tokenizer", "lm", "slm")

ANSWERS = {"asr": "text", "tts": "speech"}  # of predictions that do not say it
ANSWER_KEYS = {"text": ("reference", "hypothesis"), "speech": ("text", "audio")}  # of a line
GENERATION_ONLY = "generation only"  # a real-time factor that leaves the tokenizer's part out


@dataclass
class System:
    """One thing to score: audio that judges read, or ``texts``, the SLM's own: utterance id -> text, None: failed.

    ``transcripts``: judge -> utterance id -> its transcript. ``facts`` are further fields of :class:`eval.schema.Row`.
    ``answers`` says which of the two. ``references``: utterance id -> what it is scored against, where those are not
    the test set's texts but another ``column``; empty texts, and no column, where nothing is known that it should say.
    ``translates``: whether its texts are translations.
    """

    name: str
    kind: str
    model: str
    sampling_rate: int = 0
    answers: Literal["text", "speech"] = "speech"
    column: str = "text"
    references: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str | None] = field(default_factory=dict)
    transcripts: dict[str, dict[str, str | None]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None  # of the tokenizer that the audio went through
    translates: bool = False

    @property
    def codes_per_second(self) -> float | None:
        """Of all books: more than the LLM reads in a second, where several stand at one of its positions."""
        made = self.facts.get("generation", {})
        if made.get("frame_rate") is None:
            return self.facts.get("tokens_per_second")
        return made["frame_rate"] * made.get("n_codebooks", 1)


@dataclass(frozen=True)
class SystemAudio:
    """Waveforms (S,) of one system, by utterance id; the ``recordings`` that they were made from, where there are any.

    A system that failed on an utterance has no waveform of it.
    """

    system: System
    audios: dict[str, np.ndarray]
    recordings: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Predictions:
    """The lines of one ``predictions.jsonl`` and what its sidecar says of how they were made.

    ``answers`` is what the task answers in, ``column`` what its reference is: the utterance's text, or another column
    of the corpus; empty where it has none.
    """

    path: Path
    task: str
    answers: Literal["text", "speech"]
    lines: dict[str, dict[str, Any]]
    sidecar: dict[str, Any]

    @property
    def column(self) -> str:
        return str(self.sidecar.get("reference", "text") or "")

    @property
    def model(self) -> str:
        return model_label(str(self.sidecar.get("model", self.path.parent.name)))

    def reference(self, utterance_id: str) -> str:
        """The text that the answer is scored against."""
        return str(self.lines[utterance_id][ANSWER_KEYS[self.answers][0]])


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
        ConfigError: the file is missing, empty or torn, has an id twice, or is of several tasks or of one that does not
            say what it answers in.
    """
    path = Path(name) / PREDICTIONS_FILE if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ConfigError(f"predictions: {path} does not exist; `slm transcribe` and `slm synthesize` write it")
    sidecar = _read_sidecar(path.with_name(SIDECAR_FILE))
    lines: dict[str, dict[str, Any]] = {}
    for number, text in enumerate(text_lines(path), start=1):
        try:
            line = json.loads(text)
            utterance_id, task = str(line["id"]), line["task"]
            answers = ANSWERS.get(task) or sidecar.get("answers")
            missing = [key for key in ANSWER_KEYS.get(answers, ()) if key not in line]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"predictions: {path}, line {number}: not a prediction ({error!r})") from error
        if missing:
            raise ConfigError(f"predictions: {path}, line {number}: {', '.join(missing)} is missing")
        if answers not in ANSWER_KEYS:
            raise ConfigError(
                f"predictions: {path}, line {number}: whether task {task!r} answers in text or speech is not known; "
                f"`answers` in {SIDECAR_FILE} beside it says so, which `slm transcribe` and `slm synthesize` write"
            )
        if utterance_id in lines:
            raise ConfigError(f"predictions: {path}, line {number}: id {utterance_id!r} occurs twice")
        lines[utterance_id] = line
    tasks = {line["task"] for line in lines.values()}
    if len(tasks) != 1:
        raise ConfigError(f"predictions: {path} holds {len(tasks)} tasks; write one file for each, such as asr and tts")
    return Predictions(path, task, answers, lines, sidecar)


def _read_sidecar(path: Path) -> dict[str, Any]:
    """How predictions were made; empty where nothing says it. Raises ConfigError where the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"predictions: {path}: not readable as JSON ({error}); make the predictions anew") from error


def predictions_sha256(predictions: Predictions) -> str:
    """Digest of the file, to notice that it was made anew."""
    return hashlib.sha256(predictions.path.read_bytes()).hexdigest()


def precision_of(tokenizer: Any, fingerprints: Iterable[str | None]) -> str:
    """The precision in which a tokenizer makes the codes of these fingerprints; fp32 where there is none or none fits.

    What is made from codes is compared with what the same codes give, so it is the codes that decide.
    """
    given = set(fingerprints)
    return next((name for name in ("fp32", *LOWER) if tokenizer.fingerprint(name) in given), "fp32")


class Recordings:
    """The recordings themselves.

    Args:
        utterances: the test set.
        sampling_rate: the rate to read them at, in Hz.
        batch_seconds: padded audio of a batch; a longer recording is alone in its batch.
        strict: raise at the first that cannot be read.

    Attributes:
        readable: ids whose header can be read.
        notes: on each that cannot be used, by id.
    """

    def __init__(self, utterances: Sequence[Utterance], sampling_rate: int, batch_seconds: float, strict: bool) -> None:
        self.system = System("ground truth", "ground_truth", "", sampling_rate)
        self.strict, self.batch_seconds, self.notes = strict, batch_seconds, {}
        self.utterances = utterances
        self.durations = durations_of(utterances, n_threads=2)
        self.readable = [u.id for u, duration in zip(utterances, self.durations, strict=True) if duration]

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Waveforms by id, of like length. Raises AudioError with ``strict``."""
        most = self.batch_seconds * self.system.sampling_rate
        plan = length_batches(self.durations, self.batch_seconds)
        for planned in progress(plan, "recordings", len(plan)):
            audios = {}
            for utterance in (self.utterances[i] for i in planned):
                try:
                    audios[utterance.id] = load_audio(utterance, self.system.sampling_rate)
                except AudioError as error:
                    if self.strict:
                        raise
                    log.warning("counted as failed: %s", error)
                    self.notes[utterance.id] = f"counted as failed: {error}"
            # A manifest's durations may be wrong: what was read decides.
            names = list(audios)
            for batch in length_batches([len(audios[name]) for name in names], most):
                yield {names[i]: audios[names[i]] for i in batch}

    def read(self, ids: Iterable[str]) -> dict[str, np.ndarray]:
        """Waveforms (S,) of these utterances once more, after `batches`; without those that could not be read."""
        wanted = {*ids} & {*self.readable} - {*self.notes}
        return {u.id: load_audio(u, self.system.sampling_rate) for u in self.utterances if u.id in wanted}


class CodecSystems:
    """What a tokenizer makes of recordings: each encoded once, and decoded in the ways that the tokenizer has.

    Reconstruction (main decoder, all books), semantic reconstruction (main decoder, book 0), with `voices` the acoustic
    stage (main decoder, book 0 and what the stage fills in the speaker's voice) and resynthesis (auxiliary
    decoder, book 0), in ``systems``, each with its cost; ``codes`` (K, F) of every recording.

    Args:
        tokenizer: any tokenizer behind the codec protocol, on ``device``.
        label: its name in tables.
        chunk_s: longer recordings go through in chunks, where the tokenizer allows it.
        precision: of the encoder.
        device: where the tokenizer is.
        voices: an acoustic stage; None: no such row.
    """

    def __init__(
        self,
        tokenizer: Any,
        label: str,
        chunk_s: float,
        precision: str,
        device: str,
        voices: SpeakerVoices | None = None,
    ) -> None:
        self.voices = voices
        self.tokenizer, self.chunk_s, self.precision, self.device = tokenizer, chunk_s, precision, device
        config, fingerprint = tokenizer.config, tokenizer.fingerprint(precision)
        kinds = ("reconstruction", "semantic_reconstruction", "acoustic_stage", "resynthesis")
        self.systems = [
            System(
                kind.replace("_", " "),
                kind,
                label,
                config.auxiliary_sampling_rate if kind == "resynthesis" else config.sampling_rate,
                fingerprint=fingerprint,
            )
            for kind in kinds
            if kind in tokenizer.decode_paths or (kind == "acoustic_stage" and voices is not None)
        ]
        self.codes: list[np.ndarray] = []
        self._audio_s = self._encode_s = 0.0
        self._decode_s = dict.fromkeys((system.kind for system in self.systems), 0.0)

    def audio_batches(self, recordings: dict[str, np.ndarray]) -> Iterator[SystemAudio]:
        """Each way's audio of one batch of recordings, one way after the other."""
        rate = self.tokenizer.config.sampling_rate
        started = time.perf_counter()
        waveforms = list(recordings.values())
        codes = encode_batch(self.tokenizer, waveforms, self.precision, self.device, chunk_s=self.chunk_s)
        self._encode_s += time.perf_counter() - started
        self._audio_s += sum(map(len, waveforms)) / rate
        self.codes += [item.astype(np.int32) for item in codes]  # all are kept: half of int64
        frames, _ = padded(codes)
        for system in self.systems:
            started = time.perf_counter()
            kept = recordings
            if system.kind == "acoustic_stage":
                filled = self.voices.filled(list(recordings), codes)
                kept = {name: recordings[name] for name in filled}
                if not kept:
                    continue
                values = self._decode_filled(list(filled.values()))
            else:
                values = self._decode(system.kind, frames)
            self._decode_s[system.kind] += time.perf_counter() - started
            audios = {}
            for row, (name, waveform) in enumerate(kept.items()):
                audio = values[row, : -(-len(waveform) * system.sampling_rate // rate)].copy()
                if np.isfinite(audio).all():
                    audios[name] = audio
            yield SystemAudio(system, audios, recordings)

    @torch.inference_mode()
    def _decode(self, kind: str, codes: torch.Tensor) -> np.ndarray:
        """Codes (B, K, F) to waveforms (B, S)."""
        if kind == "resynthesis":
            output = resynthesize_long(self.tokenizer, codes, self.chunk_s)
        else:
            books = codes[:, :1] if kind == "semantic_reconstruction" else codes
            output = decode_long(self.tokenizer, books, self.chunk_s)
        return output.audio_values[:, 0].float().cpu().numpy()

    @torch.inference_mode()
    def _decode_filled(self, filled: Sequence[np.ndarray]) -> np.ndarray:
        """All codes (K, F), or the latents (D, F) in their place, of what a stage filled, to waveforms (B, S)."""
        frames, mask = padded(filled)
        if frames.is_floating_point():
            output = decode_latents_long(self.tokenizer, frames, mask, self.chunk_s)
            return output.audio_values[:, 0].float().cpu().numpy()
        return self._decode("acoustic_stage", frames)

    def finish(self) -> None:
        """Fill in each system's cost, when every batch went through."""
        config, machine = self.tokenizer.config, machine_text({"machine": describe_machine()})
        for system in self.systems:
            sizes = list(config.codebook_sizes)[: None if system.kind == "reconstruction" else 1]
            decode_s = self._decode_s[system.kind]
            system.facts = {
                "frame_rate_hz": float(config.frame_rate),
                "tokens_per_second": float(config.frame_rate) * len(sizes),
                "bitrate_bps": nominal_bitrate(config.frame_rate, sizes),
                "encode_s": self._encode_s,
                "decode_s": decode_s,
                "audio_s": self._audio_s,
                "wall_s": self._encode_s + decode_s,
                "real_time_factor": (self._encode_s + decode_s) / self._audio_s if self._audio_s else None,
                "timed": "encode + decode",
                "machine": machine,
            }


def predicted_audio(
    predictions: Predictions, system: System, ids: Sequence[str], batch_seconds: float, notes: list[str]
) -> Iterator[SystemAudio]:
    """The waveforms that the SLM answered with, some seconds at a time; one that cannot be read is noted and counts as
    failed.
    """
    audios: dict[str, np.ndarray] = {}
    for utterance_id in ids:
        line = predictions.lines.get(utterance_id, {})
        if line.get("error") or not line.get("audio"):
            continue
        try:
            audios[utterance_id] = load_audio(predictions.path.parent / line["audio"], system.sampling_rate)
        except AudioError as error:
            log.warning("counted as failed: %s", error)
            notes.append(f"counted as failed: {error}")
        if sum(map(len, audios.values())) >= batch_seconds * system.sampling_rate:
            yield SystemAudio(system, audios)
            audios = {}
    if audios:
        yield SystemAudio(system, audios)


def count_faults(found: Iterable[Sequence[str]]) -> dict[str, int]:
    """How many of these answers have each fault."""
    found = list(found)
    return {name: sum(name in faults for faults in found) for name in FAULTS}


def predicted_system(
    predictions: Predictions, ids: Sequence[str], sampling_rate: int, column: str = "text"
) -> tuple[System, list[str]]:
    """The SLM's answers for the test set; an utterance without an answer counts as failed.

    Args:
        predictions: what it answered.
        ids: the utterances of the test set.
        sampling_rate: to read speech at, in Hz.
        column: what the test set's texts are; predictions with another reference bring their own.

    Returns:
        The system, with its texts where it answers in text (`predicted_audio` reads speech); and notes on what failed.
    """
    facts, notes = predictions.sidecar, []
    kind = task_system(predictions.task)
    system = System(system_name(kind), kind, predictions.model, sampling_rate, predictions.answers)
    system.fingerprint = facts.get("fingerprint")
    system.translates = facts.get("scored_by") == "bleu"
    system.column = predictions.column
    if predictions.column != column:
        system.references = {i: predictions.reference(i) for i in ids if i in predictions.lines}
    times = ("encode_s", "generate_s", "decode_s", "audio_s", "wall_s", "real_time_factor", "timed", "machine")
    system.facts = {key: facts[key] for key in times if facts.get(key) is not None}
    if str(facts.get("timed", "")).startswith("the LLM alone"):  # as earlier predictions say it
        system.facts["timed"] = GENERATION_ONLY
    if facts.get("frame_rate") is not None:
        system.facts["frame_rate_hz"] = facts["frame_rate"]
        codes_per_s = facts["frame_rate"] * facts.get("n_codebooks", 1)
        system.facts["tokens_per_second"] = facts.get("positions_per_s", codes_per_s)
    system.facts["generation"] = {key: value for key, value in facts.items() if key not in times}
    system.facts["n_truncated"] = sum(
        bool(predictions.lines[i].get("truncated")) for i in ids if i in predictions.lines
    )
    found = [predictions.lines[i]["faults"] for i in ids if "faults" in predictions.lines.get(i, {})]
    if found:
        system.facts["faults"] = count_faults(found)
    absent = [i for i in ids if i not in predictions.lines]
    if absent:
        what = "not scored" if system.references else "counted as failed"
        notes.append(f"{predictions.path}: no prediction for {len(absent)} of {len(ids)} utterances, {what}")
    if outside := len(predictions.lines) - (len(ids) - len(absent)):
        notes.append(f"{predictions.path}: {outside} further predictions are not of these utterances, not scored")
    if predictions.answers == "text":
        lines = {i: predictions.lines.get(i, {}) for i in ids}
        system.texts = {i: None if line.get("error") else line.get("hypothesis") for i, line in lines.items()}
    errors = [i for i in ids if predictions.lines.get(i, {}).get("error")]
    if errors:
        example = f"{errors[0]}: {predictions.lines[errors[0]]['error']}"
        notes.append(
            f"{predictions.path}: {len(errors)} of {len(ids)} utterances have no answer, counted as failed ({example})"
        )
    for note in notes:
        log.warning("%s", note)
    return system, notes
