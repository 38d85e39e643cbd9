"""The bootstrap (coverage, seed, pairing) and the code statistics (closed forms)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.codes import code_statistics, nominal_bitrate
from eval.stats import bootstrap_interval, paired_bootstrap


def test_interval_is_seeded_and_holds_the_rate() -> None:
    rng = np.random.default_rng(1)
    words = rng.integers(3, 8, 80)
    errors = rng.binomial(words, 0.2)
    first = bootstrap_interval(errors, words, samples=2000, seed=3)
    assert first == bootstrap_interval(errors, words, samples=2000, seed=3)
    assert first != bootstrap_interval(errors, words, samples=2000, seed=4)
    assert first[0] < errors.sum() / words.sum() < first[1]


def test_interval_width_is_that_of_the_normal_theory() -> None:
    rng = np.random.default_rng(0)
    words = np.full(400, 10)
    errors = rng.binomial(words, 0.3)
    low, high = bootstrap_interval(errors, words, samples=4000)
    expected = 2 * 1.96 * errors.std() / math.sqrt(len(errors)) / 10
    assert high - low == pytest.approx(expected, rel=0.08)


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(5)
    words = np.full(60, 6)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.binomial(words, 0.4), words, samples=400)
        hits += low <= 0.4 <= high
    assert 176 <= hits <= 199


def test_no_interval_where_there_is_none() -> None:
    assert bootstrap_interval([1], [5]) is None
    assert bootstrap_interval([1, 2], [0, 0]) is None
    assert bootstrap_interval([0, 0, 0], [4, 5, 6], samples=50) == (0.0, 0.0)
    with pytest.raises(ValueError, match="one length"):
        bootstrap_interval([1, 2], [3])


def test_paired_difference() -> None:
    rng = np.random.default_rng(2)
    ids = [f"u{i}" for i in range(100)]
    words = rng.integers(4, 9, 100)
    good = rng.binomial(words, 0.2)
    bad = np.minimum(words, good + rng.binomial(2, 0.5, 100))
    order = rng.permutation(100)
    found = paired_bootstrap(ids, bad, [ids[i] for i in order], good[order], words, words[order], samples=1000, seed=1)
    assert found.difference == pytest.approx((bad.sum() - good.sum()) / words.sum())
    assert found.interval[0] > 0 and found.p_value < 0.01
    same = paired_bootstrap(ids, good, ids, good, words, words, samples=200)
    assert (same.difference, same.interval, same.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_pairing_refuses_other_utterances() -> None:
    with pytest.raises(ValueError, match="not scored on the same utterances.*2 ids.*'b'"):
        paired_bootstrap(["a", "b"], [0, 1], ["a", "c"], [0, 1], [3, 3], [3, 3])
    with pytest.raises(ValueError, match="'b' has references of different lengths"):
        paired_bootstrap(["a", "b"], [0, 1], ["a", "b"], [0, 1], [3, 3], [3, 4])


def test_code_statistics_closed_forms() -> None:
    uniform = np.stack([np.arange(8), np.zeros(8, dtype=np.int64)])
    padded = np.concatenate([uniform, np.full((2, 3), -1)], axis=1)
    stats = code_statistics([padded, padded], [16, 4], 12.5, name="nano")
    assert (stats.n_frames, stats.n_utterances) == (16, 2)
    assert stats.books[0].entropy_bits == pytest.approx(3) and stats.books[0].perplexity == pytest.approx(8)
    assert (stats.books[0].used, stats.books[0].use) == (8, 0.5)
    assert (stats.books[1].entropy_bits, stats.books[1].perplexity) == (0.0, 1.0)
    assert stats.bitrate_semantic_bps == 12.5 * 4 and stats.bitrate_bps == 12.5 * 6
    assert (stats.tokens_per_second, stats.tokens_per_second_all) == (12.5, 25.0)
    assert nominal_bitrate(12.5, [16384] + [4096] * 7) == pytest.approx(1225)


def test_code_statistics_refuse_foreign_codes() -> None:
    with pytest.raises(ValueError, match="code 16 of utterance 0 is not in book 0"):
        code_statistics([np.array([[16]])], [16], 25.0)
    with pytest.raises(ValueError, match=r"shape \(1, 1\)"):
        code_statistics([np.array([[1]])], [16, 16], 25.0)
