"""What an evaluation leaves behind: rows with their protocol, in ``results.json``.

A row is one system on one test set under one protocol (:mod:`eval.protocol`). Rows may be compared only where these
agree: :func:`compare_rows` refuses anything else.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from eval.codes import CodeStatistics
from eval.protocol import Protocol, protocol_differences
from eval.speech.quality import QualitySummary
from eval.stats import PairedDifference, bootstrap_interval, paired_bootstrap, resampling_says_little
from eval.text.lengths import LengthBin
from eval.text.matched_pairs import MatchedPairs, matched_pairs_test
from eval.text.skips import SkipRates, skip_rates
from eval.text.translation import TranslationScores
from eval.text.wer import ErrorRates, UtteranceErrors, official_rate
from eval.trainings import Budget, Configuration, Curve

__all__ = [
    "RESULTS_FILE",
    "SCHEMA_VERSION",
    "SYSTEMS",
    "SYSTEM_NAMES",
    "TASK_PREFIX",
    "Clip",
    "Contrast",
    "Difference",
    "Results",
    "Row",
    "Sample",
    "by_groups",
    "compare_rows",
    "compare_segments",
    "difference_of",
    "is_task",
    "load_results",
    "make_row",
    "merge_results",
    "refuse_other_protocol",
    "save_results",
    "says_texts",
    "speakers_of",
    "system_name",
    "systems_of",
    "task_system",
]

SCHEMA_VERSION = 2
RESULTS_FILE = "results.json"
# An entry of `quality` holds a number under the key of each measure beside these: a new measure is one key more.
_QUALITY_FIELDS = {field.name for field in dataclasses.fields(QualitySummary)}
# Kinds of system, in the order of tables.
SYSTEM_NAMES = {
    "ground_truth": "ground truth",
    "reconstruction": "reconstruction",
    "semantic_reconstruction": "semantic reconstruction",
    "acoustic_stage": "acoustic stage",
    "resynthesis": "resynthesis",
    "tts": "SLM TTS",
    "asr": "SLM ASR",
    # What other systems made, as files (`slm score`).
    "speech": "speech",
    "transcripts": "transcripts",
}
SYSTEMS = tuple(SYSTEM_NAMES)
TASK_PREFIX = "slm-"  # a kind that begins so is a further task of the SLM; what follows is the task's name


def task_system(task: str) -> str:
    """The kind of the rows of one of the SLM's tasks.

    >>> task_system("asr"), task_system("st")
    ('asr', 'slm-st')
    """
    return task if task in ("asr", "tts") else TASK_PREFIX + task


def is_task(system: str) -> bool:
    """Whether a kind of system is a task of the SLM."""
    return system in ("asr", "tts") or system.startswith(TASK_PREFIX)


def system_name(system: str) -> str:
    """A kind of system as tables call it.

    >>> system_name("asr"), system_name("slm-st")
    ('SLM ASR', 'SLM st')
    """
    return SYSTEM_NAMES.get(system) or f"SLM {system.removeprefix(TASK_PREFIX)}"


def says_texts(system: str) -> bool:
    """Whether a kind of system says texts: TTS, or a further task of that name.

    >>> says_texts("tts"), says_texts("slm-tts-aligned"), says_texts("slm-st")
    (True, True, False)
    """
    return system == "tts" or system.startswith(f"{TASK_PREFIX}tts-")


def systems_of(systems: Iterable[str]) -> list[str]:
    """Each kind once, in the order of tables: those of SYSTEMS, then further tasks by name."""
    found = set(systems)
    return [*(system for system in SYSTEMS if system in found), *sorted(found - set(SYSTEMS))]


@dataclass(frozen=True)
class Difference:
    """A row's WER minus that of the row named ``against``, on the same utterances (paired bootstrap).

    ``mapsswe_p`` is the p-value of the matched-pairs test over ``mapsswe_segments`` segments
    (:mod:`eval.text.matched_pairs`); None where it has none, or in older results.
    """

    against: str
    wer: float
    interval: tuple[float, float]
    p_value: float
    mapsswe_p: float | None = None
    mapsswe_segments: int = 0


@dataclass(frozen=True)
class Contrast:
    """Mean WER of the cells ``a`` minus that of the cells ``b``, in one kind of row.

    ``judge`` is empty for the SLM's own transcripts. ``wers_a`` and ``wers_b`` stand in the order of the cells.
    ``interval`` and ``p_value`` are those of :func:`eval.stats.pooled_bootstrap`: with ``of_methods`` of the methods,
    trained anew with other seeds; without, of these trained models alone. ``mapsswe_p`` is that of the matched-pairs
    test, which is of two systems: None where a group has several cells.
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
    of_methods: bool = False
    resampled: str = "utterances"
    mapsswe_p: float | None = None


