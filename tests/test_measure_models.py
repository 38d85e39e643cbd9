"""Measures whose model is named: WavLM's x-vectors and UTMOS, by small stand-ins in the places of theirs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

from eval.speech.measures import registry
from eval.speech.measures.registry import MeasureError, chosen_measures
from eval.speech.quality import compare_audio, summarise_quality

RATE = 16_000
# A repository for torch.hub as theirs is: an opinion that falls with what is above the tone.
HUBCONF = """
import torch
dependencies = ["torch"]


class Predictor(torch.nn.Module):
    def forward(self, wave, sr):
        assert wave.ndim == 2 and sr == 16000
        spectrum = torch.fft.rfft(wave).abs().square()
        return 1 + 4 * spectrum[:, : spectrum.shape[1] // 4].sum(-1) / spectrum.sum(-1)


def utmos22_strong(progress=True):
    return Predictor()
"""


@pytest.fixture(autouse=True)
def nothing_loaded():
    registry.loaded.cache_clear()
    yield
    registry.loaded.cache_clear()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    torch.manual_seed(0)
    voices = tmp_path_factory.mktemp("xvector")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"conv_dim": (8, 8), "conv_stride": (20, 16), "conv_kernel": (20, 16), "num_feat_extract_layers": 2}
    sizes |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "xvector_output_dim": 8}
    sizes |= {"tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "feat_extract_norm": "layer"}
    WavLMForXVector(WavLMConfig(**sizes)).save_pretrained(voices)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True).save_pretrained(voices)
    opinions = tmp_path_factory.mktemp("utmos")
    (opinions / "hubconf.py").write_text(HUBCONF, "utf-8")
    return {"wavlm_similarity": str(voices), "utmos": str(opinions)}


def tone(hz: float, noise: float = 0.0) -> np.ndarray:
    """A second and a half of a note with overtones."""
    at = np.arange(int(1.5 * RATE)) / RATE
    sound = sum(np.sin(2 * np.pi * k * hz * at) / k for k in range(1, 6)) / 8
    return (sound + noise * np.random.default_rng(0).standard_normal(len(at))).astype(np.float32)


@pytest.mark.parametrize("name", ["wavlm_similarity", "utmos"])
def test_a_verdict_does_not_change_with_level_or_silence_around(models, name) -> None:
    (measure,) = chosen_measures([name], {name: models[name]})

    def measured(audio: np.ndarray, hz: int = RATE) -> float:
        found = compare_audio(tone(150), audio, RATE, hz, [measure])
        assert not found.notes
        return found.values[name]

    plain, noisy = measured(tone(150)), measured(tone(150, 0.2))
    assert plain > noisy + 0.01
    padded = np.concatenate([np.zeros(3000, np.float32), tone(150, 0.2), np.zeros(RATE, np.float32)])
    assert measured(0.2 * tone(150, 0.2)) == pytest.approx(noisy, abs=1e-3)
    assert measured(padded) == pytest.approx(noisy, abs=1e-3)
    summary = summarise_quality("tts", "", [compare_audio(tone(150), tone(150), RATE, measures=[measure])] * 2)
    assert summary.notes == [] and name not in summary.values  # a default set has neither
    own = summarise_quality(
        "tts", "", [compare_audio(tone(150), tone(150), RATE, measures=[measure])], measures=[measure]
    )
    assert own.notes == [f"{measure.title} by {models[name]}"]  # two models are two measures: which one is said


@pytest.mark.parametrize("name", ["wavlm_similarity", "utmos"])
def test_weights_that_are_not_there_are_a_named_gap_and_cost_no_other_measure(monkeypatch, tmp_path, name) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("torch.hub.load", lambda *_, **__: (_ for _ in ()).throw(OSError("no route to host")))
    absent = str(tmp_path / "absent")
    some = chosen_measures(["mel_distance_db", name], {name: absent})
    found = compare_audio(tone(150), tone(150, 0.1), RATE, measures=some)
    assert found.values[name] is None and found.values["mel_distance_db"] > 0
    (note,) = found.notes
    assert (
        note.startswith(f"{some[-1].title}: {absent} cannot be loaded") and f"measure_models={{{name}: FOLDER}}" in note
    )
    assert summarise_quality("tts", "", [found] * 3, measures=some).notes == [f"{note} (3 clips)"]


def test_a_short_clip_is_a_gap_and_a_wrong_name_is_refused(models) -> None:
    for measure in chosen_measures(list(models), models):
        assert compare_audio(tone(150), tone(150)[:2000], RATE, measures=[measure]).notes == [
            f"{measure.title}: less than 0.4 s of sound"
        ]
    with pytest.raises(MeasureError, match=r"stoi takes no model; those that do are .*utmos"):
        chosen_measures(["stoi"], {"stoi": "x"})


# Their code as far as it is called: a voice is where its energy lies.
VERIFICATION = """
import torch
from neighbour import BANDS


def init_model(model_name, checkpoint=None):
    assert model_name == "wavlm_large"
    gain = torch.load(checkpoint)["model"]["gain"]

    class Network(torch.nn.Module):
        def forward(self, wave):
            assert wave.ndim == 2
            spectrum = torch.fft.rfft(wave).abs().square() * gain
            return torch.stack([band.sum(-1) for band in spectrum.chunk(BANDS, -1)], -1)

    return Network()
"""


def test_the_network_of_seed_tts_eval_is_loaded_by_its_own_code_or_named_as_missing(tmp_path) -> None:
    def measured(audio: np.ndarray):
        (measure,) = chosen_measures(["wavlm_ecapa_similarity"], {"wavlm_ecapa_similarity": str(tmp_path)})
        registry.loaded.cache_clear()
        return compare_audio(tone(150), audio, RATE, RATE, [measure])

    (tmp_path / "verification.py").write_text(VERIFICATION, "utf-8")
    gap = measured(tone(150))
    assert gap.values["wavlm_ecapa_similarity"] is None
    assert "no wavlm_large_finetune.pth there" in gap.notes[0] and "speaker_verification" in gap.notes[0]
    torch.save({"model": {"gain": torch.tensor(2.0)}}, tmp_path / "wavlm_large_finetune.pth")
    assert "No module named 'neighbour'" in measured(tone(150)).notes[0]
    (tmp_path / "neighbour.py").write_text("BANDS = 256", "utf-8")
    same, other = (measured(tone(hz)).values["wavlm_ecapa_similarity"] for hz in (150, 400))
    assert same == pytest.approx(1.0) and other < 0.9
