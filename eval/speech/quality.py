"""The measures of a clip, and their means over a test set.

What a measure cannot say of a clip is None there, and a note says why; the other measures of that clip stand.

Shapes: S samples of one mono waveform.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from eval.speech.audio import level_db, resample
from eval.speech.measures.registry import Measure, MeasureError, chosen_measures, loaded
from eval.stats import mean_interval

__all__ = ["Quality", "QualitySummary", "compare_audio", "summarise_quality"]

_LONG_S, _PIECE_S = 60.0, 30.0  # a longer clip is measured in pieces: the measures' memory grows with the length
_INSTALL = "install the extra: pip install 'lmspt-slm[{}]'"


@dataclass(frozen=True)
class Quality:
    """One clip: key -> number for each column of its measures, None where a measure cannot say.

    ``length_difference_s`` is the clip's length minus the recording's: for measures that need the two in step, what was
    longer was cut. None without a recording.
    """

    values: dict[str, float | None]
    length_difference_s: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class QualitySummary:
    """Means over the clips for which a measure exists; ``n_measured`` says how many those were.

    ``values``, ``n_measured`` and ``intervals`` go by the keys of the measures' columns; in ``results.json`` the values
    stand beside the other fields. ``intervals`` are 95 % bootstrap intervals of the mean over clips, where there are
    two clips or more. ``n_scored`` clips could be measured; ``n_failed`` could not (no audio came out, or the recording
    cannot be read) and are in no mean. ``test_set`` names the recordings; ``system`` and ``cell`` are those of
    :class:`eval.schema.Row`.
    """

    name: str
    model: str
    n_scored: int
    values: dict[str, float | None]
    n_measured: dict[str, int]
    notes: list[str]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    test_set: str = ""
    n_failed: int = 0
    system: str = ""
    cell: str = ""

    @property
    def label(self) -> str:
        """The name in tables."""
        return f"{self.cell}: {self.name}" if self.cell else self.name


def compare_audio(
    reference: np.ndarray | None,
    audio: np.ndarray,
    sampling_rate: int,
    audio_sampling_rate: int | None = None,
    measures: Sequence[Measure] | None = None,
) -> Quality:
    """Measure a waveform, against its recording where there is one.

    Args:
        reference: the recording (S,) at ``sampling_rate``; None: measures that need one have no value.
        audio: the waveform to be judged (S',). More than 60 s are measured in equal pieces of at most 30 s; the means
            of those for which a measure exists count.
        sampling_rate: Hz.
        audio_sampling_rate: rate of ``audio`` where it differs.
        measures: what to compute; None: the default ones.

    Raises:
        ValueError: a waveform is empty, not one-dimensional or not finite.
    """
    audio_hz = audio_sampling_rate or sampling_rate
    for name, signal in (("reference", reference), ("audio", audio)):
        if signal is not None and (signal.ndim != 1 or signal.size == 0 or not np.isfinite(signal).all()):
            raise ValueError(f"{name} (shape {signal.shape}) must be one-dimensional, not empty and finite")
    signals: dict[int, list[np.ndarray]] = {}  # by rate: the clip, and its recording where there is one
    values: dict[str, float | None] = {}
    notes: dict[str, None] = {}
    for measure in chosen_measures() if measures is None else measures:
        if measure.needs_reference and reference is None:
            values |= dict.fromkeys((column.key for column in measure.columns), None)
            notes[f"{measure.title}: there is no recording to compare with"] = None
            continue
        if (rate := measure.sampling_rate) not in signals:
            signals[rate] = [resample(audio, audio_hz, rate)]
            signals[rate] += [] if reference is None else [resample(reference, sampling_rate, rate)]
        found: dict[str, list[float]] = {column.key: [] for column in measure.columns}
        for piece in _pieces(measure, signals[rate]):
            try:
                for key, value in _computed(measure, piece).items():
                    found[key].append(value)
            except MeasureError as error:
                notes[str(error)] = None
        values |= {key: float(np.mean(some)) if some else None for key, some in found.items()}
    difference_s = None if reference is None else len(audio) / audio_hz - len(reference) / sampling_rate
    return Quality(values, difference_s, list(notes))


def _pieces(measure: Measure, signals: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Clip and, where the measure needs it, recording, in pieces that the measure is computed of."""
    signals = signals if measure.needs_reference else signals[:1]
    if measure.time_aligned:
        signals = [signal[: min(map(len, signals))] for signal in signals]
    seconds = max(map(len, signals)) / measure.sampling_rate
    n = math.ceil(seconds / _PIECE_S) if seconds > _LONG_S else 1
    edges = [np.linspace(0, len(signal), n + 1).round().astype(int) for signal in signals]
    return [[signal[at[i] : at[i + 1]] for signal, at in zip(signals, edges, strict=True)] for i in range(n)]


def _computed(measure: Measure, signals: Sequence[np.ndarray]) -> dict[str, float]:
    """Key -> number of one piece. Raises MeasureError, which says which measure has none and why."""
    if not measure.defined_for_silence:
        silent = [level_db(signal) is None for signal in signals]
        if any(silent):
            raise MeasureError(f"the {'reference' if silent[-1] and len(silent) > 1 else 'clip'} is silent")
    try:
        needed = []
        if measure.load is not None:
            model, error = loaded(measure.load, measure.model)
            if error is not None:
                raise error.with_traceback(None)  # one error for all clips: its traceback would grow with each
            needed = [model]
        return _numbers(measure, measure.function(*needed, *signals))
    except MeasureError as error:
        raise MeasureError(f"{measure.title}: {error}") from error
    except ImportError as error:
        raise MeasureError(f"{measure.title}: {_INSTALL.format(measure.extra) if measure.extra else error}") from error
    except Exception as error:  # a measure that is broken costs its own numbers, not the evaluation
        warnings.warn(f"measure {measure.name} failed: {error!r}", RuntimeWarning, stacklevel=2)
        raise MeasureError(f"{measure.title}: failed with {error!r}") from error


def _numbers(measure: Measure, found: float | Mapping[str, float]) -> dict[str, float]:
    """What a measure's function returned, by column."""
    if measure.parts:
        if not isinstance(found, Mapping) or set(found) != set(measure.parts):
            raise TypeError(f"expected a number for each of {', '.join(measure.parts)}, got {found!r}")
        numbers = {f"{measure.name}_{part}": float(found[part]) for part in measure.parts}
    else:
        numbers = {measure.name: float(found)}
    if not all(map(math.isfinite, numbers.values())):
        raise MeasureError("gave no finite number")
    return numbers


def summarise_quality(
    name: str,
    model: str,
    clips: Sequence[Quality | None],
    test_set: str = "",
    samples: int = 10_000,
    seed: int = 0,
    system: str = "",
    speakers: Sequence[str] | None = None,
    measures: Sequence[Measure] | None = None,
) -> QualitySummary:
    """Means over clips, with their intervals; what could not be measured is counted and said, not hidden.

    Args:
        name: the system, as tables name it.
        model: the tokenizer.
        clips: one for each recording; None where there is none to measure.
        test_set: the recordings' name.
        samples: resamples of the bootstrap over clips.
        seed: of the bootstrap.
        system: which kind of system.
        speakers: of each recording, to draw speakers, not clips.
        measures: those that the clips were measured by; None: the default ones.
    """
    who = speakers or [""] * len(clips)
    there = [(clip, speaker) for clip, speaker in zip(clips, who, strict=True) if clip is not None]
    chosen = chosen_measures() if measures is None else measures
    means: dict[str, float | None] = {}
    counts: dict[str, int] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for column in [column for measure in chosen for column in measure.columns]:
        found = [(v, speaker) for clip, speaker in there if (v := clip.values.get(column.key)) is not None]
        values = [value for value, _ in found]
        counts[column.key] = len(values)
        means[column.key] = float(np.mean(values)) if values else None
        drawn = [speaker for _, speaker in found] if speakers else None
        if (interval := mean_interval(values, speakers=drawn, samples=samples, seed=seed)) is not None:
            intervals[column.key] = interval
    notes = Counter(note for clip, _ in there for note in clip.notes)
    return QualitySummary(
        name,
        model,
        len(there),
        means,
        n_measured=counts,
        notes=[f"{note} ({n} clips)" for note, n in notes.items()] + _models(chosen, counts),
        intervals=intervals,
        test_set=test_set,
        n_failed=len(clips) - len(there),
        system=system,
    )


def _models(measures: Sequence[Measure], counts: Mapping[str, int]) -> list[str]:
    """Which model each measure used that has one: figures of two models are not of one measure."""
    return [f"{m.title} by {m.model}" for m in measures if m.model and any(counts[c.key] for c in m.columns)]
