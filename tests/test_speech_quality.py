"""Audio quality against a reference: identities, order, and the edges."""

from __future__ import annotations

import builtins

import numpy as np
import pytest

from eval.speech.audio import resample
from eval.speech.measures import registry
from eval.speech.measures.registry import Measure, MeasureError, chosen_measures, columns_of, register_measure
from eval.speech.measures.waveform import log_mel_db
from eval.speech.quality import compare_audio, summarise_quality

RATE = 16_000


def voice(seconds: float = 2.0) -> np.ndarray:
    """A buzzing vowel with syllables: enough like speech for STOI and PESQ."""
    time = np.arange(int(seconds * RATE)) / RATE
    buzz = sum(np.sin(2 * np.pi * 120 * k * time) / k for k in range(1, 30))
    return (0.1 * buzz * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * time))).astype(np.float32)


def test_a_clip_against_itself() -> None:
    quality = compare_audio(voice(), voice(), RATE)
    assert (
        quality.values["mel_distance_db"] == 0
        and quality.values["level_difference_db"] == 0
        and quality.length_difference_s == 0
    )


def test_more_noise_is_worse_by_every_measure() -> None:
    pytest.importorskip("pystoi", reason="extra `eval` is not installed")
    pytest.importorskip("pesq", reason="extra `pesq` is not installed")
    noise = np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32)
    little, much = (compare_audio(voice(), voice() + level * noise, RATE) for level in (0.002, 0.1))
    assert little.values["mel_distance_db"] < much.values["mel_distance_db"]
    assert little.values["stoi"] > much.values["stoi"]
    assert little.values["pesq"] > much.values["pesq"]


def test_a_long_clip_is_measured_in_pieces() -> None:
    """Memory does not grow with the length, and the means are those of the pieces."""
    lengths: list[float] = []

    def seconds(audio: np.ndarray, reference: np.ndarray) -> float:
        assert len(audio) == len(reference)
        lengths.append(len(audio) / RATE)
        return lengths[-1]

    def never(audio: np.ndarray) -> float:
        raise MeasureError("no")

    toys = [
        *chosen_measures(["level_difference_db"]),
        Measure("seconds", "seconds", "Length of a piece", "none", seconds),
        Measure("never", "Never", "None", "none", never, needs_reference=False),
    ]
    reference = np.tile(voice(2.0), 50)
    longer = np.concatenate([0.5 * reference, reference[:RATE]])
    quality = compare_audio(reference, longer, RATE, measures=toys)
    assert lengths == [25.0] * 4 and quality.length_difference_s == 1.0
    assert quality.values["level_difference_db"] == pytest.approx(-6.02, abs=0.01)
    assert quality.values["seconds"] == 25.0 and quality.values["never"] is None and quality.notes == ["Never: no"]


def test_mel_level_is_in_decibels() -> None:
    quality = compare_audio(voice(), 0.5 * voice(), RATE)
    assert quality.values["level_difference_db"] == pytest.approx(-6.02, abs=0.01)
    tone = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    assert log_mel_db(tone).max() - log_mel_db(0.1 * tone).max() == pytest.approx(20, abs=0.01)
    assert log_mel_db(np.zeros(RATE)).max() == pytest.approx(-80)


