"""Corpus error rates: hand-counted cases, and every edge that the module promises."""

from __future__ import annotations

import functools
import itertools

import pytest

from eval.text.normalisers import get_normaliser
from eval.text.wer import align_text, error_listing, official_rate, sclite_counts, score_pairs

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


def test_sclite_s_split_is_the_cheapest_by_its_weights() -> None:
    """Against every alignment there is, on all texts of up to four words out of two or three."""

    def cheapest(said: tuple[str, ...], heard: tuple[str, ...]) -> tuple[int, int, tuple[int, int, int]]:
        @functools.cache
        def best(i: int, j: int) -> tuple[int, int, tuple[int, int, int]]:
            if i == len(said) and j == len(heard):
                return 0, 0, (0, 0, 0)
            ways = []
            if i < len(said) and j < len(heard):
                ways.append((best(i + 1, j + 1), said[i] != heard[j], 0, 0))
            if i < len(said):
                ways.append((best(i + 1, j), 0, 1, 0))
            if j < len(heard):
                ways.append((best(i, j + 1), 0, 0, 1))
            found = []
            for (cost, errors, counts), s, d, n in ways:
                split = (counts[0] + s, counts[1] + d, counts[2] + n)
                found.append((cost + 4 * s + 3 * (d + n), errors + s + d + n, split))
            return min(found, key=lambda item: item[:2])

        return best(0, 0)

    texts = [text for n in range(4) for text in itertools.product("abc", repeat=n)]
    for said, heard in itertools.product(texts, texts[::3]):
        assert sclite_counts(said, heard) == cheapest(said, heard)[2], (said, heard)
    # One of the two went missing in front and another came in behind; jiwer calls both substitutions.
    assert sclite_counts(["a", "b"], ["b", "c"]) == (0, 1, 1)
    rates = [score_pairs(["one two"], ["two three"], BASIC, alignment=name) for name in ("jiwer", "sclite")]
    assert [(r.substitutions, r.deletions, r.insertions, r.wer) for r in rates][1] == (0, 1, 1, 1.0)
    with pytest.raises(ValueError, match="alignment 'other' is unknown: one of jiwer, sclite"):
        score_pairs(["a"], ["a"], BASIC, alignment="other")


def test_the_mean_of_utterances_and_what_leaves_the_missing_out() -> None:
    rates = score_pairs(["one two", "one two three four", "", "one"], ["one", "one two three four", "uh", None], BASIC)
    assert rates.wer == pytest.approx((1 + 0 + 1 + 1) / 7)
    assert rates.mean_wer == pytest.approx((1 / 2 + 0 + 1) / 3) and rates.above_half == pytest.approx(1 / 3)
    assert official_rate(rates.utterances, "mean-of-answered") == pytest.approx((1 / 2 + 0) / 2)
    assert official_rate(rates.utterances[2:], "mean-of-answered") is None
    with pytest.raises(ValueError, match="official rate 'best' is unknown"):
        official_rate(rates.utterances, "best")
