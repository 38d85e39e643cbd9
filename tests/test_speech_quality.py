"""Audio quality against a reference: identities, order, and the edges."""

from __future__ import annotations

import builtins

import numpy as np
import pytest

from eval.speech.quality import compare_audio, log_mel_db, summarise_quality

RATE = 16_000


def voice(seconds: float = 2.0) -> np.ndarray:
    """A buzzing vowel with syllables: enough like speech for STOI and PESQ."""
    time = np.arange(int(seconds * RATE)) / RATE
    buzz = sum(np.sin(2 * np.pi * 120 * k * time) / k for k in range(1, 30))
    return (0.1 * buzz * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * time))).astype(np.float32)


def test_a_clip_against_itself() -> None:
    quality = compare_audio(voice(), voice(), RATE)
    assert quality.mel_distance_db == 0 and quality.level_difference_db == 0 and quality.length_difference_s == 0


def test_more_noise_is_worse_by_every_measure() -> None:
    pytest.importorskip("pystoi", reason="extra `eval` is not installed")
    pytest.importorskip("pesq", reason="extra `pesq` is not installed")
    noise = np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32)
    little, much = (compare_audio(voice(), voice() + level * noise, RATE) for level in (0.002, 0.1))
    assert little.mel_distance_db < much.mel_distance_db
    assert little.stoi > much.stoi
    assert little.pesq > much.pesq


def test_a_long_clip_is_measured_in_pieces(monkeypatch) -> None:
    """Memory does not grow with the length, and the means are those of the pieces."""
    from eval.speech import quality as speech

    longest, original = [], speech.log_mel_db
    monkeypatch.setattr(speech, "log_mel_db", lambda audio: longest.append(len(audio) / RATE) or original(audio))
    monkeypatch.setattr(speech, "_stoi", lambda reference, audio: (float(len(audio)), None))
    monkeypatch.setattr(speech, "_pesq", lambda reference, audio: (None, "PESQ: no"))
    reference = np.tile(voice(2.0), 50)
    quality = compare_audio(reference, np.concatenate([0.5 * reference, reference[:RATE]]), RATE)
    assert max(longest) <= 30.0 and quality.length_difference_s == 1.0
    assert quality.level_difference_db == pytest.approx(-6.02, abs=0.01)
    assert quality.stoi == 25 * RATE and quality.pesq is None and quality.notes == ["PESQ: no"]


def test_mel_level_is_in_decibels() -> None:
    quality = compare_audio(voice(), 0.5 * voice(), RATE)
    assert quality.level_difference_db == pytest.approx(-6.02, abs=0.01)
    tone = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    assert log_mel_db(tone).max() - log_mel_db(0.1 * tone).max() == pytest.approx(20, abs=0.01)
    assert log_mel_db(np.zeros(RATE)).max() == pytest.approx(-80)


def test_lengths_rates_and_silence() -> None:
    quality = compare_audio(voice(2.0), voice(2.0)[: int(1.5 * RATE)], RATE)
    assert quality.length_difference_s == pytest.approx(-0.5) and quality.mel_distance_db < 0.5
    slower = compare_audio(voice(), voice()[::2], RATE, audio_sampling_rate=RATE // 2)
    assert slower.length_difference_s == 0 and slower.level_difference_db == pytest.approx(0, abs=0.5)
    silent = compare_audio(voice(), 0 * voice(), RATE)
    assert silent.stoi is None and silent.pesq is None and "clip is silent" in silent.notes[0]
    short = compare_audio(voice(0.05), voice(0.05), RATE)
    assert short.stoi is None and any("too little speech" in note for note in short.notes)
    with pytest.raises(ValueError, match="audio .* finite"):
        compare_audio(voice(), np.full(100, np.nan), RATE)


def test_without_the_extra_it_says_how_to_install_it(monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name in ("pystoi", "pesq"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    quality = compare_audio(voice(), voice(), RATE)
    assert quality.stoi is None and quality.pesq is None
    assert [note.split(": pip install")[-1] for note in quality.notes] == [" 'lmspt-slm[eval]'", " 'lmspt-slm[pesq]'"]


def test_summary_counts_what_it_could_measure() -> None:
    clips = [compare_audio(voice(), 0.5 * voice(), RATE), compare_audio(voice(), 0 * voice(), RATE), None]
    summary = summarise_quality("reconstruction", "nano", clips)
    assert (summary.n_scored, summary.n_failed) == (2, 1) and summary.n_measured["level_difference_db"] == 1
    assert summary.level_difference_db == pytest.approx(-6.02, abs=0.01)
    assert "the clip is silent (1 clips)" in summary.notes
