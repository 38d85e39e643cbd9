"""A second stage behind a tokenizer as a codec: `decode(codes, reference=...)`, and supervised tokens' way back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import tone
from slm_tiny import tiny_model
from slm_tiny import tiny_tokenizer as text_tokenizer_of
from test_acoustic_speech import Deaf

from eval.results_file import load_results
from recipes.commands import encode, evaluate, synthesize, train_acoustic
from recipes.config import ConfigError, from_values, load_config
from recipes.encoding.joined import joined_rows
from recipes.inference.voiced_codec import load_voiced_codec
from recipes.scoring import evaluation, judges
from slm.acoustic.configuration import AcousticError
from slm.corpus import CodedCorpus
from slm.model.modeling import save_slm
from slm.model.speech_rows import extend_with_speech
from slm.vocabulary import add_speech
from tokenizer import load_tokenizer
from tokenizer.codecs.supervised import SemanticQuantizerConfig
from tokenizer.data.utterances import AudioError
from tokenizer.teacher.recogniser import Recogniser, RecogniserConfig, save_recogniser

SIZES = {"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 32, "code_dim": 8, "dropout": 0.0}


@pytest.fixture
def tiny_tokenizer_folder(request) -> Path:
    """The shared tiny LM-SPT tokenizer of 12.5 Hz, whose fixture has the name of a function here."""
    return request.getfixturevalue("tiny_tokenizer")


def supervised(folder: Path, frame_rate_hz: float = 12.5) -> Path:
    """A recogniser's tokens of 16 entries, untrained."""
    torch.manual_seed(0)
    quantizer = SemanticQuantizerConfig(layer=1, frame_rate_hz=frame_rate_hz, codebook_size=16, warmup_batches=0)
    sizes = {"hidden_size": 64, "encoder_layers": 2, "decoder_layers": 1, "n_mels": 20, "window_s": 1.6}
    save_recogniser(Recogniser.from_scratch(RecogniserConfig(**sizes, quantizer=quantizer)), folder)
    return folder


@pytest.fixture
def stage(tmp_path, tiny_tokenizer_folder, make_corpus):
    """A trainer of a stage that lends supervised tokens the decoder of LM-SPT; `tmp_path` holds both corpora."""
    manifest = make_corpus(6)
    for name, tokenizer in (("given", supervised(tmp_path / "supervised")), ("decoder", tiny_tokenizer_folder)):
        values = {"tokenizer": str(tokenizer), "data": [{"path": str(manifest)}], "precision": "fp32"}
        encode.run(from_values(encode.Config, values | {"run_dir": str(tmp_path / name), "splits": ["train"]}))

    def config(objective: str = "flow", **changes):
        values = {"run_dir": str(tmp_path / objective), "corpus": str(tmp_path / "given"), "objective": objective}
        values |= {"decoder_corpus": str(tmp_path / "decoder"), "min_prompt_s": 0.3, "max_prompt_s": 0.6}
        values |= {"sizes": SIZES, "training": {"steps": 2, "batch_size": 2, "warmup_steps": 1, "eval_steps": 2}}
        values |= {"device": "cpu", "precision": "fp32", "latents": {"variance": 1.0}}
        return from_values(train_acoustic.Config, values | changes)

    return config


def waveform(pitch_hz: float, seconds: float = 0.8) -> torch.Tensor:
    """(1, 1, S)."""
    return torch.from_numpy(np.asarray(tone(seconds, pitch_hz=pitch_hz), dtype=np.float32))[None, None]


def test_what_is_predicted_of_codes_without_a_decoder_are_all_books_of_the_other(stage, tmp_path):
    config = stage()
    corpus = train_acoustic.open_corpus(config)
    data = train_acoustic.read_data(config, corpus)
    assert data.model.codebook_sizes == [16, 32, 16, 16] and data.model.n_added_books == 3
    model, codec = train_acoustic.new_model(data, 0), load_tokenizer(data.model.decoder["tokenizer"])
    (row, *_) = joined_rows(config, corpus, "train")
    own = next(one for one in CodedCorpus.open(tmp_path / "decoder").rows("train") if one["id"] == row["id"])
    codes = torch.from_numpy(row["audio_codes"])[None]
    assert np.array_equal(row["audio_codes"][1:], own["audio_codes"]) and len(row["audio_codes"]) == 4
    with torch.inference_mode():
        latents = model.space.latents(model.points(codes), codes[:, 0]).transpose(1, 2)
        assert torch.allclose(latents, codec.latents_of(codes[:, 1:]), atol=1e-4)


@pytest.mark.parametrize("objective", ["flow", "masked"])
def test_supervised_tokens_speak_in_the_voice_that_is_given(stage, tmp_path, objective):
    train_acoustic.run(stage(objective))
    codec = load_voiced_codec(tmp_path / objective / "model")
    values = torch.zeros(2, 1, 12800)
    values[0], values[1, :, :9000] = waveform(180.0)[0], waveform(260.0)[0, :, :9000]
    mask = torch.arange(12800)[None] < torch.tensor([[12800], [9000]])
    codes = codec.encode(values, mask).audio_codes
    low, high = waveform(110.0), waveform(400.0)
    together = codec.decode(codes, torch.tensor([12800, 9000]), reference=torch.cat([low, high])).audio_values
    assert together.shape == (2, 1, 12800) and (together[1, 0, 9000:] == 0).all() and together.isfinite().all()
    alone = codec.decode(codes[1:, :, :8], torch.tensor([9000]), reference=high).audio_values
    torch.testing.assert_close(together[1:, :, :9000], alone, atol=1e-4, rtol=1e-3)
    for_all = codec.decode(codes, reference=low).audio_values
    assert for_all.shape[-1] == codes.shape[-1] * 1280 and not torch.allclose(for_all[1, 0, :9000], alone[0, 0])
    with pytest.raises(ValueError, match="no decoder.*train-acoustic decoder_corpus"):
        codec.decode(codes)
    with pytest.raises(ValueError, match=r"reference must be of shape \(1 or 2, 1, P\)"):
        codec.decode(codes, reference=low[0])
    with pytest.raises(AudioError, match="reference 0: silent"):
        codec.decode(codes, reference=torch.zeros(1, 1, 16000))


