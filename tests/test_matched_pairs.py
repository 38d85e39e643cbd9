"""The matched-pairs test: segments counted by hand, its level where nothing differs, and its power beside it."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from eval.text.matched_pairs import matched_pairs_test

LETTERS = "a b c d e f g h i j k l"


def test_segments_by_hand() -> None:
    # A errs at b and, past one good word, at d: one segment. At g, past two good words, another; B errs at h beside it.
    found = matched_pairs_test([LETTERS], ["a x c x e f x h i j k l"], ["a b c d e f g x i j k l"])
    assert found.n_segments == 2 and found.mean_difference == (2 + 0) / 2
    # Insertions count in the gap where they are: before the first word, and behind the last.
    found = matched_pairs_test([LETTERS, LETTERS], [f"z {LETTERS} z", LETTERS], [LETTERS, None])
    assert found.n_segments == 3 and found.mean_difference == (1 + 1 - 12) / 3
    one = matched_pairs_test([LETTERS], ["x b c d e f g h i j k x"], [LETTERS])
    assert (one.n_segments, one.mean_difference, one.p_value) == (2, 1.0, None)  # no spread: nothing can be said
    same = matched_pairs_test([LETTERS, ""], ["x" + LETTERS[1:], "y"], ["y" + LETTERS[1:], "y"])
    assert (same.n_segments, same.p_value) == (2, 1.0)
    with pytest.raises(ValueError, match="2 references, 1 and 2 hypotheses"):
        matched_pairs_test(["a", "b"], ["a"], ["a", "b"])


def test_the_p_value_is_that_of_a_paired_z_test_over_segments() -> None:
    heard = ["x" + LETTERS[1:]] * 6 + ["x x" + LETTERS[3:]] * 3 + [LETTERS] * 3
    other = [LETTERS] * 9 + ["x" + LETTERS[1:]] * 3
    differences = np.array([1] * 6 + [2] * 3 + [-1] * 3)
    z = differences.mean() / (differences.std(ddof=1) / math.sqrt(12))
    found = matched_pairs_test([LETTERS] * 12, heard, other)
    assert found.n_segments == 12 and found.p_value == pytest.approx(2 * (1 - NormalDist().cdf(z)))


def test_equal_systems_differ_in_one_of_twenty_cases() -> None:
    rng = np.random.default_rng(0)
    words = LETTERS.split()

    def hear(rate: float) -> list[str]:
        return [" ".join("?" if rng.random() < rate else word for word in words) for _ in range(60)]

    def below(rate: float, times: int) -> float:
        found = [matched_pairs_test([LETTERS] * 60, hear(0.2), hear(rate)).p_value for _ in range(times)]
        return float(np.mean([p < 0.05 for p in found]))

    assert below(0.2, 200) < 0.1
    assert below(0.3, 40) > 0.8
