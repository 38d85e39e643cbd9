"""dMel and supervised semantic tokens: what they are made for, and the recipes on codecs that are not LM-SPT."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import tone
from test_codecs import dac, recogniser
from test_recogniser import corpus, labels
from transformers import AutoModel

from eval.results_file import load_results
from recipes.commands import encode, evaluate, train_teacher
from recipes.config import ConfigError, from_values
from recipes.inference.setup import decoding_tokenizer
from slm.corpus import CodedCorpus
from tokenizer import load_tokenizer
from tokenizer.codecs.dmel import HOPS
from tokenizer.codecs.supervised import SemanticQuantizerConfig, SupervisedTokenizerModel
from tokenizer.model.spectral import LogMel
from tokenizer.teacher.recogniser import Recogniser, RecogniserConfig, save_recogniser
from tokenizer.teacher.whisper import WhisperLogMel


def vowels(seconds: float) -> torch.Tensor:
    """(1, 1, S) harmonics whose colour changes four times a second."""
    time_s = torch.arange(int(seconds * 16_000)) / 16_000
    parts = [torch.sin(2 * torch.pi * 140 * n * time_s) / n for n in range(1, 20)]
    colours = torch.stack([sum(parts[i::4]) for i in range(4)])
    chosen = (time_s * 4).long() % 4
    return 0.1 * colours.gather(0, chosen[None])[None]


@pytest.mark.parametrize("name", HOPS)
def test_dmel_comes_back_as_the_spectrogram_it_was(name):
    tokenizer, speech = load_tokenizer(name), vowels(1.0)
    codes = tokenizer.encode(speech).audio_codes
    rate = tokenizer.config.frame_rate
    assert tokenizer.config.bitrate_bps == rate * 80 * 4 and 0 <= codes.min() and codes.max() <= 15
    back = tokenizer.decode(codes).audio_values
    assert back.shape[-1] == codes.shape[-1] * tokenizer.config.hop_length
    again = tokenizer.encode(back).audio_codes  # a waveform with these levels exists, and Griffin-Lim comes near it
    loud = codes > 6
    assert (again - codes)[loud].abs().float().mean() < 2.0
    mel = LogMel(16_000, 1024, 160, 40, 0.0, 1.0)
    heard, said = mel(back[:, 0, :16_000]), mel(speech[:, 0])
    still = mel(torch.zeros(1, 16_000))
    if rate >= 25:
        assert (heard - said).abs().mean() < 0.4 * (still - said).abs().mean()


def test_a_quantizer_is_off_unless_asked_for():
    plain = RecogniserConfig(hidden_size=64, encoder_layers=2, decoder_layers=1, n_mels=20, window_s=0.8)
    assert not any(name.startswith("quantizer") for name in Recogniser.from_scratch(plain).state_dict())
    with pytest.raises(ValueError, match="quantizer.layer=3.*window_s=0.5"):
        sizes = {"encoder_layers": 2, "window_s": 0.5}
        RecogniserConfig(**sizes, quantizer=SemanticQuantizerConfig(layer=3, frame_rate_hz=12.5))
    with pytest.raises(ValueError, match="layer=0.*frame_rate_hz=30"):
        SemanticQuantizerConfig(layer=0, frame_rate_hz=30)


SOUNDS = {"aaaa": 150.0, "bbbb": 400.0, "cccc": 900.0, "dddd": 2000.0}  # text -> pitch, Hz
LENGTHS = torch.tensor([12_800, 12_800, 12_800, 9_000])
WAVEFORMS = torch.stack([torch.from_numpy(tone(0.8, pitch_hz=pitch)) for pitch in SOUNDS.values()])
WAVEFORMS = WAVEFORMS.masked_fill(torch.arange(12_800) >= LENGTHS[:, None], 0.0)


def learn(model: Recogniser, steps: int) -> list[float]:
    """Trains on the four sounds by attention alone; returns the recognition losses."""
    model.train().config.apply_spec_augment = False
    optimizer, history = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(steps):
        losses = model(WhisperLogMel(20)(WAVEFORMS), labels(*SOUNDS), ctc_weight=0.0, lengths=LENGTHS)
        optimizer.zero_grad()
        losses.loss.backward()
        model.maintain_codebook()
        optimizer.step()
        history.append((losses.loss - (0 if losses.quantizer is None else losses.quantizer)).item())
    return history


@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_recognition_trains_the_codes(kind, tmp_path):
    """The loss falls through the quantizer, all of it learns, and the codes tell the sounds apart."""
    # Without hearing which sound it is, a model ends at 0.795 whatever its start. Four sounds are few: rounding decides
    # which starts part them in 100 steps, so one of several must.
    for seed in range(5):
        torch.manual_seed(seed)
        model = recogniser(kind=kind, fsq_levels=[5, 5], frame_rate_hz=12.5, revive_steps=5, warmup_batches=60)
        before = {name: value.clone() for name, value in model.quantizer.named_parameters()}
        history = learn(model, 100)
        if history[-1] < 0.76:
            break
    assert history[-1] < 0.76 < 2.0 < history[0]
    moved = {name for name, value in model.quantizer.named_parameters() if not torch.equal(value, before[name])}
    assert moved == set(before) and int(model.quantizer.batches) == 100

    save_recogniser(model.eval(), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(AutoModel.from_pretrained(tmp_path), SupervisedTokenizerModel)
    assert tokenizer.config.frame_rate == 12.5 and tokenizer.config.codebook_sizes == [16 if kind == "vq" else 25]
    codes = tokenizer.encode(WAVEFORMS[:, None], torch.arange(12_800) < LENGTHS[:, None]).audio_codes[:, 0]
    assert (codes >= 0).sum(1).tolist() == [10, 10, 10, 8]
    with torch.no_grad():  # what the recogniser reads in training is what the tokenizer writes
        model.ctc_logits(WhisperLogMel(20)(WAVEFORMS), LENGTHS)
    trained, valid = model._quantized[0].codes, model._quantized[1]
    assert (trained[valid] == codes[codes >= 0]).float().mean() > 0.9
    # how many of the four sounds it parts in 100 steps depends on rounding (threads); untaught codes part none
    assert len({tuple(row[:8].tolist()) for row in codes}) >= 2


def test_audio_longer_than_the_window_is_read_window_after_window(tmp_path):
    torch.manual_seed(0)
    save_recogniser(recogniser(), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    speech = vowels(2.0)
    whole = tokenizer.encode(speech).audio_codes
    window = 12_800
    pieces = [tokenizer.encode(speech[..., start : start + window]).audio_codes for start in (0, window, 2 * window)]
    assert whole.shape == (1, 1, 50) and torch.equal(whole, torch.cat(pieces, dim=-1))


def test_train_teacher_makes_a_tokenizer_that_encode_takes(tmp_path):
    corpus(tmp_path)
    sizes = {"hidden_size": 64, "encoder_layers": 2, "decoder_layers": 1, "n_mels": 20, "window_s": 1.0}
    quantizer = {"layer": 1, "frame_rate_hz": 25, "codebook_size": 16, "codebook_dim": 4, "revive_steps": 1}
    steps = {"steps": 3, "batch_size": 2, "save_steps": 3, "validate_steps": 3, "log_steps": 1}
    values = {"data": [{"path": str(tmp_path / "manifest.jsonl")}], "training": steps, "precision": "fp32"}
    plain = from_values(train_teacher.Config, values | {"run_dir": str(tmp_path / "plain"), "model": sizes})
    quantized = {"run_dir": str(tmp_path / "run"), "model": sizes | {"quantizer": quantizer}}
    with pytest.raises(ConfigError, match="init_from=.*nowhere: not a recogniser folder"):
        train_teacher.plan(from_values(train_teacher.Config, values | quantized | {"init_from": "nowhere"}))
    quantized["init_from"] = str(train_teacher.run(plain))
    folder = train_teacher.run(from_values(train_teacher.Config, values | quantized))
    codes = CodedCorpus.open(
        encode.run(
            from_values(
                encode.Config,
                {
                    "run_dir": str(tmp_path / "codes"),
                    "tokenizer": str(folder),
                    "data": values["data"],
                    "precision": "fp32",
                },
            )
        )
    )
    rows = list(codes.rows("train"))
    assert len(rows) == 5 and codes.metadata.frame_rate == 25 and codes.metadata.codebook_sizes == [16]
    assert all(row["audio_codes"].shape == (1, int(np.ceil(row["duration"] * 25 - 1e-6))) for row in rows)


@pytest.fixture
def test_set(tmp_path) -> str:
    lines = []
    for index in range(3):
        soundfile.write(tmp_path / f"{index}.wav", tone(0.4 + 0.2 * index), 16_000)
        line = {"id": str(index), "audio": f"{index}.wav", "text": "one two", "split": "test", "duration": 0.4}
        lines.append(json.dumps(line) + "\n")
    (tmp_path / "manifest.jsonl").write_text("".join(lines))
    return str(tmp_path / "manifest.jsonl")


@pytest.mark.parametrize("kind", ["dac", "dmel-40hz", "supervised"])
def test_encode_and_evaluate_run_on_other_codecs(kind, test_set, tmp_path):
    torch.manual_seed(0)
    name = str(tmp_path / "codec") if kind != "dmel-40hz" else kind
    if kind == "dac":
        dac().save_pretrained(name)
        name += ":2"
    elif kind == "supervised":
        save_recogniser(recogniser(), tmp_path / "codec")
    reader = RecogniserConfig(hidden_size=64, encoder_layers=1, decoder_layers=1, n_mels=80, window_s=1.0)
    save_recogniser(Recogniser.from_scratch(reader), tmp_path / "reader", decoder_trained=False)
    common = {"tokenizer": name, "data": [{"path": test_set}], "precision": "fp32"}
    coded = CodedCorpus.open(
        encode.run(from_values(encode.Config, common | {"run_dir": str(tmp_path / "codes"), "splits": ["test"]}))
    )
    tokenizer = load_tokenizer(name)
    assert coded.metadata.codebook_sizes == tokenizer.config.codebook_sizes
    assert coded.metadata.fingerprint == load_tokenizer(coded.metadata.tokenizer).fingerprint("fp32")
    judges = [{"name": str(tmp_path / "reader")}]
    scores = {"run_dir": str(tmp_path / "scores"), "judges": judges, "bootstrap_samples": 20, "samples": 1}
    results = load_results(evaluate.run(from_values(evaluate.Config, common | scores)))
    expected = ["ground_truth"] + ["reconstruction"] * bool(tokenizer.decode_paths)
    assert [row.system for row in results.rows] == expected
    assert all(row.n_scored == 3 for row in results.rows)
    assert len(results.codes[0].books) == len(tokenizer.config.codebook_sizes)
    if tokenizer.decode_paths:
        rate = tokenizer.config.frame_rate
        assert results.rows[1].bitrate_bps == pytest.approx(rate * {"dac": 2 * 4, "dmel-40hz": 320}[kind])


def test_synthesis_with_codes_that_cannot_sound_is_refused_beforehand(tmp_path, monkeypatch):
    save_recogniser(recogniser(), tmp_path)
    monkeypatch.setattr("recipes.inference.setup.speech_tokenizer", lambda *_: load_tokenizer(tmp_path))
    with pytest.raises(ConfigError, match="no decoder.*transcribe"):
        decoding_tokenizer(type("Config", (), {"tokenizer": "some-codes"}), None, "cpu")
