"""The column `prosody` of a coded corpus -> values of each word, and the bins that a model cuts them into.

`slm measure-prosody` writes the column, and `slm encode data.0.columns=[prosody]` carries it into a corpus.

Shapes: W words; values (W, 3), a column for each of `FEATURES`, NaN where a word has no F0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable

import numpy as np

from recipes.config import ConfigError
from slm.prosody import FEATURES, ProsodyBins, ProsodyError

PROSODY = "prosody"


def read_column(column: str, place: str) -> list[tuple[str, list[float]]]:
    """The words of an utterance and the three values of each; none where it was not measured.

    Args:
        column: `[{word, duration, f0, energy}]` as JSON, or empty.
        place: What a message calls the utterance.

    Raises:
        ConfigError: The column holds something else.
    """
    found = []
    try:
        for one in json.loads(column) if column else ():
            duration, energy = float(one["duration"]), float(one["energy"])
            f0 = math.nan if one["f0"] is None else float(one["f0"])
            if not (math.isfinite(duration) and math.isfinite(energy)):
                raise ValueError(f"{one['word']!r} has no duration or energy")
            found.append((str(one["word"]), [duration, f0, energy]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{place}: its column {PROSODY} is no list of words with {', '.join(FEATURES)} ({error}); "
            f"`slm measure-prosody` writes one, and `slm encode data.0.columns=[{PROSODY}]` takes it from that manifest"
        ) from error
    return found


def prosody_of(column: str, text: str, read: Callable[[str], str], place: str) -> np.ndarray | None:
    """The prosody (W, 3) of each word of an utterance; None where the measured words are not the text's.

    Args:
        column: As in :func:`read_column`.
        text: Its transcript, normalised; words between spaces.
        read: The normaliser. A word that it writes as several gives each of them its prosody; one that it leaves out
            has none.
        place: What a message calls the utterance.

    Raises:
        ConfigError: As of :func:`read_column`.

    >>> column = '[{"word": "Bin", "duration": 0.1, "f0": null, "energy": 2}]'
    >>> prosody_of(column, "bin", str.lower, "u0").tolist()
    [[0.1, nan, 2.0]]
    """
    said: list[str] = []
    values: list[list[float]] = []
    for word, own in read_column(column, place):
        parts = read(word).split()
        said += parts
        values += [own] * len(parts)
    return np.array(values) if values and said == text.split() else None


def bins_of(columns: Iterable[str], n_bins: int, place: str) -> ProsodyBins:
    """Where a training split's prosody is cut: at its quantiles.

    Args:
        columns: Of its utterances, as in :func:`read_column`.
        n_bins: Of each feature.
        place: What a message calls the corpus.

    Raises:
        ConfigError: As of :func:`read_column`, or there is no prosody, or a feature without a value.
    """
    values = [own for column in columns for _, own in read_column(column, place)]
    if not values:
        raise ConfigError(f"{place}: no utterance of its train split has prosody; `slm measure-prosody` measures it")
    try:
        return ProsodyBins.of(np.array(values), n_bins)
    except ProsodyError as error:
        raise ConfigError(f"{place}: {error}") from error
