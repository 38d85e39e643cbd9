"""Rows on the utterances of one length of text: a test set of its own, to be compared as any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from eval.protocol import TestSet, test_set_sha256
from eval.schema import Row, make_row
from eval.text.lengths import LengthBin
from eval.text.wer import rates_of

__all__ = ["row_within", "rows_within"]


def row_within(row: Row, bin_: LengthBin, samples: int | None = None) -> Row | None:
    """A row's scores on its utterances of one length of text, under the protocol of that part of the test set.

    Args:
        row: on the whole test set.
        bin_: the length.
        samples: resamples of the intervals; None: the protocol's.

    Returns:
        None where it has no such utterance.
    """
    kept = [u for u in row.utterances if bin_.holds(u.n_words)]
    if not kept:
        return None
    whole = row.protocol.test_set
    test_set = TestSet(
        f"{whole.name}, {bin_.name} texts", test_set_sha256([(u.id, u.reference) for u in kept]), len(kept)
    )
    drawing = row.protocol.bootstrap_samples if samples is None else min(samples, row.protocol.bootstrap_samples)
    protocol = dataclasses.replace(row.protocol, test_set=test_set, bootstrap_samples=drawing)
    about = {name: getattr(row, name) for name in ("cell", "method", "seed", "frame_rate_hz", "tokens_per_second")}
    return make_row(row.name, row.system, row.model, protocol, rates_of(kept), **about)


def rows_within(rows: Sequence[Row], bin_: LengthBin, least: int = 1) -> list[Row]:
    """Those of the rows that have ``least`` utterances of one length or more, each on these alone."""
    found = [row_within(row, bin_) for row in rows]
    return [row for row in found if row is not None and len(row.utterances) >= least]
