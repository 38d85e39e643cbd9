"""Measures of audio by name.

A measure is one function of a waveform, or of a waveform and its recording, and what tables have to know of its number.
All else follows: which clips it is computed of and at which rate (:mod:`eval.speech.quality`), its mean, interval and
columns (:mod:`eval.report.tables`), its key in result files.

Shapes: S samples of one mono waveform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

__all__ = [
    "VERSA_PREFIX",
    "Column",
    "Measure",
    "MeasureError",
    "chosen_measures",
    "columns_of",
    "explanation_of",
    "loaded",
    "measures",
    "register_measure",
]

Better = Literal["higher", "lower", "none"]
# Results hold a measure's number beside these, under the measure's own name.
RESERVED = frozenset(
    "name model system cell test_set n_scored n_failed n_measured notes intervals values "
    "tokenizer way audio sampling_rate frame_rate_hz n_books codebook_sizes bitrate_bps wall_s real_time_factor "
    "scored_s heard heard_cer n n_with".split()
)


class MeasureError(ValueError):
    """No such measure, a second one of a name, or a clip that it is not defined for; the message says which."""


VERSA_PREFIX = "versa_"  # of the key of a measure that VERSA computed, before its name for it


@dataclass(frozen=True)
class Column:
    """One number that a measure gives, as results and tables name it.

    Attributes:
        key: In result files.
        heading: In tables, with its unit.
        digits: Behind the point.
        better: Which of two is better; with "none" it describes the audio and judges nothing.
    """

    key: str
    heading: str
    digits: int
    better: Better


@dataclass(frozen=True)
class Measure:
    """One measure of audio.

    Attributes:
        name: Its key in results and in the configuration key `measures`.
        title: Heading of its column, without the unit; gaps are reported under it.
        explanation: What it is and its range, as a phrase that ": higher is better" may follow.
        better: "higher" or "lower"; "none" for what describes the audio and judges nothing.
        function: From waveforms (S,) in float32 at `sampling_rate` to a number, or to one for each of `parts`. It is
            called with the clip, or with the clip and its recording where `needs_reference`; what `load` returned comes
            first, where there is a loader. It raises MeasureError where a clip is not one to measure, such as one that
            is too short.
        load: Makes what `function` needs, such as a model; called once, and not before it is needed.
        model: Which weights `load`, which then takes this name, loads where nobody names others: hub name or folder.
        extra: The extra of this package that installs what `load` imports.
        sampling_rate: Hz of the waveforms that it gets.
        needs_reference: Whether it compares the clip with its recording.
        time_aligned: Whether the two must run in step, as a codec's output does and synthesised speech does not; then
            the longer of them is cut.
        defined_for_silence: Whether it has a value where the clip or the recording is silent.
        unit: Such as "dB".
        digits: Digits behind the point in tables.
        parts: Of a function that returns several numbers, their names and titles; their keys are `name_part`.
        default: Whether it is computed where nobody names measures.
    """

    name: str
    title: str
    explanation: str
    better: Better
    function: Callable[..., float | Mapping[str, float]]
    load: Callable[..., Any] | None = None
    model: str = ""
    extra: str = ""
    sampling_rate: int = 16_000
    needs_reference: bool = True
    time_aligned: bool = True
    defined_for_silence: bool = False
    unit: str = ""
    digits: int = 2
    parts: Mapping[str, str] = field(default_factory=dict)
    default: bool = True

    @property
    def columns(self) -> list[Column]:
        """A column for each number that it gives."""
        titles = {f"{self.name}_{part}": f"{self.title} {title}" for part, title in self.parts.items()}
        return [
            Column(key, f"{title} {self.unit}".strip(), self.digits, self.better)
            for key, title in (titles or {self.name: self.title}).items()
        ]


_MEASURES: dict[str, Measure] = {}


def register_measure(measure: Measure) -> Measure:
    """Make a measure known under its name. Registering the same one again changes nothing.

    Raises:
        MeasureError: another measure has its name or writes one of its keys, or a key is taken by the results.
    """
    if _MEASURES.get(measure.name, measure) != measure:
        raise MeasureError(f"measure {measure.name!r} is there already; give the new one another name")
    taken = RESERVED.union(c.key for other in _MEASURES.values() if other.name != measure.name for c in other.columns)
    for column in measure.columns:
        if column.key in taken:
            raise MeasureError(f"measure {measure.name!r}: results hold {column.key!r} already; give it another name")
    if measure.better not in ("higher", "lower", "none"):
        raise MeasureError(f"measure {measure.name!r}: better {measure.better!r} must be higher, lower or none")
    _MEASURES[measure.name] = measure
    return measure


def measures() -> dict[str, Measure]:
    """Every measure by name: those computed by default come first, those that judge nothing last."""
    return dict(sorted(_MEASURES.items(), key=lambda item: (item[1].better == "none", not item[1].default)))


def chosen_measures(names: Sequence[str] = (), models: Mapping[str, str] | None = None) -> list[Measure]:
    """The measures of these names; without any name those that are computed by default.

    Args:
        names: of measures.
        models: name of a measure -> the model that it loads in place of its own.

    Raises:
        MeasureError: there is none of a name, or it takes no model; the message lists those there are.
    """
    known = measures()
    takes = [name for name, measure in known.items() if measure.model]
    if odd := [name for name in models or () if name not in takes]:
        raise MeasureError(f"measure_models: {', '.join(odd)} takes no model; those that do are {', '.join(takes)}")
    known |= {name: replace(known[name], model=model) for name, model in (models or {}).items()}
    if unknown := [name for name in names if name not in known]:
        raise MeasureError(f"measures: {', '.join(unknown)} unknown; there are {', '.join(known)}")
    return [measure for name, measure in known.items() if (name in names if names else measure.default)]


def columns_of(keys: Iterable[str]) -> list[Column]:
    """The columns of these keys of results, in the order of the measures.

    A key of no measure, as in results whose measures come from a module that is not imported here, is its own heading.
    """
    known = {column.key: column for measure in measures().values() for column in measure.columns}
    wanted = dict.fromkeys(keys)
    there = [column for key, column in known.items() if key in wanted]
    return there + [Column(key, _heading(key), 3, "higher") for key in wanted if key not in known]


def _heading(key: str) -> str:
    """Of a key of no measure: itself, or VERSA's name with where it is from."""
    return f"VERSA {key.removeprefix(VERSA_PREFIX)}" if key.startswith(VERSA_PREFIX) else key


def explanation_of(keys: Iterable[str]) -> str:
    """A sentence on each measure that has one of these keys and judges."""
    wanted = set(keys)
    return " ".join(
        f"{measure.explanation}: {measure.better} is better."
        for measure in measures().values()
        if measure.better != "none" and any(column.key in wanted for column in measure.columns)
    )


@cache
def loaded(load: Callable[..., Any], model: str = "") -> tuple[Any, Exception | None]:
    """What a loader returns (of this model), or the error that it raised; it is called once, also where it fails."""
    try:
        return (load(model) if model else load()), None
    except Exception as error:  # a measure that cannot be loaded is a gap in the results, whatever the reason
        return None, error
