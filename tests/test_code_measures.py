"""Codes measured as codes: entropy, mutual information, n-grams, characters on frames, agreement, by known answers."""

from __future__ import annotations

import numpy as np
import pytest

from eval.codes.characters import NOTHING, Span, character_spans, frame_labels
from eval.codes.information import entropy_bits, mutual_information
from eval.codes.ngrams import NGramModel, held_out_bits
from eval.codes.robustness import agreement, standard_changes

RNG = np.random.default_rng(0)


def test_entropy_of_known_distributions() -> None:
    assert entropy_bits(np.full(64, 5)) == pytest.approx(6.0)
    assert entropy_bits(np.array([7, 0, 0])) == 0 and entropy_bits(np.zeros(3)) == 0
    assert entropy_bits(np.array([1, 1, 2])) == pytest.approx(1.5)


def test_a_label_tells_all_of_itself_and_nothing_of_another() -> None:
    x, other = RNG.integers(0, 16, 20_000), RNG.integers(0, 8, 20_000)
    same = mutual_information(x, x)
    assert same.mutual_bits == pytest.approx(same.entropy_x_bits) == pytest.approx(4.0, abs=0.01)
    assert same.share_of_y == pytest.approx(1) and same.adjusted_share_of_y == pytest.approx(1)
    none = mutual_information(x, other)
    # Miller 1955: independent labels show (|x| - 1)(|y| - 1) / (2 N) nats, here 0.0038 bits.
    bound = 15 * 7 / (2 * 20_000 * np.log(2))
    assert 0 < none.mutual_bits < 2 * bound and none.chance_bits == pytest.approx(bound, rel=0.3)
    assert abs(none.adjusted_share_of_y) < 0.001
    half = mutual_information(x, x // 4)  # two of the four bits
    assert half.mutual_bits == pytest.approx(half.entropy_y_bits) == pytest.approx(2.0, abs=0.01)


def test_few_frames_are_adjusted_for_chance() -> None:
    """With as many codes as frames the plain share is 1 for any text; the adjusted one says that it means nothing."""
    x, y = np.arange(100), RNG.integers(0, 4, 100)
    found = mutual_information(x, y)
    assert found.share_of_y == pytest.approx(1) and found.adjusted_share_of_y is None
    with pytest.raises(ValueError, match="pairs"):
        mutual_information(x, y[:-1])


def test_ngrams_of_known_sources() -> None:
    size = 16
    uniform = [RNG.integers(0, size, 200) for _ in range(200)]
    counted = [np.arange(start, start + 60) % size for start in range(size)]  # each code follows from the one before
    train, held_out = uniform[:150], uniform[150:]
    bits = held_out_bits(train, held_out, size)
    assert set(bits) == {1, 2, 3} and bits[1] == pytest.approx(4.0, abs=0.02)
    assert bits[1] < bits[2] < bits[3]  # what is not there to learn can only cost
    bits = held_out_bits(counted[:8], counted[8:], size)
    assert bits[1] == pytest.approx(4.0, abs=0.1) and bits[2] < 0.2


def test_ngram_probabilities_sum_to_one_and_follow_witten_and_bell() -> None:
    model = NGramModel([np.array([0, 0, 1, 2]), np.array([2, 0, 1])], 4, 3)
    for before in ([], [0], [0, 1], [3, 3]):
        total = sum(2 ** model.log2_probabilities([np.array([*before, code])])[-1] for code in range(4))
        assert total == pytest.approx(1.0)
    # Unigrams: seven codes of three kinds; (times + 3 / 4) / (7 + 3) below the uniform 1 / 4.
    unigram = NGramModel([np.array([0, 0, 1, 2]), np.array([2, 0, 1])], 4, 1)
    found = 2 ** unigram.log2_probabilities([np.arange(4)])
    assert found == pytest.approx([0.375, 0.275, 0.275, 0.075])
    with pytest.raises(ValueError, match="no codes to learn"):
        NGramModel([], 4, 2)
    with pytest.raises(ValueError, match="no codes to predict"):
        held_out_bits([np.array([1])], [], 4)


def test_orders_that_do_not_fit_a_number_are_left_out() -> None:
    assert set(held_out_bits([np.array([1, 2])], [np.array([1])], 2**30)) == {1, 2}


def test_characters_stand_on_their_frames() -> None:
    spans = character_spans(
        {"words": [{"word": "Hi", "start": 0.1, "end": 0.3}, {"word": "a", "start": 0.4, "end": 0.5}]}
    )
    assert spans == [Span("h", 0.1, pytest.approx(0.2)), Span("i", pytest.approx(0.2), 0.3), Span("a", 0.4, 0.5)]
    assert frame_labels(spans, 6, 10.0).tolist() == [NOTHING, ord("h"), ord("i"), NOTHING, ord("a"), NOTHING]
    exact = {"characters": [{"character": "h", "start": 0, "end": 1}], "words": []}
    assert character_spans(exact) == [Span("h", 0.0, 1.0)] and character_spans({"text": "hi"}) is None
    with pytest.raises(ValueError, match="not .word, start, end"):
        character_spans({"words": [{"word": "hi"}]})
    with pytest.raises(ValueError, match="ends before"):
        character_spans({"words": [{"word": "hi", "start": 2, "end": 1}]})


def test_agreement_counts_the_frames_that_both_have() -> None:
    codes = RNG.integers(0, 8, (3, 50))
    assert agreement("itself", [(codes, codes), (codes, codes)]).by_book == [1.0, 1.0, 1.0]
    other = codes.copy()
    other[0, :25] += 1
    found = agreement("half", [(codes, np.pad(other, ((0, 0), (0, 1))))])
    assert found.by_book == [0.5, 1.0, 1.0] and (found.n_frames, found.n_scored) == (50, 1)
    with pytest.raises(ValueError, match="same books"):
        agreement("fewer", [(codes, codes[:2])])
    with pytest.raises(ValueError, match="no frame"):
        agreement("none", [])


def test_changes_are_what_they_are_called() -> None:
    audio = RNG.normal(0, 0.1, 16_000).astype(np.float32)
    changes = {change.name: change for change in standard_changes(640)}
    noise = changes["noise, 20 dB SNR"].apply(audio) - audio
    assert 10 * np.log10(np.mean(audio**2) / np.mean(noise**2)) == pytest.approx(20, abs=0.2)
    assert np.array_equal(changes["noise, 20 dB SNR"].apply(audio), changes["noise, 20 dB SNR"].apply(audio))
    assert changes["gain +6 dB"].apply(audio) == pytest.approx(1.9953 * audio, abs=1e-4)
    assert changes["gain -6 dB"].apply(audio).std() < audio.std()
    for name, n in {"1 sample": 1, "1/8 frame": 80, "1/4 frame": 160, "1/2 frame": 320}.items():
        shifted = changes[f"shift, {name}"].apply(audio)
        assert len(shifted) == 16_000 + n and not shifted[:n].any() and np.array_equal(shifted[n:], audio)
    assert all(change.apply(audio).dtype == np.float32 for change in changes.values())
