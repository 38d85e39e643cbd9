"""SI-SDR, distance of spectra, duration and F0: known answers, and what must not change a verdict."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from eval.speech.measures import registry
from eval.speech.measures.aligned import si_sdr_db, stft_distance_db
from eval.speech.measures.duration import sound_s
from eval.speech.measures.registry import chosen_measures, measures
from eval.speech.quality import compare_audio

RATE = 16_000
NAMES = ["si_sdr_db", "stft_distance_db", "duration_ratio", "f0_correlation", "voicing_error"]
F0 = ["f0_correlation", "voicing_error"]
with_praat = pytest.mark.skipif(importlib.util.find_spec("parselmouth") is None, reason="extra `f0` is not installed")


def voice(seconds: float = 1.5, pitch_hz: float = 150.0) -> np.ndarray:
    """A gliding buzz between two silences of 0.2 s, with a hiss (unvoiced) in its last fifth."""
    time = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * (pitch_hz * time + 8 * np.sin(2 * np.pi * time))
    sound = 0.1 * sum(np.sin(k * phase) / k for k in range(1, 12))
    start = int(0.8 * len(sound))
    sound[start:] = 0.03 * np.random.default_rng(1).standard_normal(len(sound) - start)
    return np.pad(sound, round(0.2 * RATE)).astype(np.float32)


def noise(like: np.ndarray, level: float, seed: int = 0) -> np.ndarray:
    return (level * np.random.default_rng(seed).standard_normal(len(like))).astype(np.float32)


def measured(reference: np.ndarray, audio: np.ndarray, names: list[str]) -> dict[str, float | None]:
    return compare_audio(reference, audio, RATE, measures=chosen_measures(names)).values


def test_si_sdr_of_noise_is_its_snr_whatever_the_gain_and_delay() -> None:
    clean = voice()
    noisy = clean + noise(clean, 0.01)
    snr = 10 * np.log10(np.sum(clean**2) / np.sum((noisy - clean) ** 2))
    found = si_sdr_db(noisy, clean)
    assert found == pytest.approx(snr, abs=0.1)
    assert si_sdr_db(0.1 * noisy, clean) == pytest.approx(found, abs=1e-3)
    assert si_sdr_db(noisy + 0.3, clean) == pytest.approx(found, abs=1e-2)  # a constant offset
    for delay in (1, -1, 37, 160):
        assert si_sdr_db(np.roll(noisy, delay), clean) == pytest.approx(found, abs=0.1)
    assert si_sdr_db(np.roll(noisy, 400), clean) < found - 5  # more than 10 ms is another signal
    assert si_sdr_db(clean, clean) == 100
    assert si_sdr_db(noise(clean, 0.1, 2), clean) < -10


def test_stft_distance_knows_levels_and_ignores_added_silence() -> None:
    clean = voice()
    assert stft_distance_db(clean, clean) == 0
    loud = noise(clean, 0.3)
    assert stft_distance_db(0.5 * loud, loud) == pytest.approx(6.02, abs=0.01)
    little, much = (stft_distance_db(clean + noise(clean, level), clean) for level in (1e-3, 1e-1))
    assert little < much
    longer = [np.pad(x, (0, 2 * RATE)) for x in (clean + noise(clean, 1e-3), clean)]
    assert stft_distance_db(*longer) == pytest.approx(little, rel=0.03)
    assert measured(clean, 0 * clean, ["stft_distance_db"])["stft_distance_db"] > 10
    assert measured(0 * clean, 0 * clean, ["stft_distance_db"])["stft_distance_db"] is None


def test_duration_is_of_the_sound() -> None:
    clean = voice(1.5)
    assert sound_s(clean) == pytest.approx(1.5, abs=0.02)
    for same in (0.1 * clean, np.pad(clean, (0, RATE)), np.pad(clean, (RATE, 0)), np.roll(clean, 1)):
        assert measured(clean, same, ["duration_ratio"])["duration_ratio"] == pytest.approx(1, abs=0.015)
    assert measured(clean, voice(3.0), ["duration_ratio"])["duration_ratio"] == pytest.approx(2, abs=0.03)
    found = compare_audio(clean, 0 * clean, RATE, measures=chosen_measures(["duration_ratio"]))
    assert found.values["duration_ratio"] is None and "silent" in found.notes[0]


@with_praat
def test_f0_of_itself_of_another_level_and_of_another_voice() -> None:
    clean = voice()
    same = measured(clean, clean, F0)
    assert same["f0_correlation"] == pytest.approx(1) and same["voicing_error"] == 0
    for changed in (0.25 * clean, np.pad(clean, (0, RATE)), np.roll(clean, 1)):
        found = measured(clean, changed, F0)
        assert found["f0_correlation"] > 0.999 and found["voicing_error"] < 0.03
    longer = [np.pad(x, (0, 3 * RATE)) for x in (clean, 0.25 * clean)]
    assert measured(*longer, F0)["voicing_error"] == pytest.approx(0, abs=0.02)
    assert measured(clean, voice(pitch_hz=220.0), F0)["f0_correlation"] > 0.95  # higher, but the same melody
    hissed = clean.copy()
    hissed[: len(clean) // 2] = noise(clean, 0.05)[: len(clean) // 2]
    assert measured(clean, hissed, F0)["voicing_error"] > 0.2


@with_praat
def test_f0_that_means_nothing_is_a_gap_with_its_reason() -> None:
    clean, tone = voice(), 0.1 * np.sin(2 * np.pi * 150 * np.arange(2 * RATE) / RATE).astype(np.float32)
    hiss = noise(clean, 0.1)
    for reference, audio, reason in [
        (tone, tone, "F0 does not move"),
        (clean, hiss, "voiced in both"),
        (tone[:300], tone[:300], "too short"),
    ]:
        found = compare_audio(reference, audio, RATE, measures=chosen_measures(["f0_correlation"]))
        assert found.values["f0_correlation"] is None and reason in found.notes[0]


def test_without_praat_f0_alone_is_missing_and_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "parselmouth", None)
    registry.loaded.cache_clear()
    found = compare_audio(voice(), voice(), RATE, measures=chosen_measures(NAMES))
    registry.loaded.cache_clear()
    assert found.values["f0_correlation"] is None and found.values["voicing_error"] is None
    assert found.values["si_sdr_db"] == 100 and found.values["duration_ratio"] == 1
    assert len(found.notes) == 2 and all("lmspt-slm[f0]" in note for note in found.notes)


def test_synthesised_speech_gets_what_needs_no_step() -> None:
    """By `time_aligned` an evaluation leaves the others out where the audio does not run in step."""
    assert {m.name for m in chosen_measures(NAMES) if not m.time_aligned} == {"duration_ratio"}
    assert not {m.name for m in chosen_measures()} & set(NAMES)  # asked for by name


UNTOUCHED_BY_LEVEL = ["stoi", "si_sdr_db", "duration_ratio", "dnsmos", "similarity", *F0]


def clip_and_recording() -> tuple[np.ndarray, np.ndarray]:
    """A recording without silence at its ends, and it with noise."""
    clean = voice()[round(0.2 * RATE) : -round(0.2 * RATE)]
    return clean + noise(clean, 0.01), clean


@pytest.mark.parametrize("name", list(measures()))
@pytest.mark.parametrize("zeros", [(0, 3 * RATE), (RATE, 0), (37, 0)], ids=["behind", "before", "a shift"])
def test_silence_added_to_both_changes_no_verdict(name, zeros) -> None:
    audio, reference = clip_and_recording()
    wanted = measured(reference, audio, [name])
    found = measured(np.pad(reference, zeros), np.pad(audio, zeros), [name])
    for key, value in wanted.items():  # frames that reach into the zeros count more or less; None: not installed
        assert found[key] is None if value is None else found[key] == pytest.approx(value, rel=0.03, abs=0.03), key


@pytest.mark.parametrize("name", UNTOUCHED_BY_LEVEL)
def test_the_level_of_a_clip_has_a_measure_of_its_own(name) -> None:
    audio, reference = clip_and_recording()
    wanted, found = measured(reference, audio, [name]), measured(reference, 0.3 * audio, [name])
    for key, value in wanted.items():
        assert found[key] is None if value is None else found[key] == pytest.approx(value, rel=1e-3, abs=2e-3), key


def test_two_silences_have_no_distance() -> None:
    for name in ("mel_distance_db", "stft_distance_db"):
        silence = np.zeros(RATE, np.float32)
        found = compare_audio(silence, silence, RATE, measures=chosen_measures([name]))
        assert found.values[name] is None and "both are silent" in found.notes[0]
