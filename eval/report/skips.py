"""What went wrong in speech that was made from text: words skipped and said again, answers that did not end."""

from __future__ import annotations

from collections.abc import Sequence

from eval.report.tables import MeasureTable
from eval.schema import Row
from eval.systems import is_task

__all__ = ["skip_table"]

_FAULTS = {"not ended": "length", "looping": "loop", "silent": "silence"}  # heading -> a row's fault


def skip_table(rows: Sequence[Row], labels: Sequence[str]) -> MeasureTable | None:
    """Rates per 1,000 of each row as a judge reads it; None where none of the rows was spoken from text.

    The rows of recordings and of a tokenizer stand beside: what the judge misses there is not the SLM's.

    Args:
        rows: of one protocol.
        labels: their names in tables.
    """
    spoken = any(is_task(row.system) or row.system == "speech" for row in rows)
    shown = [(row, label) for row, label in zip(rows, labels, strict=True) if row.skips is not None and row.n_words]
    if not spoken or not shown:
        return None
    faults = _FAULTS if any(row.faults for row, _ in shown) else {}
    lines = []
    for row, label in shown:
        skips = row.skips
        words = [
            _per_thousand(skips.skipped, row.n_words, skips.skipped_interval),
            _per_thousand(skips.skipped_phrases, row.n_words),
            _per_thousand(skips.repeated, row.n_words, skips.repeated_interval),
        ]
        utterances = row.n_scored + row.n_failed
        ends = [_per_thousand(row.faults[name], utterances) if row.faults else "" for name in faults.values()]
        lines.append([label, *words, *ends])
    ended = (
        " Per 1,000 utterances: not ended: cut off at the limit of their length; looping: cut off in a loop; silent. "
        "They are as the predictions name them."
    )
    return MeasureTable(
        title="What went wrong, per 1,000",
        note="Per 1,000 words of the text [95 %]: words skipped, phrases (two or more of these in a row), words said "
        f"again, as jiwer aligns.{ended if faults else ''}",
        headings=["system", "words skipped", "phrases skipped", "words repeated", *faults],
        lines=lines,
        names=1,
        narrow=list(range(4 + len(faults))),
    )


def _per_thousand(count: int, of: int, interval: tuple[float, float] | None = None) -> str:
    between = "" if interval is None else " [{:.1f}, {:.1f}]".format(*(1000 * edge for edge in interval))
    return f"{1000 * count / of:.1f}{between}"
