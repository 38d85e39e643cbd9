"""Generation: legal ids, ends, budgets, seeds; and the recipes transcribe and synthesize."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from slm_tiny import CODES, FINGERPRINT, save_llm, tiny_tokenizer, utterances, write_corpus

from recipes import synthesize, transcribe
from recipes.config import ConfigError, load_config
from recipes.runtime import RunFolder
from slm.batches import SpeechSamples
from slm.generation import (
    GenerationError,
    SpeechLM,
    SynthesizeSettings,
    TranscribeSettings,
    synthesize_codes,
    transcribe_codes,
)
from slm.modeling import extend_with_speech, load_llm, save_slm
from slm.training import TrainingConfig, train
from slm.vocabulary import VocabularyError, add_speech


def make_slm(folder, n_codebooks: int = 1, chat: bool = False, **facts) -> SpeechLM:
    model, tokenizer, _ = load_llm(str(save_llm(folder / "llm", chat=chat)))
    facts = {"fingerprint": FINGERPRINT, "frame_rate": 12.5, "tokenizer": "tiny", "normaliser": "basic"} | facts
    vocabulary = add_speech(tokenizer, [CODES, CODES], n_codebooks=n_codebooks, **facts)
    extend_with_speech(model, vocabulary, seed=0)
    save_slm(model, tokenizer, vocabulary, folder / "slm")
    return SpeechLM.load(folder / "slm")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> SpeechLM:
    return make_slm(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SpeechLM:
    """Has learnt four sentences and their codes by heart."""
    speech_lm = make_slm(tmp_path_factory.mktemp("trained"), chat=True)
    rows, vocabulary = utterances(4), speech_lm.vocabulary
    texts = [vocabulary.encode_text(speech_lm.text_tokenizer, row["text"]) for row in rows]
    samples = SpeechSamples(vocabulary, [row["audio_codes"] for row in rows], texts, {"asr": 1.0, "tts": 1.0})
    config = TrainingConfig(steps=120, tokens_per_step=400, learning_rate=1e-2, warmup_steps=10, eval_steps=0)
    train(speech_lm.model, samples, None, config, tmp_path_factory.mktemp("checkpoints"), seed=1)
    speech_lm.model.eval()
    return speech_lm


def test_what_was_learnt_comes_back(trained: SpeechLM) -> None:
    rows = utterances(4)
    for beams in (1, 3):
        settings = TranscribeSettings(batch_size=3, num_beams=beams)
        heard = transcribe_codes(trained, [row["audio_codes"] for row in rows], settings)
        assert [output.text for output in heard] == [row["text"] for row in rows]
        assert not any(output.truncated for output in heard)
    for temperature in (0.0, 0.1):
        settings = SynthesizeSettings(batch_size=3, temperature=temperature)
        said = synthesize_codes(trained, [row["text"] for row in rows], settings)
        for output, row in zip(said, rows, strict=True):
            assert not output.truncated and (output.codes == row["audio_codes"][:1]).all()


def test_only_legal_ids_and_truncation_is_counted(untrained: SpeechLM) -> None:
    codes = [row["audio_codes"] for row in utterances(6)]
    heard = transcribe_codes(untrained, codes, TranscribeSettings(batch_size=4, tokens_per_s=2, min_tokens=3))
    for output, item in zip(heard, codes, strict=True):
        assert output.n_tokens <= 3 + np.ceil(item.shape[1] / 12.5 * 2)
        assert "<|" not in output.text
    assert any(output.truncated for output in heard)
    settings = SynthesizeSettings(temperature=1.0, min_seconds=0.4, seconds_per_character=0.0, seed=3)
    said = synthesize_codes(untrained, ["lay red"] * 20, settings, keys=[str(i) for i in range(20)])
    assert any(output.truncated for output in said) and any(not output.truncated for output in said)
    for output in said:
        assert 1 <= output.codes.shape[1] <= 5 and output.codes.max() < CODES
        assert output.codes.shape[1] == 5 or not output.truncated


def test_several_codebooks_take_turns(tmp_path) -> None:
    speech_lm = make_slm(tmp_path, n_codebooks=2)
    settings = SynthesizeSettings(temperature=2.0, top_k=0, min_seconds=1.0, seconds_per_character=0.0)
    for output in synthesize_codes(speech_lm, ["a", "b", "c"], settings):
        assert output.codes.shape[0] == 2 and 1 <= output.codes.shape[1] <= 13


def test_a_text_draws_the_same_whatever_its_batch(untrained: SpeechLM) -> None:
    texts = ["lay red", "set white in z four soon please again", "a", "bin blue"]
    settings = {"temperature": 1.0, "top_k": 8, "top_p": 0.9, "min_seconds": 1.0}

    def draw(batch_size: int, seed: int, order: list[int]) -> dict[str, list]:
        chosen = [texts[i] for i in order]
        outputs = synthesize_codes(untrained, chosen, SynthesizeSettings(batch_size=batch_size, seed=seed, **settings))
        return {text: output.codes.tolist() for text, output in zip(chosen, outputs, strict=True)}

    alone = draw(1, 5, [0, 1, 2, 3])
    assert alone == draw(4, 5, [0, 1, 2, 3]) == draw(2, 5, [3, 1, 0, 2])
    assert alone != draw(4, 6, [0, 1, 2, 3])


def test_draws_follow_the_softmax(untrained: SpeechLM) -> None:
    """The first code of many draws is distributed as the model says."""
    vocabulary, n = untrained.vocabulary, 600
    settings = SynthesizeSettings(batch_size=200, temperature=0.7, top_k=0, min_seconds=0.05, seconds_per_character=0.0)
    said = synthesize_codes(untrained, ["red"] * n, settings, keys=[f"k{i}" for i in range(n)])
    counts = np.bincount([int(output.codes[0, 0]) for output in said], minlength=CODES) / n
    from slm.sequences import tts_prompt

    prompt = tts_prompt(vocabulary, vocabulary.encode_text(untrained.text_tokenizer, "red"))
    with torch.no_grad():
        logits = untrained.model(input_ids=torch.from_numpy(prompt)[None]).logits[0, -1]
    expected = torch.softmax(logits[vocabulary.offsets[0] : vocabulary.offsets[0] + CODES] / 0.7, -1).numpy()
    assert np.abs(counts - expected).max() < 4 * np.sqrt(expected.max() / n)


def test_bad_input_is_told(untrained: SpeechLM, tmp_path) -> None:
    with pytest.raises(GenerationError, match="text 2 of 2 is empty"):
        synthesize_codes(untrained, ["a", " "])
    for settings in (TranscribeSettings, SynthesizeSettings):
        with pytest.raises(GenerationError, match="batch_size"):
            settings(batch_size=0)
    with pytest.raises(VocabularyError, match="slm finetune"):
        SpeechLM.load(save_llm(tmp_path / "llm"))
    assert transcribe_codes(untrained, []) == [] and synthesize_codes(untrained, []) == []


class StandIn:
    """The codec protocol with codes that say nothing."""

    ways_back = ("reconstruction", "semantic_reconstruction")

    def __init__(self) -> None:
        self.config = SimpleNamespace(sampling_rate=16000, frame_rate=12.5, codebook_sizes=[CODES, CODES])

    def fingerprint(self, precision: str = "fp32") -> str:
        return FINGERPRINT if precision == "fp32" else "0"

    def encode(self, input_values, padding_mask):
        frames = -(-input_values.shape[-1] // 1280)
        codes = torch.arange(frames).remainder(CODES).expand(len(input_values), 2, frames)
        return SimpleNamespace(audio_codes=codes, audio_codes_mask=torch.ones(len(input_values), frames, dtype=bool))

    def decode(self, audio_codes, lengths=None):
        assert audio_codes.shape[1] == 1  # book 0 alone: semantic reconstruction
        values = torch.sin(torch.arange(audio_codes.shape[-1] * 1280) * 0.05)
        return SimpleNamespace(audio_values=0.3 * values.expand(len(audio_codes), 1, -1))


@pytest.fixture
def recipe(tmp_path, untrained, monkeypatch):
    """(model folder, corpus, loader of a recipe's configuration) with the stand-in codec."""
    monkeypatch.setattr(transcribe, "load_tokenizer", lambda name, device=None: StandIn())
    save_slm(untrained.model, untrained.text_tokenizer, untrained.vocabulary, tmp_path / "slm")
    write_corpus(tmp_path / "codes")

    def config(module, *overrides: str):
        return load_config(module.Config, None, [f"model={tmp_path / 'slm'}", "device=cpu", *overrides])

    return config


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_transcribe_recipe(recipe, tmp_path, capsys) -> None:
    config = recipe(transcribe, f"corpus={tmp_path / 'codes'}", f"run_dir={tmp_path / 'run'}", "decoding.batch_size=3")
    assert transcribe.plan(config)["utterances"] == 4
    RunFolder(Path(config.model).parent).start(config).mark_complete({"steps": 7})  # the run that made the model
    rows = lines(transcribe.run(config))
    assert [row["id"] for row in rows] == ["u0", "u1", "u2", "u3"]
    assert all(row["task"] == "asr" and row["error"] is None and row["hypothesis"] is not None for row in rows)
    sidecar = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert sidecar["n"] == 4 and sidecar["fingerprint"] == FINGERPRINT and sidecar["real_time_factor"] > 0
    assert sidecar["trained_steps"] == 7
    assert transcribe.run(config).exists()
    shutil.rmtree(tmp_path / "codes")
    other = write_corpus(tmp_path / "codes", n=10)
    with pytest.raises(ConfigError, match="data or corpus"):
        transcribe.run(recipe(transcribe, f"corpus={other}", f"run_dir={tmp_path / 'run'}", "decoding.batch_size=3"))
    good, bad = tmp_path / "good.wav", tmp_path / "bad.flac"
    soundfile.write(good, np.sin(np.arange(16000) * 0.1) * 0.3, 16000)
    bad.write_text("no audio")
    texts = transcribe.run(recipe(transcribe, f"files=[{good}, {bad}]"))
    assert texts[str(good)] is not None and texts[str(bad)] is None
    assert "bad.flac" in capsys.readouterr().out
    kept = recipe(transcribe, f"files=[{good}]", f"run_dir={tmp_path / 'files'}")
    assert transcribe.run(kept) == transcribe.run(kept)
    soundfile.write(good, np.sin(np.arange(16000) * 0.2) * 0.3, 16000)
    with pytest.raises(ConfigError, match="files, data or corpus"):
        transcribe.run(kept)
    with pytest.raises(ValueError, match=r"none of the 1 files.*bad\.flac"):
        transcribe.run(recipe(transcribe, f"files=[{bad}]"))


def test_a_failed_recording_is_a_row(recipe, tmp_path) -> None:
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(16000) * 0.1) * 0.3, 16000)
    rows = [{"id": name, "audio": f"{name}.wav", "text": "lay red", "speaker": "s"} for name in ("a", "b")]
    rows = [row | {"duration": 1.0, "split": "test"} for row in rows]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"data.path={tmp_path / 'manifest.jsonl'}"
    heard = lines(transcribe.run(recipe(transcribe, source, f"run_dir={tmp_path / 'run'}")))
    assert heard[0]["hypothesis"] is not None and heard[0]["duration_s"] == 1.0
    assert heard[1]["hypothesis"] is None and "b.wav" in heard[1]["error"]
    assert json.loads((tmp_path / "run" / "predictions.json").read_text())["n_failed"] == 1
    said = lines(synthesize.run(recipe(synthesize, source, f"run_dir={tmp_path / 'said'}")))
    assert [row["text"] for row in said] == ["lay red", "lay red"]


