"""The bootstrap (coverage, seed, pairing) and the code statistics (closed forms)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.codes import code_statistics, nominal_bitrate
from eval.stats import (
    bootstrap_interval,
    holm,
    mean_interval,
    paired_bootstrap,
    pooled_bootstrap,
    smallest_detectable_difference,
    wilson_interval,
)


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
    # No error, and all of them, have an interval: Wilson's, whose ends are 3.8415 / (15 + 3.8415) from 0 and from 1.
    assert bootstrap_interval([0, 0, 0], [4, 5, 6], samples=50) == (0.0, pytest.approx(3.8415 / 18.8415, rel=1e-4))
    assert bootstrap_interval([4, 5, 6], [4, 5, 6], samples=50) == (pytest.approx(15 / 18.8415, rel=1e-4), 1.0)
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
    edge = wilson_interval(0, int(words.sum()))[1]
    assert (same.difference, same.interval, same.p_value) == (0.0, (-edge, edge), 1.0) and 0 < edge < 0.01


def test_pairing_refuses_other_utterances() -> None:
    with pytest.raises(ValueError, match="not scored on the same utterances.*2 ids.*'b'"):
        paired_bootstrap(["a", "b"], [0, 1], ["a", "c"], [0, 1], [3, 3], [3, 3])
    with pytest.raises(ValueError, match="'b' has references of different lengths"):
        paired_bootstrap(["a", "b"], [0, 1], ["a", "b"], [0, 1], [3, 3], [3, 4])


def test_pooling_one_training_each_is_the_paired_bootstrap() -> None:
    rng = np.random.default_rng(3)
    words = rng.integers(3, 9, 50)
    a, b = rng.binomial(words, 0.5), rng.binomial(words, 0.3)
    ids = [str(i) for i in range(50)]
    paired = paired_bootstrap(ids, a, ids, b, words, words, samples=500, seed=4)
    pooled = pooled_bootstrap([a], [b], words, samples=500, seed=4)
    assert pooled.difference == pytest.approx(paired.difference)
    assert pooled.interval == pytest.approx(paired.interval) and pooled.p_value == paired.p_value
    assert (pooled.rates_a, pooled.rates_b) == ([a.sum() / words.sum()], [b.sum() / words.sum()])


def test_seeds_that_differ_widen_the_interval_and_equal_ones_do_not() -> None:
    rng = np.random.default_rng(4)
    words = np.full(60, 6)
    a, b = rng.binomial(words, 0.5), rng.binomial(words, 0.4)

    def width(group_a, group_b, of_methods: bool) -> float:
        low, high = pooled_bootstrap(group_a, group_b, words, samples=8000, of_methods=of_methods).interval
        return high - low

    one = width([a], [b], False)
    assert width([a, a, a], [b, b], True) == pytest.approx(one, rel=1e-9)
    # Seeds one error in every utterance apart: 1/6 in the rate, which no choice of utterances explains.
    assert width([a, a + 1], [b, b + 1], False) == pytest.approx(one, rel=1e-9)
    # Each pair has variance (1/6)^2 / 2; Student's t of two degrees of freedom is 4.30 at 97.5 %.
    seeds = 4.303 * math.sqrt((1 / 6) ** 2 / 2 * (1 / 2 + 1 / 2))
    assert width([a, a + 1], [b, b + 1], True) / 2 == pytest.approx(math.hypot(one / 2, seeds), rel=0.05)
    drawn = pooled_bootstrap([a, a + 1], [b, b], words, samples=200, of_methods=True)
    assert drawn.difference == pytest.approx((a.sum() + 30 - b.sum()) / 360)
    with pytest.raises(ValueError, match="two trainings in each group, not 2 and 1"):
        pooled_bootstrap([a, a], [b], words, of_methods=True)


def test_an_interval_over_seeds_covers_a_new_pair_of_methods() -> None:
    """Two methods that are equal but for their seeds: utterances alone miss that, utterances and seeds do not.

    Two seeds each, with a standard deviation of 8 points: resampling the two held the truth in 84 % of cases.
    """
    rng = np.random.default_rng(6)
    words, hits, hits_of_models = np.full(60, 6), 0, 0
    for _ in range(200):
        hard = rng.uniform(0.1, 0.6, 60)
        groups = [[rng.binomial(words, np.clip(hard + rng.normal(0, 0.08), 0, 1)) for _ in range(2)] for _ in range(2)]
        low, high = pooled_bootstrap(*groups, words, samples=300, of_methods=True).interval
        hits += low <= 0 <= high
        low, high = pooled_bootstrap(*groups, words, samples=300).interval
        hits_of_models += low <= 0 <= high
    assert hits >= 184 and hits_of_models < 120


def test_pooling_refuses_what_is_not_paired() -> None:
    for a, b, words in (([], [[1, 2]], [3, 3]), ([[1, 2], [1]], [[1, 2]], [3, 3]), ([[1]], [[1]], [3])):
        with pytest.raises(ValueError, match=r"group A holds|at least two utterances"):
            pooled_bootstrap(a, b, words)
        with pytest.raises(ValueError, match=r"group A holds|at least two utterances"):
            smallest_detectable_difference(a, b, words)


def test_the_smallest_detectable_difference_is_found_four_times_in_five() -> None:
    """Draw test sets whose true difference is the one computed: about 80 % of intervals leave zero out."""
    rng = np.random.default_rng(7)
    words = rng.integers(4, 9, 80)
    hard = rng.beta(2, 4, 80)

    def draw(gap: float) -> tuple[np.ndarray, np.ndarray]:
        return rng.binomial(words, np.clip(hard + gap, 0, 1)), rng.binomial(words, hard)

    sizes = []
    for _ in range(60):
        a, b = draw(0.1)
        sizes.append(smallest_detectable_difference([a], [b], words))
    gap = float(np.mean(sizes))
    found = 0
    for _ in range(250):
        a, b = draw(gap)
        low, high = pooled_bootstrap([a], [b], words, samples=400).interval
        found += low > 0 or high < 0
    assert 0.7 <= found / 250 <= 0.9
    # By the formula: twice the utterances, smaller by the root of two; less power asked, less is needed.
    twice = smallest_detectable_difference([np.tile(a, 2)], [np.tile(b, 2)], np.tile(words, 2))
    assert twice == pytest.approx(smallest_detectable_difference([a], [b], words) / math.sqrt(2), rel=0.02)
    assert smallest_detectable_difference([a], [b], words, power=0.5) < smallest_detectable_difference([a], [b], words)
    assert smallest_detectable_difference([a], [a], words) is None


def test_code_statistics_closed_forms() -> None:
    uniform = np.stack([np.arange(8), np.zeros(8, dtype=np.int64)])
    padded = np.concatenate([uniform, np.full((2, 3), -1)], axis=1)
    stats = code_statistics([padded, padded], [16, 4], 12.5, name="nano")
    assert (stats.n_frames, stats.n_scored) == (16, 2)
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


def test_speakers_of_strong_effect_are_what_is_drawn() -> None:
    """40 speakers with 25 utterances each: an interval over utterances holds the truth in half of the cases or less."""
    rng = np.random.default_rng(8)
    speakers, words = np.repeat(np.arange(40), 25), np.full(1000, 6)
    hits, hits_paired = [0, 0], [0, 0]
    for _ in range(120):
        rates = np.repeat(rng.beta(2.5, 5.8, 40), 25)  # 0.3, with a standard deviation of 0.15
        errors, other = rng.binomial(words, rates), rng.binomial(words, np.full(1000, 0.3))
        ids = [str(i) for i in range(1000)]
        for i, who in enumerate((None, speakers)):
            low, high = bootstrap_interval(errors, words, samples=300, speakers=who)
            hits[i] += low <= 2.5 / 8.3 <= high
            paired = paired_bootstrap(ids, errors, ids, other, words, words, samples=300, speakers=who).interval
            hits_paired[i] += paired[0] <= 2.5 / 8.3 - 0.3 <= paired[1]
    assert hits[0] < 72 and hits[1] >= 108
    assert hits_paired[0] < 90 and hits_paired[1] >= 108


def test_drawing_speakers_is_drawing_their_sums() -> None:
    rng = np.random.default_rng(9)
    words = rng.integers(3, 9, 30)
    a, b = rng.binomial(words, 0.5), rng.binomial(words, 0.3)
    who = [f"s{i % 5}" for i in range(30)]
    sums = [np.array([x[np.array(who) == f"s{s}"].sum() for s in range(5)]) for x in (a, b, words)]
    assert bootstrap_interval(a, words, speakers=who, samples=200) == bootstrap_interval(sums[0], sums[2], samples=200)
    one = pooled_bootstrap([a], [b], words, speakers=who, samples=200)
    assert one.interval == pytest.approx(pooled_bootstrap([sums[0]], [sums[1]], sums[2], samples=200).interval)
    assert one.n_utterances == 30 and one.rates_a == [a.sum() / words.sum()]
    assert smallest_detectable_difference([a], [b], words, speakers=who) == pytest.approx(
        smallest_detectable_difference([sums[0]], [sums[1]], sums[2])
    )
    # One utterance each: a speaker is an utterance.
    assert mean_interval(list(a), speakers=[f"{i:02}" for i in range(30)]) == pytest.approx(mean_interval(list(a)))
    with pytest.raises(ValueError, match="one speaker"):
        bootstrap_interval(a, words, speakers=["s"] * 30)
    with pytest.raises(ValueError, match="29 speakers for 30 utterances"):
        bootstrap_interval(a, words, speakers=who[1:])


def test_wilson_s_interval_is_the_score_test_s_own() -> None:
    """Its ends are the shares s whose score test just lets what was seen, p, pass: |p - s| = z sqrt(s (1 - s) / n)."""
    for errors, n in ((1, 40), (7, 90), (45, 90)):
        for edge in wilson_interval(errors, n):
            assert abs(errors / n - edge) == pytest.approx(1.959964 * math.sqrt(edge * (1 - edge) / n), rel=1e-5)
    assert wilson_interval(3, 90)[0] == pytest.approx(1 - wilson_interval(87, 90)[1])
    for errors, n in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="is of a share"):
            wilson_interval(errors, n)


def test_few_errors_leave_room_for_more() -> None:
    """200 utterances of six words with a true rate of 0.3 %: resampling alone held it in 90 % of cases."""
    rng, words, hits, bare = np.random.default_rng(10), np.full(200, 6), 0, 0
    for _ in range(200):
        errors = rng.binomial(words, 0.003)
        low, high = bootstrap_interval(errors, words, samples=300)
        hits += low <= 0.003 <= high
        drawn = errors[np.random.default_rng(0).integers(0, 200, (300, 200))].mean(1) / 6
        bare += np.quantile(drawn, 0.025) <= 0.003 <= np.quantile(drawn, 0.975)
    assert hits >= 190 and bare < 188
    errors = np.zeros(200, dtype=int)
    errors[:5] = 1  # from five utterances on it is the bootstrap's own
    assert bootstrap_interval(errors, words, samples=300)[1] < wilson_interval(5, 1200)[1]


def test_holm_rejects_no_more_than_it_may() -> None:
    """Twelve equal pairs: one of them or more is below 5 % in half of the tables, in one of twenty after Holm."""
    rng = np.random.default_rng(11)
    tables = rng.uniform(size=(2000, 12))
    assert np.mean(tables.min(1) < 0.05) > 0.4
    assert np.mean([min(holm(table)) < 0.05 for table in tables]) == pytest.approx(0.05, abs=0.015)
    assert holm([0.2, 0.001, 0.02, 0.9]) == pytest.approx([0.4, 0.004, 0.06, 0.9]) and holm([]) == []
