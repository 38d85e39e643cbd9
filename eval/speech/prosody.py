"""Prosody of each word of an aligned recording: how long, how high and how loud it is said.

What ProsodyLM (arXiv 2507.20091) calls word-level prosody; the features are chosen here. Each is taken relative to what
would be expected, so that it says how a word was spoken and not which word it is or by whom:

- duration: log of the word's length over the sum of its phones' mean lengths in the training split;
- F0: the median of log F0 over the word's voiced frames, less the speaker's mean and over their standard deviation;
- energy: the word's level in dB less the mean level of the utterance's words.

Shapes: S samples of one mono waveform at 16 kHz, W words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.speech.measures.pitch import f0_contour

__all__ = ["ProsodyError", "ProsodyStatistics", "SpokenWord", "agreement", "measure_words"]

_HZ = 16_000
_FEWEST_VOICED = 3  # frames of 10 ms; a word with fewer has no F0
_FLOOR = 1e-5  # of RMS: -100 dB
_LEAST_SPREAD = 1e-3  # of log F0: a speaker who keeps one pitch is divided by nothing


class ProsodyError(ValueError):
    """Words whose prosody cannot be measured; the message says why."""


@dataclass(frozen=True)
class SpokenWord:
    """One word as it was said.

    Args:
        word: As the text writes it.
        duration_s: Seconds, above 0.
        units: Its phones, or its characters where the alignment has no phones.
        log_f0: Median of the natural logarithm of F0 in Hz over its voiced frames; None where it is not voiced.
        level_db: Root mean square in dB of full scale.
    """

    word: str
    duration_s: float
    units: tuple[str, ...]
    log_f0: float | None
    level_db: float


def measure_words(
    praat: Any, audio: np.ndarray, words: Sequence[Mapping[str, Any]], phones: Sequence[Mapping[str, Any]] = ()
) -> list[SpokenWord]:
    """Measures each word of a recording.

    Args:
        praat: Of :func:`eval.speech.measures.pitch.load_praat`.
        audio: The recording (S,) at 16 kHz.
        words: `{word, start, end}` of each in seconds, in order, as `slm align` writes them.
        phones: `{phone, start, end}`; each is the word's in whose time its middle lies.

    Raises:
        ProsodyError: There are no words, or one lies outside the recording.
        MeasureError: The recording is too short to have a pitch.
    """
    if not words:
        raise ProsodyError("no word is aligned")
    times, f0 = f0_contour(praat, audio)
    middles = [(str(one["phone"]), (float(one["start"]) + float(one["end"])) / 2) for one in phones]
    found = []
    for one in words:
        word, start, end = str(one["word"]), float(one["start"]), float(one["end"])
        samples = audio[max(0, round(start * _HZ)) : round(end * _HZ)]
        if not len(samples):
            raise ProsodyError(f"the word {word!r} ({start:g} to {end:g} s) is empty or lies outside the recording")
        voiced = f0[(times >= start) & (times < end) & (f0 > 0)]
        log_f0 = float(np.median(np.log(voiced))) if len(voiced) >= _FEWEST_VOICED else None
        own = tuple(phone for phone, middle in middles if start <= middle < end)
        units = own or tuple(letter for letter in word.lower() if letter.isalnum()) or (word,)
        rms = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
        found.append(SpokenWord(word, end - start, units, log_f0, 20 * float(np.log10(max(rms, _FLOOR)))))
    return found


@dataclass(frozen=True)
class ProsodyStatistics:
    """What words are measured against; of the training split.

    Args:
        unit_s: Mean seconds of each phone or character: a word's length is dealt evenly to its units, and the means
            are those of all words.
        any_unit_s: Mean seconds of any, for one that the training does not have.
        f0: Mean and standard deviation of the words' log F0, by speaker.
    """

    unit_s: Mapping[str, float]
    any_unit_s: float
    f0: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, utterances: Iterable[tuple[str, Sequence[SpokenWord]]]) -> ProsodyStatistics:
        """Statistics of (speaker, words) of each training utterance.

        Raises:
            ProsodyError: There is no word.
        """
        seconds: dict[str, list[float]] = defaultdict(list)
        pitches: dict[str, list[float]] = defaultdict(list)
        for speaker, words in utterances:
            for word in words:
                for unit in word.units:
                    seconds[unit].append(word.duration_s / len(word.units))
                if word.log_f0 is not None:
                    pitches[speaker].append(word.log_f0)
        if not seconds:
            raise ProsodyError("the training split has no aligned word")
        every = np.concatenate([np.asarray(own) for own in seconds.values()])
        return cls(
            {unit: float(np.mean(own)) for unit, own in sorted(seconds.items())},
            float(every.mean()),
            {speaker: _mean_and_spread(own) for speaker, own in sorted(pitches.items())},
        )

    def with_speakers(self, utterances: Iterable[tuple[str, Sequence[SpokenWord]]]) -> ProsodyStatistics:
        """The same, and speakers whom the training split does not have by their own words here."""
        pitches: dict[str, list[float]] = defaultdict(list)
        for speaker, words in utterances:
            if speaker not in self.f0:
                pitches[speaker] += [word.log_f0 for word in words if word.log_f0 is not None]
        others = {speaker: _mean_and_spread(own) for speaker, own in pitches.items() if own}
        return ProsodyStatistics(self.unit_s, self.any_unit_s, {**self.f0, **others})

    def relative(self, words: Sequence[SpokenWord], speaker: str) -> list[dict[str, Any]]:
        """`{word, duration, f0, energy}` of each word of an utterance; `f0` is None where it is not voiced.

        Raises:
            ProsodyError: A word is voiced and nothing is known of the speaker.
        """
        level_db = float(np.mean([word.level_db for word in words])) if words else 0.0
        found = []
        for word in words:
            expected_s = sum(self.unit_s.get(unit, self.any_unit_s) for unit in word.units)
            f0 = None
            if word.log_f0 is not None:
                if speaker not in self.f0:
                    raise ProsodyError(f"no F0 is known of the speaker {speaker!r}")
                mean, spread = self.f0[speaker]
                f0 = round((word.log_f0 - mean) / spread, 4)
            duration, energy = float(np.log(word.duration_s / expected_s)), word.level_db - level_db
            found.append({"word": word.word, "duration": round(duration, 4), "f0": f0, "energy": round(energy, 3)})
        return found

    def as_dict(self) -> dict[str, Any]:
        """As JSON keeps it; :meth:`from_dict` reads it."""
        return {
            "unit_s": dict(self.unit_s),
            "any_unit_s": self.any_unit_s,
            "f0": {speaker: list(values) for speaker, values in self.f0.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProsodyStatistics:
        """Of what :meth:`as_dict` wrote.

        Raises:
            ProsodyError: They are no such statistics.
        """
        try:
            f0 = {str(speaker): (float(mean), float(spread)) for speaker, (mean, spread) in values["f0"].items()}
            return cls({str(u): float(s) for u, s in values["unit_s"].items()}, float(values["any_unit_s"]), f0)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProsodyError(f"no statistics of prosody ({error})") from error


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), max(float(np.std(values)), _LEAST_SPREAD)


def agreement(
    pairs: Sequence[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]], samples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """How far the prosody of words is that of a reference: what was asked for, or how a recording says them.

    Args:
        pairs: Of each utterance its words in the reference (`duration`, `f0` and `energy`, measured or in bins) and
            what was measured of them, word by word. A word without F0 in either does not count for F0.
        samples: Resamples of the interval, which draws utterances.
        seed: Of the resamples.

    Returns:
        Of each feature its Pearson `correlation` over words, the 95 % bootstrap `interval` and the number of `words`;
        None for the two where there is none, as where nothing varies.
    """
    found: dict[str, dict[str, Any]] = {}
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, max(1, len(pairs)), size=(samples, len(pairs)))
    for feature in ("duration", "f0", "energy"):
        values = [
            np.array(
                [
                    (float(wished[feature]), float(said[feature]))
                    for wished, said in zip(*pair, strict=True)
                    if wished[feature] is not None and said[feature] is not None
                ]
            ).reshape(-1, 2)
            for pair in pairs
        ]
        n_words = sum(map(len, values))
        correlation = _correlation(np.concatenate(values)) if values else None
        interval = None
        if correlation is not None and len(pairs) > 1:
            resampled = (_correlation(np.concatenate([values[i] for i in index])) for index in drawn)
            interval = np.percentile([one for one in resampled if one is not None], [2.5, 97.5]).round(4).tolist()
        found[feature] = {"correlation": correlation, "interval": interval, "words": n_words}
    return found


def _correlation(values: np.ndarray) -> float | None:
    """Pearson's of (W, 2); None where it is not defined."""
    if len(values) < 3 or not values.std(axis=0).all():
        return None
    return round(float(np.corrcoef(values.T)[0, 1]), 4)
