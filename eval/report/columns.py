"""The columns of a table of error rates: what each shows of a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eval.report.contrasts import p_text
from eval.report.groups import Group
from eval.schema import Row

__all__ = ["DIFFERENCE", "NARROW_COLUMNS", "columns_of", "number_text", "per_cent", "wer_text"]

DIFFERENCE = "\u0394 WER"
CER = "CER % [95 %]"
OFFICIAL_WER = "official WER %"


def per_cent(value: float | None, digits: int = 1) -> str:
    return "n/a" if value is None else f"{100 * value:.{digits}f}"


def _with_interval(rate: float | None, interval: tuple[float, float] | None) -> str:
    between = "" if interval is None else f" [{per_cent(interval[0])}, {per_cent(interval[1])}]"
    return per_cent(rate) + between


def wer_text(row: Row) -> str:
    return _with_interval(row.wer, row.interval)


def cer_text(row: Row) -> str:
    return _with_interval(row.cer, row.cer_interval)


def number_text(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"


def difference_text(row: Row) -> str:
    if row.difference is None:
        return ""
    low, high = (f"{100 * edge:+.1f}" for edge in row.difference.interval)
    return f"{100 * row.difference.wer:+.1f} [{low}, {high}]"


def mapsswe_text(row: Row) -> str:
    return "" if row.difference is None else p_text(row.difference.mapsswe_p)


def _if_known(value: float | None) -> str:
    return "" if value is None else per_cent(value)


def _speed(row: Row, digits: int) -> str:
    """The real-time factor; one without the tokenizer's part says so."""
    if row.real_time_factor is None:
        return ""
    return f"{row.real_time_factor:.{digits}g}" + (f" ({row.timed})" if row.timed.endswith(" only") else "")


def _part(seconds: float | None, row: Row) -> str:
    """One part of the real-time factor."""
    return "" if seconds is None or not row.audio_s else f"{seconds / row.audio_s:.3g}"


# Heading, text of a row, whether it is a number. A column that is empty in every row is left out.
_COLUMNS: list[tuple[str, Callable[[Row], str], bool]] = [
    ("WER % [95 %]", wer_text, True),
    (DIFFERENCE, difference_text, True),
    ("p, MAPSSWE", mapsswe_text, True),
    (OFFICIAL_WER, lambda row: _if_known(row.official_wer), True),
    ("mean of utterances %", lambda row: _if_known(row.mean_wer), True),
    ("above 50 %", lambda row: _if_known(row.above_half), True),
    (CER, cer_text, True),
    ("S", lambda row: str(row.substitutions), True),
    ("D", lambda row: str(row.deletions), True),
    ("I", lambda row: str(row.insertions), True),
    ("N", lambda row: str(row.n_words), True),
    ("model", lambda row: row.model, False),
    ("scored", lambda row: str(row.n_scored), True),
    ("failed", lambda row: str(row.n_failed), True),
    ("cut off", lambda row: "" if row.n_truncated is None else str(row.n_truncated), True),
    ("tokens/s", lambda row: number_text(row.tokens_per_second), True),
    ("bit/s", lambda row: number_text(row.bitrate_bps, 0), True),
    ("RTF", lambda row: _speed(row, 3), True),
    ("encode", lambda row: _part(row.encode_s, row), True),
    ("generate", lambda row: _part(row.generate_s, row), True),
    ("decode", lambda row: _part(row.decode_s, row), True),
]
# A terminal is narrow: the counts in one column, names folded, and what still does not fit is in the report alone.
NARROW_COLUMNS: list[tuple[str, Callable[[Row], str], bool]] = [
    ("WER % [95 %]", wer_text, True),
    (DIFFERENCE, difference_text, True),
    (OFFICIAL_WER, lambda row: _if_known(row.official_wer), True),
    (CER, cer_text, True),
    ("S+D+I/N", lambda row: f"{row.substitutions}+{row.deletions}+{row.insertions}/{row.n_words}", True),
    ("failed", lambda row: f"{row.n_failed}/{row.n_scored + row.n_failed}", True),
    ("cut off", lambda row: "" if row.n_truncated is None else str(row.n_truncated), True),
    ("tokens/s", lambda row: number_text(row.tokens_per_second), True),
    ("RTF", lambda row: _speed(row, 2), True),
]


def columns_of(
    group: Group, columns: Sequence[tuple[str, Callable[[Row], str], bool]] = tuple(_COLUMNS)
) -> list[tuple[str, Callable[[Row], str], bool]]:
    """The columns, as those of `NARROW_COLUMNS`, that are not empty in every row."""
    rows = {heading: [*group.rows, *group.beside] for heading, _, _ in columns}
    for heading in (DIFFERENCE, "p, MAPSSWE"):
        rows[heading] = group.rows  # the others' differences belong to their own table
    return [(heading, text, number) for heading, text, number in columns if any(map(text, rows[heading]))]