def test_synthesize_recipe(recipe, tmp_path) -> None:
    short = ["decoding.min_seconds=1", "decoding.seconds_per_character=0"]
    config = recipe(synthesize, f"corpus={tmp_path / 'codes'}", f"run_dir={tmp_path / 'run'}", *short)
    assert synthesize.plan(config)["texts"] == 4
    rows = lines(synthesize.run(config))
    for row in rows:
        audio, rate = soundfile.read(tmp_path / "run" / row["audio"])
        assert rate == 16000 and len(audio) == row["n_codes"] * 1280 and row["task"] == "tts"
    sidecar = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert sidecar["seed"] == 0 and sidecar["decoding"]["temperature"] == 0.8
    out = tmp_path / "deep" / "out.wav"
    assert synthesize.run(recipe(synthesize, "text=Lay RED!", f"output={out}", *short)) == out
    assert soundfile.info(out).frames >= 1280
    with pytest.raises(ConfigError, match=r"output \(-o\).*run_dir"):
        recipe(synthesize, "text=red", f"output={out}", f"run_dir={tmp_path / 'both'}")
    with pytest.raises(ConfigError, match="nothing to say"):
        synthesize.run(recipe(synthesize, "text='?!'", f"output={out}"))


def test_recipes_refuse_other_codes_and_missing_input(recipe, tmp_path, monkeypatch) -> None:
    write_corpus(tmp_path / "other", fingerprint="0" * 64)
    with pytest.raises(ValueError, match="codes mean something else"):
        transcribe.run(recipe(transcribe, f"corpus={tmp_path / 'other'}", f"run_dir={tmp_path / 'r'}"))
    monkeypatch.setattr(StandIn, "fingerprint", lambda self, precision="fp32": "0")
    with pytest.raises(ValueError, match="codes mean something else"):
        synthesize.plan(recipe(synthesize, "text=a"))
    for module in (transcribe, synthesize):
        with pytest.raises(ConfigError, match="nothing to do"):
            module.plan(recipe(module))
        with pytest.raises(ConfigError, match="run_dir"):
            recipe(module, "corpus=x")
    with pytest.raises(ConfigError, match="give one of"):
        recipe(transcribe, "corpus=x", "data.path=y")


def test_file_names_never_meet() -> None:
    names = [synthesize.file_name(name) for name in ("a", "a/b", "a_b", "../a", "utt#1", "utt_1", ".a")]
    assert len(set(names)) == len(names) and all("/" not in name and not name.startswith(".") for name in names)
    assert tiny_tokenizer().eos_token_id is not None
