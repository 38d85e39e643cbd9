"""Corpus error rates: hand-counted cases, and every edge that the module promises."""

from __future__ import annotations

import pytest

from eval.text.normalisers import get_normaliser
from eval.text.wer import align_text, error_listing, score_pairs

BASIC = get_normaliser("basic")


def test_counts_by_hand() -> None:
    rates = score_pairs(
        ["bin blue at f two now", "set red by g five please"],
        ["Bin white at F 2 right now", "set by g five please"],
        BASIC,
        ids=["a", "b"],
    )
    assert (rates.substitutions, rates.deletions, rates.insertions, rates.n_words) == (1, 1, 1, 12)
    assert rates.wer == pytest.approx(3 / 12)
    assert [u.errors for u in rates.utterances] == [2, 1]
    assert sum(u.character_errors for u in rates.utterances) == pytest.approx(rates.cer * rates.n_characters)
    assert rates.n_characters == len("bin blue at f two now") + len("set red by g five please")


def test_the_corpus_rate_is_not_the_mean_of_rates() -> None:
    rates = score_pairs(["one", "one two three four five six seven eight nine"], ["two"] + ["one"] * 1, BASIC)
    assert rates.wer == pytest.approx(9 / 10)


def test_a_five_digit_utterance_counts_five() -> None:
    assert score_pairs(["three seven one nine two"], ["37192"], BASIC).n_words == 5
    assert score_pairs(["three seven one nine two"], ["37192"], BASIC).wer == 0


def test_failed_is_all_deleted_and_never_dropped() -> None:
    rates = score_pairs(["one two three", "four five"], [None, "four five"], BASIC)
    assert (rates.n_failed, rates.n_scored) == (1, 1)
    assert (rates.deletions, rates.n_words) == (3, 5)
    assert rates.wer == pytest.approx(3 / 5)
    assert rates.utterances[0].hypothesis is None
    said_nothing = score_pairs(["one two three", "four five"], ["", "four five"], BASIC)
    assert (said_nothing.n_failed, said_nothing.wer) == (0, rates.wer)


def test_empty_references() -> None:
    rates = score_pairs(["", "one two"], ["hello there", "one two"], BASIC)
    assert (rates.insertions, rates.n_words, rates.wer) == (2, 2, 1.0)
    nothing = score_pairs(["", "..."], ["", ""], BASIC)
    assert nothing.wer is None and nothing.cer is None and nothing.n_scored == 2


def test_bad_input_raises() -> None:
    with pytest.raises(ValueError, match="differ in number"):
        score_pairs(["a", "b"], ["a"], BASIC)
    with pytest.raises(ValueError, match="'x' occurs more than once"):
        score_pairs(["a", "b"], ["a", "b"], BASIC, ids=["x", "x"])
    with pytest.raises(ValueError, match="no utterances"):
        score_pairs([], [], BASIC)


def test_listing_is_worst_first_and_marks_errors() -> None:
    assert align_text("bin blue at f two", "bin white at two") == "bin (blue->white) at (f->*) two"
    assert align_text("lay red in", "set blue in now") == "(lay->set) (red->blue) in (*->now)"
    rates = score_pairs(
        ["bin blue", "set red now", "lay green"], ["bin blue", None, "lay white"], BASIC, ids=["good", "dead", "bad"]
    )
    lines = error_listing(rates, "demo").splitlines()
    assert lines[0] == "# demo"
    body = [line.split("\t") for line in lines if not line.startswith("#")]
    assert [row[0] for row in body] == ["dead", "bad", "good"]
    assert body[0][2].startswith("FAILED") and body[1][1:] == ["1/2", "lay (green->white)"]