def by_groups(contrasts: Sequence[Contrast]) -> list[list[Contrast]]:
    """Those of one name and of the same groups of cells together."""
    groups: dict[tuple[object, ...], list[Contrast]] = {}
    for one in contrasts:
        groups.setdefault((one.name, tuple(one.a), tuple(one.b)), []).append(one)
    return list(groups.values())


@dataclass
class Row:
    """One system's scores. ``interval`` is that of the WER; rates are fractions, not per cent.

    ``mean_wer`` is the mean of the utterances' own rates, ``above_half`` the share of them above 50 %: of all that have
    words in their reference, one without an answer counting as 1. None in older results. ``official_wer`` is the number
    as the protocol's authors compute it, where ``protocol.official`` says that this is another one. ``interval_by`` is
    "wilson" where the bootstrap's interval is widened to Wilson's (:func:`eval.stats.bootstrap_interval`).

    What a row is about, in a comparison: its ``cell``, that cell's ``method`` (what it differs in from others beside
    frame rate and seed) and its training ``seed``. Empty or None: not of a comparison, or not known.

    ``n_scored`` + ``n_failed`` utterances count; a failed one counts as all its words deleted. ``n_truncated`` of the
    scored ones were cut off at a length limit.

    ``real_time_factor`` is ``wall_s / audio_s`` on ``machine``; ``timed`` says of which parts ``wall_s`` is the sum: of
    ASR encode + generate for the seconds heard, of TTS generate + decode for the seconds spoken, of a tokenizer encode
    + decode.

    ``translation`` holds the scores of a task whose answers are translations; there WER and CER count every other
    wording as errors.

    ``skips`` are the words that speech skipped and said again, as the judge reads it; None of texts and in older
    results. ``faults`` says of how many utterances an SLM's answer was cut at its limit (``length``), cut in a loop
    (``loop``) or silent (``silence``); empty where nothing tells.
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
    cer_interval: tuple[float, float] | None = None
    cell: str = ""
    method: str = ""
    seed: int | None = None
    mean_wer: float | None = None
    above_half: float | None = None
    official_wer: float | None = None
    interval_by: str = "bootstrap"
    translation: TranslationScores | None = None
    skips: SkipRates | None = None
    faults: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name in tables: the cell's before its own."""
        return f"{self.cell}: {self.name}" if self.cell else self.name

    def identity(self) -> tuple[object, ...]:
        """Equal for rows that are about the same thing."""
        about = (self.system, self.cell, self.method, self.seed, self.name, self.model)
        return (self.protocol.key(), *about, self.frame_rate_hz, self.tokens_per_second)


@dataclass
class Clip:
    """One player of the report: ``audio`` is a path (in ``results.json`` relative to it), ``heard`` judge -> text."""

    label: str
    audio: str
    heard: dict[str, str] = field(default_factory=dict)
    cell: str = ""


@dataclass
class Sample:
    """One utterance to listen to, through several systems; ``test_set`` is the digest of the set that has its id."""

    id: str
    text: str
    clips: list[Clip] = field(default_factory=list)
    test_set: str = ""


