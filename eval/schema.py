"""What an evaluation leaves behind: rows with their protocol, in ``results.json``.

A row is one system on one test set under one protocol. Rows may be compared only where judge, normaliser, aggregation
and test set agree: :func:`compare_rows` refuses anything else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from eval.codes import CodeStatistics
from eval.speech import QualitySummary
from eval.stats import PairedDifference, bootstrap_interval, paired_bootstrap
from eval.wer import ErrorRates, UtteranceErrors

__all__ = [
    "RESULTS_FILE",
    "SCHEMA_VERSION",
    "SYSTEMS",
    "SYSTEM_NAMES",
    "Clip",
    "Contrast",
    "Difference",
    "Protocol",
    "Results",
    "Row",
    "Sample",
    "TestSet",
    "compare_rows",
    "load_results",
    "make_row",
    "merge_results",
    "refuse_other_protocol",
    "save_results",
    "test_set_sha256",
]

SCHEMA_VERSION = 1
RESULTS_FILE = "results.json"
# Kinds of system, in the order of tables.
SYSTEM_NAMES = {
    "ground_truth": "ground truth",
    "reconstruction": "reconstruction",
    "semantic_reconstruction": "semantic reconstruction",
    "resynthesis": "resynthesis",
    "tts": "SLM TTS",
    "asr": "SLM ASR",
}
SYSTEMS = tuple(SYSTEM_NAMES)


@dataclass(frozen=True)
class TestSet:
    """Which utterances were scored; ``sha256`` covers their ids and texts."""

    name: str
    sha256: str
    n: int


@dataclass(frozen=True)
class Protocol:
    """Under which conditions a score holds.

    ``task`` is "speech" (a judge reads audio) or "asr" (the system's own transcript of the recordings, no judge).
    ``judge`` is the identity of :class:`eval.judge.Judge`, decoding settings included; empty for "asr".
    """

    task: str
    judge: dict[str, Any]
    normaliser: str
    normaliser_version: str
    test_set: TestSet
    aggregation: str = "corpus"
    seed: int = 0
    bootstrap_samples: int = 10_000

    def comparable_by(self) -> dict[str, Any]:
        """What has to be equal for two scores to be compared. A judge with the same weights may have another name."""
        judge = {k: v for k, v in self.judge.items() if k != "name" or "weights_sha256" not in self.judge}
        return {
            "task": self.task,
            "judge": judge,
            "normaliser": (self.normaliser, self.normaliser_version),
            "aggregation": self.aggregation,
            "test set": (self.test_set.sha256, self.test_set.n),
        }

    def key(self) -> str:
        """Equal for comparable protocols."""
        return json.dumps(self.comparable_by(), sort_keys=True)


@dataclass(frozen=True)
class Difference:
    """A row's WER minus that of the row named ``against``, on the same utterances (paired bootstrap)."""

    against: str
    wer: float
    interval: tuple[float, float]
    p_value: float


@dataclass(frozen=True)
class Contrast:
    """Mean WER of the cells ``a`` minus that of the cells ``b``, in one kind of row; a group's cells differ in seed.

    ``judge`` is empty for the SLM's own transcripts. ``wers_a`` and ``wers_b`` stand in the order of the cells.
    ``interval`` and ``p_value`` are those of :func:`eval.stats.pooled_bootstrap`.
    """

    name: str
    system: str
    judge: str
    a: list[str]
    b: list[str]
    wers_a: list[float]
    wers_b: list[float]
    difference: float
    interval: tuple[float, float]
    p_value: float
    smallest_detectable: float | None
    n_utterances: int
    n_words: int
    bootstrap_samples: int
    seed: int


@dataclass
class Row:
    """One system's scores. ``interval`` is that of the WER; rates are fractions, not per cent.

    ``n_scored`` + ``n_failed`` utterances count; a failed one counts as all its words deleted. ``n_truncated`` of the
    scored ones were cut off at a length limit.

    ``real_time_factor`` is ``wall_s / audio_s`` on ``machine``; ``timed`` says of which parts ``wall_s`` is the sum: of
    ASR encode + generate for the seconds heard, of TTS generate + decode for the seconds spoken, of a tokenizer encode
    + decode.
    """

    name: str
    system: str
    model: str
    protocol: Protocol
    wer: float | None
    cer: float | None
    interval: tuple[float, float] | None
    substitutions: int
    deletions: int
    insertions: int
    n_words: int
    n_scored: int
    n_failed: int
    n_truncated: int | None = None
    frame_rate_hz: float | None = None
    tokens_per_second: float | None = None
    bitrate_bps: float | None = None
    real_time_factor: float | None = None
    wall_s: float | None = None
    encode_s: float | None = None
    generate_s: float | None = None
    decode_s: float | None = None
    audio_s: float | None = None
    timed: str = ""
    machine: str = ""
    generation: dict[str, Any] = field(default_factory=dict)
    difference: Difference | None = None
    utterances: list[UtteranceErrors] = field(default_factory=list, repr=False)


@dataclass
class Clip:
    """One player of the report: ``audio`` is a path (in ``results.json`` relative to it), ``heard`` judge -> text."""

    label: str
    audio: str
    heard: dict[str, str] = field(default_factory=dict)


@dataclass
class Sample:
    """One utterance to listen to, through several systems."""

    id: str
    text: str
    clips: list[Clip] = field(default_factory=list)


@dataclass
class Results:
    """Everything that one evaluation, or a comparison of several, found."""

    title: str
    rows: list[Row]
    codes: list[CodeStatistics] = field(default_factory=list)
    quality: list[QualitySummary] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    contrasts: list[Contrast] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def test_set_sha256(pairs: Sequence[tuple[str, str]]) -> str:
    """Digest of (id, text) pairs; their order does not matter."""
    return hashlib.sha256(json.dumps(sorted(pairs), ensure_ascii=False).encode()).hexdigest()


test_set_sha256.__test__ = False  # type: ignore[attr-defined]  # pytest would take these two for tests
TestSet.__test__ = False  # type: ignore[attr-defined]


def make_row(name: str, system: str, model: str, protocol: Protocol, rates: ErrorRates, **facts: Any) -> Row:
    """A row from error rates, with its bootstrap interval; ``facts`` are further fields of :class:`Row`.

    Raises:
        ValueError: ``system`` is not one of SYSTEMS.
    """
    if system not in SYSTEMS:
        raise ValueError(f"system {system!r} is unknown: choose one of {', '.join(SYSTEMS)}")
    return Row(
        name=name,
        system=system,
        model=model,
        protocol=protocol,
        wer=rates.wer,
        cer=rates.cer,
        interval=bootstrap_interval(
            [u.errors for u in rates.utterances],
            [u.n_words for u in rates.utterances],
            samples=protocol.bootstrap_samples,
            seed=protocol.seed,
        ),
        substitutions=rates.substitutions,
        deletions=rates.deletions,
        insertions=rates.insertions,
        n_words=rates.n_words,
        n_scored=rates.n_scored,
        n_failed=rates.n_failed,
        utterances=rates.utterances,
        **facts,
    )


def refuse_other_protocol(row: Row, against: Row) -> None:
    """Raises ValueError where the rows' protocols differ; the message says in what."""
    mine, other = row.protocol.comparable_by(), against.protocol.comparable_by()
    odd = [key for key in mine if mine[key] != other[key]]
    if odd:
        raise ValueError(
            f"rows {row.name!r} and {against.name!r} cannot be compared: their protocols differ in {', '.join(odd)}; "
            "score both with one judge, normaliser and test set"
        )


def compare_rows(row: Row, against: Row) -> PairedDifference:
    """WER of ``row`` minus that of ``against``, with its paired bootstrap interval.

    Raises:
        ValueError: the rows' protocols differ (the message says in what), or their utterances do.
    """
    refuse_other_protocol(row, against)
    return paired_bootstrap(
        [u.id for u in row.utterances],
        [u.errors for u in row.utterances],
        [u.id for u in against.utterances],
        [u.errors for u in against.utterances],
        [u.n_words for u in row.utterances],
        [u.n_words for u in against.utterances],
        samples=row.protocol.bootstrap_samples,
        seed=row.protocol.seed,
    )


def merge_results(parts: Sequence[Results], title: str) -> Results:
    """Several evaluations as one, for a comparison: rows, codes and clips side by side.

    A row that two parts share (the ground truth under one protocol, say) is kept once. Parts whose protocols differ
    stay in tables of their own.
    """
    merged = Results(title=title, rows=[], created=max((p.created for p in parts), default=""))
    seen: set[tuple[str, ...]] = set()
    samples: dict[str, Sample] = {}
    for part in parts:
        for row in part.rows:
            key = (row.protocol.key(), row.name, row.model)
            if key not in seen:
                seen.add(key)
                merged.rows.append(row)
        merged.codes += [c for c in part.codes if c not in merged.codes]
        merged.quality += [q for q in part.quality if q not in merged.quality]
        merged.contrasts += [c for c in part.contrasts if c not in merged.contrasts]
        merged.notes += [note for note in part.notes if note not in merged.notes]
        merged.versions |= part.versions
        for sample in part.samples:
            into = samples.setdefault(sample.id, Sample(sample.id, sample.text))
            known = {clip.label: clip for clip in into.clips}
            for clip in sample.clips:
                if clip.label in known:
                    known[clip.label].heard = clip.heard | known[clip.label].heard
                else:
                    into.clips.append(dataclasses.replace(clip))
    merged.samples = list(samples.values())
    return merged


def save_results(results: Results, folder: Path | str) -> Path:
    """Write ``results.json`` into a folder; clips are named relative to it. Replaces the file in one step."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(results)}
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
        ValueError: it is of another schema version, or not a results file.
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
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version}, this code reads version {SCHEMA_VERSION}: run `slm evaluate` again"
        )
    try:
        results = TypeAdapter(Results).validate_python(content)
    except ValidationError as error:
        raise ValueError(f"{path} is not a results file of version {SCHEMA_VERSION}: {error}") from error
    for sample in results.samples:
        for clip in sample.clips:
            clip.audio = str((path.parent / clip.audio).resolve())
    return results
