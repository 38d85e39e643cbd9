"""One row held against another, where their protocols agree."""

from __future__ import annotations

from eval.protocol import protocol_differences
from eval.schema import Difference, Row, speakers_of
from eval.stats import PairedDifference, paired_bootstrap
from eval.text.matched_pairs import MatchedPairs, matched_pairs_test

__all__ = ["compare_rows", "compare_segments", "difference_of", "refuse_other_protocol"]


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