@dataclass
class Results:
    """Everything that one evaluation, or a comparison of several, found.

    ``without`` says why a cell has no score: cell -> kind of system or task ("asr", "tts", "st") -> reason.
    """

    title: str
    rows: list[Row]
    codes: list[CodeStatistics] = field(default_factory=list)
    quality: list[QualitySummary] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    contrasts: list[Contrast] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    configurations: list[Configuration] = field(default_factory=list)
    budgets: list[Budget] = field(default_factory=list)
    text_lengths: list[LengthBin] = field(default_factory=list)
    without: dict[str, dict[str, str]] = field(default_factory=dict)


def make_row(name: str, system: str, model: str, protocol: Protocol, rates: ErrorRates, **facts: Any) -> Row:
    """A row from error rates, with its bootstrap interval; ``facts`` are further fields of :class:`Row`.

    Raises:
        ValueError: ``system`` is neither one of SYSTEMS nor a further task's.
    """
    if system not in SYSTEMS and not is_task(system):
        known = ", ".join(SYSTEMS)
        raise ValueError(f"system {system!r} is unknown: choose one of {known}, or {TASK_PREFIX}TASK of a further task")
    drawing = {"speakers": speakers_of(protocol, rates.utterances)}
    drawing |= {"samples": protocol.bootstrap_samples, "seed": protocol.seed}
    errors, words = [u.errors for u in rates.utterances], [u.n_words for u in rates.utterances]
    return Row(
        name=name,
        system=system,
        model=model,
        protocol=protocol,
        wer=rates.wer,
        cer=rates.cer,
        interval=bootstrap_interval(errors, words, **drawing),
        cer_interval=bootstrap_interval(
            [u.character_errors for u in rates.utterances], [u.n_characters for u in rates.utterances], **drawing
        ),
        substitutions=rates.substitutions,
        deletions=rates.deletions,
        insertions=rates.insertions,
        n_words=rates.n_words,
        n_scored=rates.n_scored,
        n_failed=rates.n_failed,
        utterances=rates.utterances,
        mean_wer=rates.mean_wer,
        above_half=rates.above_half,
        official_wer=official_rate(rates.utterances, protocol.official) if protocol.official else None,
        interval_by="wilson" if resampling_says_little(errors, words) else "bootstrap",
        skips=skip_rates(rates.utterances, **drawing) if protocol.task == "speech" else None,
        **facts,
    )


def speakers_of(protocol: Protocol, utterances: Sequence[UtteranceErrors]) -> list[str] | None:
    """The speaker of each utterance where the protocol resamples speakers, else None."""
    return [u.speaker for u in utterances] if protocol.resampled == "speakers" else None


def refuse_other_protocol(row: Row, against: Row) -> None:
    """Raises ValueError where the rows' protocols differ; the message names each field with both values."""
    if odd := protocol_differences(row.protocol, against.protocol):
        raise ValueError(
            f"rows {row.label!r} and {against.label!r} cannot be compared: their protocols differ in {', '.join(odd)}; "
            "score both under one protocol"
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
        speakers=speakers_of(row.protocol, row.utterances),
        samples=row.protocol.bootstrap_samples,
        seed=row.protocol.seed,
    )


def compare_segments(row: Row, against: Row) -> MatchedPairs:
    """The matched-pairs test of two rows, as :func:`compare_rows` pairs them. Raises ValueError as that does."""
    refuse_other_protocol(row, against)
    other = {u.id: u for u in against.utterances}
    if other.keys() != {u.id for u in row.utterances}:
        raise ValueError(f"rows {row.label!r} and {against.label!r} were not scored on the same utterances")
    return matched_pairs_test(
        [u.reference for u in row.utterances],
        [u.hypothesis for u in row.utterances],
        [other[u.id].hypothesis for u in row.utterances],
    )


def difference_of(row: Row, against: Row) -> Difference:
    """What a row carries of its comparison with another one. Raises ValueError as :func:`compare_rows` does."""
    found, segments = compare_rows(row, against), compare_segments(row, against)
    return Difference(
        against.name, found.difference, found.interval, found.p_value, segments.p_value, segments.n_segments
    )


