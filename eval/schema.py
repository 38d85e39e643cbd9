"""What an evaluation leaves behind: rows with their protocol, in ``results.json``.

A row is one system on one test set under one protocol (:mod:`eval.protocol`). Rows may be compared only where these
agree: :func:`eval.differences.compare_rows` refuses anything else. :mod:`eval.results_file` writes and reads the file,
:mod:`eval.merging` makes several evaluations one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.codes import CodeStatistics
from eval.protocol import Protocol
from eval.speech.quality import QualitySummary
from eval.stats import bootstrap_interval, resampling_says_little
from eval.systems import SYSTEMS, TASK_PREFIX, is_task
from eval.text.lengths import LengthBin
from eval.text.skips import SkipRates, skip_rates
from eval.text.translation import TranslationScores
from eval.text.wer import ErrorRates, UtteranceErrors, official_rate
from eval.trainings import Budget, Configuration, Cost, Curve

__all__ = [
    "Clip",
    "Contrast",
    "Difference",
    "Results",
    "Row",
    "Sample",
    "by_groups",
    "make_row",
    "speakers_of",
]


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

    ``command`` is what was typed, empty in older results.

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
    command: str = ""
    costs: list[Cost] = field(default_factory=list)


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