def test_lengths_rates_and_silence() -> None:
    quality = compare_audio(voice(2.0), voice(2.0)[: int(1.5 * RATE)], RATE)
    assert quality.length_difference_s == pytest.approx(-0.5) and quality.values["mel_distance_db"] < 0.5
    slower = compare_audio(voice(), voice()[::2], RATE, audio_sampling_rate=RATE // 2)
    assert slower.length_difference_s == 0 and slower.values["level_difference_db"] == pytest.approx(0, abs=0.5)
    silent = compare_audio(voice(), 0 * voice(), RATE)
    assert silent.values["stoi"] is None and silent.values["pesq"] is None and "clip is silent" in silent.notes[0]
    short = compare_audio(voice(0.05), voice(0.05), RATE)
    assert short.values["stoi"] is None and any("too little speech" in note for note in short.notes)
    with pytest.raises(ValueError, match="audio .* finite"):
        compare_audio(voice(), np.full(100, np.nan), RATE)


def test_added_zeros_and_another_rate_change_no_verdict() -> None:
    """Of every measure that is computed by default, whose packages are there."""
    clean = voice()
    noisy = clean + 0.01 * np.random.default_rng(0).standard_normal(len(clean)).astype(np.float32)
    wanted = compare_audio(clean, noisy, RATE)
    longer = compare_audio(clean, np.pad(noisy, (0, RATE * 3 // 2)), RATE)
    assert longer.length_difference_s == 1.5
    for hz in (24_000, 48_000):
        higher = compare_audio(clean, resample(noisy, RATE, hz), RATE, audio_sampling_rate=hz)
        both = compare_audio(resample(clean, RATE, hz), resample(noisy, RATE, hz), hz)
        for name, value in wanted.values.items():
            if value is None:
                continue
            assert longer.values[name] == pytest.approx(value, rel=1e-6), name
            for found in (higher, both):  # what lies above the resampler's pass band is lost
                assert found.values[name] == pytest.approx(value, rel=0.1, abs=0.05), (name, hz)


def test_without_the_extra_it_says_how_to_install_it(monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name in ("pystoi", "pesq"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    registry.loaded.cache_clear()
    quality = compare_audio(voice(), voice(), RATE)
    registry.loaded.cache_clear()
    assert quality.values["stoi"] is None and quality.values["pesq"] is None
    assert [note.split(": pip install")[-1] for note in quality.notes] == [" 'lmspt-slm[eval]'", " 'lmspt-slm[pesq]'"]


def test_summary_counts_what_it_could_measure() -> None:
    clips = [compare_audio(voice(), 0.5 * voice(), RATE), compare_audio(voice(), 0 * voice(), RATE), None]
    summary = summarise_quality("reconstruction", "nano", clips)
    assert (summary.n_scored, summary.n_failed) == (2, 1) and summary.n_measured["level_difference_db"] == 1
    assert summary.values["level_difference_db"] == pytest.approx(-6.02, abs=0.01)
    assert "the clip is silent (1 clips)" in summary.notes


def test_a_measure_gets_what_it_asks_for() -> None:
    """A loader runs once, the clip comes at the measure's rate, the recording only where it is needed, in whole."""
    loads, seen = [], []

    def load() -> str:
        loads.append(1)
        return "model"

    def alone(model: str, audio: np.ndarray) -> dict[str, float]:
        seen.append((model, len(audio)))
        return {"low": 1.0, "high": 2.0}

    def unaligned(audio: np.ndarray, reference: np.ndarray) -> float:
        return len(audio) / len(reference)

    toys = [
        Measure(
            "a",
            "A",
            "A",
            "higher",
            alone,
            load=load,
            sampling_rate=8_000,
            needs_reference=False,
            parts={"low": "L", "high": "H"},
        ),
        Measure("b", "B", "B", "higher", unaligned, time_aligned=False),
    ]
    for _ in range(2):
        quality = compare_audio(voice(1.0), voice(2.0), RATE, measures=toys)
    assert quality.values == {"a_low": 1.0, "a_high": 2.0, "b": 2.0} and quality.notes == []
    assert loads == [1] and seen == [("model", 16_000)] * 2
    alone_quality = compare_audio(None, voice(2.0), RATE, measures=toys)
    assert alone_quality.values == {"a_low": 1.0, "a_high": 2.0, "b": None}
    assert alone_quality.notes == ["B: there is no recording to compare with"]
    summary = summarise_quality("x", "m", [quality, None], measures=toys)
    assert summary.values["a_high"] == 2.0 and summary.n_measured == {"a_low": 1, "a_high": 1, "b": 1}


@pytest.mark.parametrize(
    ("fails", "note"),
    [
        (lambda audio: 1 / 0, "Toy: failed with ZeroDivisionError('division by zero')"),
        (lambda audio: float("nan"), "Toy: gave no finite number"),
        (lambda audio: {"low": 1.0}, "Toy: failed with TypeError"),
    ],
)
@pytest.mark.filterwarnings("ignore:measure toy failed")
def test_a_measure_that_fails_is_a_named_gap_and_costs_no_other(fails, note) -> None:
    toys = [Measure("toy", "Toy", "Toy", "higher", fails, needs_reference=False), *chosen_measures()]
    quality = compare_audio(voice(), voice(), RATE, measures=toys)
    assert quality.values["toy"] is None and quality.values["mel_distance_db"] == 0
    assert quality.notes[0].startswith(note)


def test_a_loader_that_fails_is_asked_once() -> None:
    calls = []

    def load() -> None:
        calls.append(1)
        raise OSError("no weights")

    toy = Measure("toy", "Toy", "Toy", "higher", lambda *_: 1.0, load=load)
    with pytest.warns(RuntimeWarning, match="measure toy failed: OSError"):
        found = [compare_audio(voice(), voice(), RATE, measures=[toy]) for _ in range(3)]
    assert calls == [1] and all(quality.notes == ["Toy: failed with OSError('no weights')"] for quality in found)


def test_names_are_kept_apart(monkeypatch) -> None:
    monkeypatch.setattr(registry, "_MEASURES", dict(registry._MEASURES))
    stoi = registry.measures()["stoi"]
    assert register_measure(stoi) is stoi  # the same again is no error
    for toy, message in (
        (Measure("stoi", "S", "S", "higher", abs), "'stoi' is there already"),
        (Measure("n_failed", "S", "S", "higher", abs), "hold 'n_failed' already"),
        (Measure("dnsmos_sig", "S", "S", "higher", abs), "hold 'dnsmos_sig' already"),
        (Measure("toy", "S", "S", "best", abs), "better 'best' must be"),
    ):
        with pytest.raises(MeasureError, match=message):
            register_measure(toy)
    with pytest.raises(MeasureError, match="measures: stio unknown; there are mel_distance_db"):
        chosen_measures(["stio"])
    assert [measure.name for measure in chosen_measures(["pesq", "stoi"])] == ["stoi", "pesq"]
    assert [column.heading for column in columns_of(["other", "level_difference_db", "stoi"])] == [
        "STOI",
        "level dB",
        "other",
    ]