def test_an_lm_spt_tokenizer_s_book_0_speaks_in_the_voice_that_is_given(stage, tmp_path, tiny_tokenizer_folder):
    train_acoustic.run(stage("regression", corpus=str(tmp_path / "decoder"), decoder_corpus=""))
    codec, plain = load_voiced_codec(tmp_path / "regression" / "model"), load_tokenizer(tiny_tokenizer_folder)
    codes = codec.encode(waveform(180.0)).audio_codes[:, :1]
    one, other = (codec.decode(codes, reference=waveform(pitch)).audio_values for pitch in (110.0, 400.0))
    assert one.shape == other.shape == (1, 1, 12800) and not torch.allclose(one, other, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(codec.decode(codes).audio_values, plain.decode(codes).audio_values)
    with pytest.raises(ValueError, match="reference: this codec decodes codes as they are.*train-acoustic"):
        plain.decode(codes, reference=waveform(110.0))


def test_an_slm_of_supervised_tokens_is_heard_through_the_stage_and_scored(stage, tmp_path, make_corpus, monkeypatch):
    train_acoustic.run(stage())
    codec, words = load_tokenizer(tmp_path / "supervised"), text_tokenizer_of()
    facts = {"fingerprint": codec.fingerprint("fp32"), "tokenizer": str(tmp_path / "supervised"), "precision": "fp32"}
    vocabulary = add_speech(words, codec.config.codebook_sizes, n_codebooks=1, frame_rate=12.5, **facts)
    model = tiny_model("qwen2", len(words))
    extend_with_speech(model, vocabulary, 0)
    save_slm(model, words, vocabulary, tmp_path / "slm")
    soundfile.write(tmp_path / "voice.wav", tone(1.0, 16000, 110.0), 16000)
    own = [f"model={tmp_path / 'slm'}", "device=cpu", "text=lay red", "decoding.min_seconds=1"]
    own += [f"output={tmp_path / 'out.wav'}"]
    lent = [f"acoustic={tmp_path / 'flow' / 'model'}", f"voice={tmp_path / 'voice.wav'}"]
    assert synthesize.plan(load_config(synthesize.Config, None, [*own, *lent]))["sampling rate (Hz)"] == 16000
    said, rate = soundfile.read(synthesize.run(load_config(synthesize.Config, None, [*own, *lent])))
    assert rate == 16000 and len(said) >= 12800 and len(said) % 1280 == 0 and np.abs(said).max() > 0
    with pytest.raises(ConfigError, match=r"no decoder.*train-acoustic decoder_corpus=.*acoustic="):
        synthesize.plan(load_config(synthesize.Config, None, own))
    values = {"tokenizer": str(tmp_path / "supervised"), "data": [{"path": str(make_corpus(3, "test", "more"))}]}
    values |= {"acoustic": str(tmp_path / "flow" / "model"), "run_dir": str(tmp_path / "scores"), "precision": "fp32"}
    monkeypatch.setattr(evaluation, "check_judge", lambda config: Deaf().identity)
    monkeypatch.setattr(judges, "load_judge", lambda config, device: Deaf())
    values |= {"judges": [{"name": "deaf"}], "measures": ["mel_distance_db"], "samples": 1, "device": "cpu"}
    results = load_results(evaluate.run(from_values(evaluate.Config, values)))
    assert [(row.system, row.n_scored) for row in results.rows] == [("ground_truth", 3), ("acoustic_stage", 3)]


def test_what_does_not_fit_is_refused_by_key(stage, tmp_path, make_corpus):
    with pytest.raises(ConfigError, match="decoder_corpus: .* same tokenizer"):
        train_acoustic.plan(stage(decoder_corpus=str(tmp_path / "given")))
    other = supervised(tmp_path / "faster", 25.0)
    values = {"tokenizer": str(other), "precision": "fp32", "splits": ["train"]}
    values |= {"data": [{"path": str(tmp_path / "corpus" / "manifest.jsonl")}], "run_dir": str(tmp_path / "25hz")}
    encode.run(from_values(encode.Config, values))
    with pytest.raises(ConfigError, match="decoder_corpus: .*12.5 frames a second and .* 25: encode with"):
        train_acoustic.plan(stage(corpus=str(tmp_path / "25hz")))
    elsewhere = make_corpus(3, name="elsewhere")
    lines = [json.loads(line) | {"id": f"x{n}"} for n, line in enumerate(elsewhere.read_text().splitlines())]
    elsewhere.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values |= {"tokenizer": str(tmp_path / "supervised"), "data": [{"path": str(elsewhere)}]}
    encode.run(from_values(encode.Config, values | {"run_dir": str(tmp_path / "others")}))
    with pytest.raises(ConfigError, match="decoder_corpus: .* has none of the train recordings of"):
        train_acoustic.plan(stage(corpus=str(tmp_path / "others")))


def test_a_decoder_that_is_another_by_now_is_refused(stage, tmp_path):
    folder = train_acoustic.run(stage())
    settings = json.loads((folder / "config.json").read_text())
    settings["decoder"]["fingerprint"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(AcousticError, match="speaks through the decoder of .* another one by now"):
        load_voiced_codec(folder)
