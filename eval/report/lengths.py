"""Error rates by the length of the text, a column for each named length."""

from __future__ import annotations

from collections.abc import Sequence

from eval.report.tables import MeasureTable
from eval.schema import Row
from eval.text.breakdown import BREAKDOWN_RESAMPLES
from eval.text.lengths import LengthBin
from eval.text_lengths import row_within

__all__ = ["length_table"]


def length_table(rows: Sequence[Row], labels: Sequence[str], bins: Sequence[LengthBin]) -> MeasureTable | None:
    """WER of each row on the texts of each length, with its interval; None where no text falls into a bin.

    Args:
        rows: of one protocol.
        labels: their names in tables.
        bins: the lengths.
    """
    found = {bin_: [row_within(row, bin_, BREAKDOWN_RESAMPLES) for row in rows] for bin_ in bins}
    there = {bin_: some for bin_, some in found.items() if any(row is not None for row in some)}
    if not there:
        return None
    counts = []
    for bin_, some in there.items():
        one = next(row for row in some if row is not None)
        counts.append(f"{bin_.label}: {len(one.utterances)} utterances, {one.n_words} words")
    protocol = rows[0].protocol
    n_left = sum(not any(bin_.holds(u.n_words) for bin_ in bins) for u in rows[0].utterances)
    left = f" {n_left} utterances of other lengths are in none." if n_left else ""
    order = " The order of systems may turn with the length: see whether it does before speaking of the whole set."
    resamples = min(BREAKDOWN_RESAMPLES, protocol.bootstrap_samples)
    return MeasureTable(
        title="By length of text: WER %",
        note=f"{'; '.join(counts)}.{left} Brackets: 95 % bootstrap over {protocol.resampled}, {resamples} resamples, "
        f"with few errors widened.{order * (len(there) > 1)}",
        headings=["system", *(bin_.name for bin_ in there)],
        lines=[[label, *(_text(some[number]) for some in there.values())] for number, label in enumerate(labels)],
        names=1,
        narrow=list(range(1 + len(there))),
    )


def _text(row: Row | None) -> str:
    if row is None or row.wer is None:
        return "n/a"
    between = "" if row.interval is None else " [{:.1f}, {:.1f}]".format(*(100 * edge for edge in row.interval))
    return f"{100 * row.wer:.1f}{between}"
