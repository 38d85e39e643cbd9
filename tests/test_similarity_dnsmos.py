"""The measures with a model of their own: they order real speech as a listener would, and nothing else moves them."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import soundfile

from eval.speech.measures import registry
from eval.speech.measures.registry import chosen_measures
from eval.speech.quality import compare_audio
from tokenizer.data.manifest import read_sources
from tokenizer.data.utterances import DataSource

RATE = 16_000
PACKAGES = {"similarity": ("resemblyzer",), "dnsmos": ("speechmos", "onnxruntime")}


def needs(name: str) -> pytest.MarkDecorator:
    absent = not all(map(find_spec, PACKAGES[name]))
    return pytest.mark.skipif(absent, reason=f"extra `{name}` is not installed")


@pytest.fixture(scope="module")
def clips(shared_data) -> dict[str, list[np.ndarray]]:
    """Two sentences each of four speakers."""
    found: dict[str, list[np.ndarray]] = {}
    for name in ("vctk-excerpt", "ljspeech-excerpt"):
        manifest = shared_data / name / "manifest.jsonl"
        if not manifest.is_file():
            pytest.skip(f"{manifest} is not here")
        for utterance in read_sources([DataSource(str(manifest))], "train"):
            audio, rate = soundfile.read(utterance.audio, dtype="float32")
            if rate == RATE and len(audio) > 2 * rate and len(found.setdefault(utterance.speaker, [])) < 2:
                found[utterance.speaker].append(audio)
    return {speaker: two for speaker, two in found.items() if len(two) == 2}


def measured(name: str, audio: np.ndarray, reference: np.ndarray | None = None) -> dict[str, float]:
    found = compare_audio(reference, audio, RATE, measures=chosen_measures([name]))
    assert not found.notes
    return found.values


def changed(audio: np.ndarray) -> list[np.ndarray]:
    """The same voice, quieter and before silence."""
    return [0.2 * audio, np.concatenate([np.zeros(3000, np.float32), audio, np.zeros(2 * RATE, np.float32)])]


@needs("similarity")
def test_a_speaker_is_nearer_to_himself_than_to_another(clips) -> None:
    assert len(clips) >= 3

    def similarity(one: np.ndarray, other: np.ndarray) -> float:
        return measured("similarity", one, other)["similarity"]

    own = {speaker: similarity(*two) for speaker, two in clips.items()}
    others = {
        speaker: max(similarity(two[0], other[1]) for name, other in clips.items() if name != speaker)
        for speaker, two in clips.items()
    }
    assert all(own[speaker] > others[speaker] + 0.05 for speaker in own), (own, others)
    first = next(iter(clips.values()))
    assert similarity(first[0], first[0]) == pytest.approx(1, abs=1e-5)
    for other in changed(first[0]):
        assert similarity(other, first[1]) == pytest.approx(similarity(*first), abs=1e-3)


@needs("dnsmos")
def test_noise_lowers_dnsmos(clips) -> None:
    audio = next(iter(clips.values()))[0]
    noise = np.random.default_rng(0).standard_normal(len(audio)).astype(np.float32)
    clean, little, much = (measured("dnsmos", audio + level * noise) for level in (0.0, 0.003, 0.03))
    assert set(clean) == {"dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl"}
    assert all(1 < value < 5 for value in clean.values())
    for key in ("dnsmos_bak", "dnsmos_ovrl"):
        assert clean[key] > little[key] > much[key]
    for other in changed(audio):
        assert measured("dnsmos", other) == pytest.approx(clean, abs=0.01)


@pytest.mark.parametrize("name", list(PACKAGES))
def test_what_they_cannot_judge_is_a_named_gap(name, monkeypatch) -> None:
    (measure,) = chosen_measures([name])
    tone = np.sin(np.arange(RATE) / 9).astype(np.float32)
    silent = compare_audio(tone, 0 * tone, RATE, measures=[measure])
    assert silent.notes == ["the clip is silent"] and set(silent.values.values()) == {None}
    if all(map(find_spec, PACKAGES[name])):
        short = compare_audio(tone, tone[:2000], RATE, measures=[measure])
        assert short.notes == [f"{measure.title}: less than 0.4 s of sound"] and None in short.values.values()
    registry.loaded.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    absent = compare_audio(tone, tone, RATE, measures=[measure])
    registry.loaded.cache_clear()
    assert absent.notes == [f"{measure.title}: install the extra: pip install 'lmspt-slm[{name}]'"]


@needs("similarity")
def test_nobody_downloads_or_imports_the_encoder_s_package() -> None:
    tone = np.sin(np.arange(RATE) / 9).astype(np.float32)
    measured("similarity", tone, tone)
    assert "resemblyzer" not in sys.modules
