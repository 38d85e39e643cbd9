"""STFT distance, SI-SDR, duration ratio and pitch: known answers, and what must not change them."""

from __future__ import annotations

import numpy as np
import pytest
from test_speech_quality import RATE, voice

from eval.speech.measures.registry import chosen_measures
from eval.speech.quality import compare_audio

NAMES = ["stft_distance_db", "si_sdr_db", "duration_ratio"]


def measured(reference: np.ndarray, audio: np.ndarray, *names: str) -> dict[str, float | None]:
    return compare_audio(reference, audio, RATE, measures=chosen_measures(list(names) or NAMES)).values


def glide(seconds: float = 1.5, low: float = 100.0, high: float = 200.0) -> np.ndarray:
    """A voice whose pitch rises from low to high."""
    pitch = np.linspace(low, high, int(seconds * RATE))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    return (0.1 * sum(np.sin(k * phase) / k for k in range(1, 15))).astype(np.float32)


def test_a_clip_against_itself() -> None:
    assert measured(voice(), voice()) == {"stft_distance_db": 0.0, "si_sdr_db": 100.0, "duration_ratio": 1.0}


def test_si_sdr_is_the_ratio_that_noise_was_added_at() -> None:
    rng = np.random.default_rng(0)
    clip = rng.normal(0, 0.1, 4 * RATE).astype(np.float32)
    for snr_db in (20.0, 5.0, -5.0):
        noisy = clip + rng.normal(0, 0.1 * 10 ** (-snr_db / 20), len(clip)).astype(np.float32)
        assert measured(clip, noisy, "si_sdr_db")["si_sdr_db"] == pytest.approx(snr_db, abs=0.2)
        louder = measured(clip, 0.3 * noisy + 0.01, "si_sdr_db")["si_sdr_db"]  # nor do gain and DC count
        assert louder == pytest.approx(snr_db, abs=0.2)


def test_a_gain_is_what_the_stft_distance_says() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 2 * RATE).astype(np.float32)
    assert measured(noise, noise / 2)["stft_distance_db"] == pytest.approx(20 * np.log10(2), abs=0.02)
    little, much = (noise + level * np.roll(noise, 999) for level in (0.05, 0.5))
    assert measured(noise, little)["stft_distance_db"] < measured(noise, much)["stft_distance_db"]


def test_durations() -> None:
    clip = voice(2.0)
    assert measured(clip, np.tile(clip, 2))["duration_ratio"] == pytest.approx(2.0)
    assert measured(np.tile(clip, 40), np.tile(clip, 20))["duration_ratio"] == pytest.approx(0.5)  # in pieces


def test_pitch() -> None:
    pytest.importorskip("parselmouth", reason="extra `f0` is not installed")
    rising, falling = glide(), glide(low=200, high=100)
    same = measured(rising, rising, "f0")
    assert same["f0_correlation"] == pytest.approx(1.0) and same["f0_voicing_error"] == 0
    assert measured(rising, falling, "f0")["f0_correlation"] < -0.9
    higher = measured(rising, glide(low=120, high=240), "f0")  # another voice with the same melody
    assert higher["f0_correlation"] > 0.98
    half = rising.copy()
    half[len(half) // 2 :] = np.random.default_rng(0).normal(0, 0.01, len(half) - len(half) // 2)
    assert measured(rising, half, "f0")["f0_voicing_error"] == pytest.approx(0.5, abs=0.08)
    for gain in (0.5, 2.0):
        assert measured(rising, gain * rising, "f0")["f0_correlation"] == pytest.approx(1.0, abs=1e-3)


def test_a_pitch_that_cannot_be_had_is_a_named_gap() -> None:
    pytest.importorskip("parselmouth", reason="extra `f0` is not installed")
    noise = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    for clip, why in ((noise, "fewer than 0.1 s voiced"), (glide(0.01), "too short"), (glide(1.0, 100, 100), "move")):
        quality = compare_audio(clip, clip, RATE, measures=chosen_measures(["f0"]))
        assert quality.values == {"f0_correlation": None, "f0_voicing_error": None}
        assert why in quality.notes[0]