def merge_results(parts: Sequence[Results], title: str) -> Results:
    """Several evaluations as one, for a comparison: rows, codes and clips side by side.

    What two parts share (the ground truth under one protocol, say) is kept once. What has one name and differs (rows
    with other scores, a judge's other reading of a clip, versions, contrasts) is kept from each part, with the part's
    title. Parts whose protocols differ stay in tables of their own.
    """
    merged = Results(title=title, rows=_merged_rows(parts), created=max((p.created for p in parts), default=""))
    samples: dict[tuple[str, str, str], Sample] = {}
    contrasts: dict[str, list[Contrast]] = {}
    for part in parts:
        merged.codes += [c for c in part.codes if c not in merged.codes]
        merged.quality += [q for q in part.quality if q not in merged.quality]
        merged.notes += [note for note in part.notes if note not in merged.notes]
        merged.curves += [curve for curve in part.curves if curve not in merged.curves]
        merged.without |= part.without
        merged.text_lengths += [one for one in part.text_lengths if one not in merged.text_lengths]
        merged.budgets += [budget for budget in part.budgets if budget not in merged.budgets]
        merged.configurations += [one for one in part.configurations if one not in merged.configurations]
        for name in dict.fromkeys(c.name for c in part.contrasts):
            _keep_both(contrasts, name, [c for c in part.contrasts if c.name == name], part.title)
        for name, version in part.versions.items():
            _keep_both(merged.versions, name, version, part.title)
        for sample in part.samples:
            key = (sample.test_set, sample.id, sample.text)
            into = samples.setdefault(key, Sample(sample.id, sample.text, test_set=sample.test_set))
            known = {(clip.cell, clip.label): clip for clip in into.clips}
            for clip in sample.clips:
                if (clip.cell, clip.label) not in known:
                    into.clips.append(dataclasses.replace(clip, heard=dict(clip.heard)))
                    continue
                for judge, heard in clip.heard.items():
                    _keep_both(known[clip.cell, clip.label].heard, judge, heard, part.title)
    merged.contrasts = [dataclasses.replace(c, name=name) for name, found in contrasts.items() for c in found]
    merged.samples = list(samples.values())
    return merged


def _free_name(name: str, taken: Container[str], title: str) -> str:
    """The name, with its part's title where another one has it."""
    numbered = (f"{name} ({title}, {number})" for number in itertools.count(2))
    return next(one for one in itertools.chain((name, f"{name} ({title})"), numbered) if one not in taken)


def _keep_both(into: dict[str, Any], name: str, value: Any, title: str) -> None:
    """Add ``name: value``; where another value has that name, under one that says whose it is."""
    if not any(known == value for own, known in into.items() if own == name or own.startswith(f"{name} (")):
        into[_free_name(name, into, title)] = value


def _merged_rows(parts: Sequence[Results]) -> list[Row]:
    """Rows of one identity once where they have the same texts, else each of them under a name of its own."""
    kept: dict[tuple[object, ...], dict[str, Row]] = {}
    for part in parts:
        copies: list[Row] = []
        here: dict[tuple[str, str], str] = {}  # (protocol, label in the part) -> label now
        for row in part.rows:
            same = kept.setdefault(row.identity(), {})
            found = next((other for other in same.values() if _same_texts(row, other)), None)
            if found is None:
                found = dataclasses.replace(row, name=_free_name(row.name, same, part.title))
                same[found.name] = found
                copies.append(found)
            here[row.protocol.key(), row.label] = found.label
        for row in copies:
            if row.difference is not None:
                against = here.get((row.protocol.key(), row.difference.against), row.difference.against)
                row.difference = dataclasses.replace(row.difference, against=against)
    return [row for same in kept.values() for row in same.values()]


def _same_texts(a: Row, b: Row) -> bool:
    one, other = ({(u.id, u.reference, u.hypothesis) for u in row.utterances} for row in (a, b))
    return one == other and a.wer == b.wer


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
