"""Generation: legal ids, ends, budgets, seeds; and the recipes transcribe and synthesize."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from slm_tiny import CODES, FINGERPRINT, save_llm, tiny_tokenizer, tokens_of, utterances, write_corpus

from recipes.commands import synthesize, transcribe
from recipes.config import ConfigError, load_config
from recipes.inference import setup
from recipes.inference.long_recordings import encode_pieces
from recipes.inference.scripts import file_name
from recipes.runs.run_folder import RunFolder
from slm.decoding.row_rules import Grammar, LegalIds, SeededSampling
from slm.decoding.running_batch import RunningBatch
from slm.generation import SpeechLM, synthesize_codes, transcribe_codes
from slm.modeling import load_llm, save_slm
from slm.settings import GenerationError, SpeechLimits, SynthesizeSettings, TranscribeSettings, speech_limits
from slm.speech_rows import extend_with_speech
from slm.tasks import Task, get_task, register, registry
from slm.tasks.registry import Mark, Speech, Text, Turn
from slm.trained_on import TrainedOn
from slm.training.config import TrainingConfig
from slm.training.samples import SpeechSamples
from slm.training.trainer import train
from slm.vocabulary import SYNTHESIZE, VocabularyError, add_speech
from tokenizer.data.utterances import Utterance


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
    vocabulary = speech_lm.vocabulary
    tokens = tokens_of(vocabulary, speech_lm.text_tokenizer, utterances(4))
    samples = SpeechSamples(vocabulary, tokens, {"asr": 1.0, "tts": 1.0})
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


def test_one_long_recording_does_not_pad_the_others(untrained: SpeechLM, monkeypatch) -> None:
    """Prompts are read beside others of like lengths, and bounded in seconds; what is written does not depend on it."""
    rng, read, running = np.random.default_rng(0), [], []
    frames = [10, 12, 11, 100, 9, 60, 55, 58]
    codes = [rng.integers(0, CODES, (2, n)) for n in frames]
    original = RunningBatch.go_on

    def go_on(batch: RunningBatch, *arguments) -> dict:
        lengths = sorted(len(batch.request.prompts[row]) for row in batch.rows)
        (read if batch.ids.shape[1] == batch.legal.starts[0] else running).append(lengths)
        return original(batch, *arguments)

    monkeypatch.setattr(RunningBatch, "go_on", go_on)
    settings = {"tokens_per_s": 0.1, "min_tokens": 3}
    together = transcribe_codes(untrained, codes, TranscribeSettings(**settings, batch_seconds=10.0))
    batches, joined = list(read), list(running)
    assert together == transcribe_codes(untrained, codes, TranscribeSettings(**settings, batch_size=1))
    assert sum(map(len, batches)) == len(codes)
    assert all(batch[-1] <= 2 * batch[0] for batch in batches)
    most = 10.0 * untrained.vocabulary.frame_rate * untrained.vocabulary.n_codebooks
    assert all(len(batch) * batch[-1] <= most for batch in batches + joined if len(batch) > 1)
    assert max(map(len, batches + joined)) >= 4


def test_draws_follow_the_softmax(untrained: SpeechLM) -> None:
    """The first code of many draws is distributed as the model says."""
    vocabulary, n = untrained.vocabulary, 600
    settings = SynthesizeSettings(batch_size=200, temperature=0.7, top_k=0, min_seconds=0.05, seconds_per_character=0.0)
    said = synthesize_codes(untrained, ["red"] * n, settings, keys=[f"k{i}" for i in range(n)])
    counts = np.bincount([int(output.codes[0, 0]) for output in said], minlength=CODES) / n
    from slm.tasks import get_task
    from slm.tasks.registry import UtteranceTokens
    from slm.tasks.sequences import make_prompt

    text = vocabulary.encode_text(untrained.text_tokenizer, "red")
    prompt = make_prompt(vocabulary, get_task("tts"), UtteranceTokens(text=text))
    with torch.no_grad():
        logits = untrained.model(input_ids=torch.from_numpy(prompt)[None]).logits[0, -1]
    expected = torch.softmax(logits[vocabulary.speech_ids()[0]] / 0.7, -1).numpy()
    assert np.abs(counts - expected).max() < 4 * np.sqrt(expected.max() / n)


def test_a_draw_costs_what_is_legal_and_not_the_vocabulary(monkeypatch) -> None:
    """Noise for the codes, not for the rows of a text vocabulary; a row draws the same in any company."""
    rows, columns = 5000, np.arange(4000, 4000 + CODES)
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.from_numpy(columns)] = True
    drawn, real = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: drawn.append(a[0]) or real(*a, **k))
    scores = torch.randn(3, rows, generator=torch.Generator().manual_seed(0))
    scores[:, 0] += 100  # the likeliest of all, and not legal
    prompt = torch.zeros(3, 4, dtype=torch.long)
    grammar = Grammar([mask], 7, min_new=1)
    together = SeededSampling(LegalIds(grammar, [4] * 3), [1, 2, 3], 0.8)(prompt, scores).argmax(-1)
    assert set(drawn) == {CODES} and set(together.tolist()) <= set(columns.tolist())
    alone = [
        int(SeededSampling(LegalIds(grammar, [4] * 3), [seed], 0.8)(prompt[:1], scores[i : i + 1]).argmax())
        for i, seed in enumerate((1, 2, 3))
    ]
    assert together.tolist() == alone
    later = LegalIds(grammar, [3] * 3)
    ((rows, legal),) = later.columns(prompt)
    assert rows.tolist() == [0, 1, 2] and legal.tolist() == [7, *columns.tolist()]  # now the end may come
    mixed = LegalIds(grammar, [4, 3, 4])
    assert [rows.tolist() for rows, _ in mixed.columns(prompt)] == [[0, 2], [1]]


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

    decode_paths = ("reconstruction", "semantic_reconstruction")

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
    monkeypatch.setattr(setup, "load_tokenizer", lambda name, device=None: StandIn())
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
    with pytest.raises(ValueError, match=r"bad\.flac: not audio"):
        transcribe.run(recipe(transcribe, f"files=[{bad}]"))


SENTENCE_HZ = (200, 400, 800, 1600)
CLOSURE_S, PAUSE_S = 0.08, 0.3  # silence inside a word, and between two sentences


def spoken(sentence: int, seconds: float, rate: int = 16000) -> np.ndarray:
    """(S,) a stand-in for one of the four sentences: its tone, with a stop consonant's closure every 0.3 s."""
    time_s = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * SENTENCE_HZ[sentence] * time_s) * ((time_s % 0.3) < 0.3 - CLOSURE_S)).astype("f4")


class Hears(StandIn):
    """A codec that knows the four sentences by their tones, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[np.ndarray] = []

    def encode(self, input_values, padding_mask):
        samples = input_values[0, 0].numpy()
        self.heard.append(samples)
        power = np.abs(np.fft.rfft(samples))[np.round(np.array(SENTENCE_HZ) * len(samples) / 16000).astype(int)]
        codes = torch.from_numpy(utterances(4)[int(power.argmax())]["audio_codes"])[None]
        return SimpleNamespace(audio_codes=codes, audio_codes_mask=torch.ones(1, codes.shape[-1], dtype=bool))


@pytest.fixture
def hears(tmp_path, trained, monkeypatch):
    """(codec, a loader of transcribe's configuration) with a model that was trained on utterances of up to 3 s."""
    codec = Hears()
    monkeypatch.setattr(setup, "load_tokenizer", lambda name, device=None: codec)
    known = TrainedOn(characters="abc", longest_text=40, longest_s=3.0, characters_per_s=(10, 15, 20))
    vocabulary = dataclasses.replace(trained.vocabulary, trained_on=known)
    save_slm(trained.model, trained.text_tokenizer, vocabulary, tmp_path / "slm")

    def config(*overrides: str):
        own = [f"model={tmp_path / 'slm'}", "device=cpu", f"run_dir={tmp_path / 'run'}", "decoding.batch_size=3"]
        return load_config(transcribe.Config, None, [*own, *overrides])

    return codec, config


def test_a_long_recording_is_cut_in_its_pauses_and_loses_no_sample(hears, tmp_path, caplog) -> None:
    codec, config = hears
    caplog.set_level("INFO", "slm")
    order = [0, 1, 2, 3, 3, 1, 0, 2] * 3
    seconds = np.random.default_rng(0).uniform(1.6, 2.4, len(order)).round(1)
    pause, parts, pauses, now = np.zeros(round(PAUSE_S * 16000), "f4"), [], [], 0.0
    for sentence, length in zip(order, seconds, strict=True):
        parts += [spoken(sentence, length), pause]
        pauses.append((now + length - CLOSURE_S, now := now + length + PAUSE_S))
    recording = np.concatenate(parts[:-1])
    soundfile.write(tmp_path / "long.wav", recording, 16000, subtype="FLOAT")
    row = lines(transcribe.run(config(f"files=[{tmp_path / 'long.wav'}]")))[0]
    assert row["hypothesis"] == " ".join(utterances(4)[sentence]["text"] for sentence in order)
    assert np.array_equal(np.concatenate(codec.heard), recording)
    segments = row["segments"]
    assert segments[0]["start_s"] == 0 and segments[-1]["end_s"] == row["duration_s"] == len(recording) / 16000
    for one, other, (start, end) in zip(segments, segments[1:], pauses, strict=False):
        assert one["end_s"] == other["start_s"] and start <= one["end_s"] <= end
        assert one["end_s"] - one["start_s"] <= 3.0
    assert f"{len(segments)} pieces of at most 3.0 s" in caplog.text


def test_silent_pieces_get_no_text_and_short_recordings_stay_whole(hears, tmp_path) -> None:
    codec, config = hears
    soundfile.write(tmp_path / "a.wav", np.concatenate([spoken(0, 2.0), np.zeros(160000), spoken(2, 2.0)]), 16000)
    soundfile.write(tmp_path / "b.wav", spoken(1, 3.0), 16000)
    cut, whole = lines(transcribe.run(config(f"files=[{tmp_path / 'a.wav'}, {tmp_path / 'b.wav'}]")))
    silent = [segment for segment in cut["segments"] if segment["silent"]]
    assert silent and all(segment["text"] == "" for segment in silent)
    assert cut["hypothesis"] == f"{utterances(4)[0]['text']} {utterances(4)[2]['text']}"
    assert whole["hypothesis"] == utterances(4)[1]["text"] and "segments" not in whole


def test_memory_does_not_grow_with_a_recording(hears, tmp_path) -> None:
    codec, config = hears
    codec.encode = lambda values, mask: SimpleNamespace(
        audio_codes=torch.zeros(1, 2, 2, dtype=torch.long), audio_codes_mask=torch.ones(1, 2, dtype=bool)
    )
    with soundfile.SoundFile(tmp_path / "minutes.wav", "w", 8000, 2, "PCM_16") as file:
        for _ in range(60):
            file.write(np.random.default_rng(0).normal(0, 0.1, (80000, 2)))
    utterance, whole_bytes = Utterance("minutes", str(tmp_path / "minutes.wav")), 600 * 16000 * 4
    tracemalloc.start()
    last = deque(encode_pieces(codec, utterance, 10.0, None, "fp32", "cpu"), maxlen=1)[0]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert last.end_s == 600 and peak_bytes < whole_bytes / 4


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


def test_a_long_text_is_said_in_parts_and_what_looks_lost_is_told(recipe, tmp_path, untrained, caplog) -> None:
    known = TrainedOn(" abcdefghijklmnopqrstuvwxyz", longest_text=24, longest_s=3.0, characters_per_s=(9, 10, 11))
    vocabulary = dataclasses.replace(untrained.vocabulary, trained_on=known)
    save_slm(untrained.model, untrained.text_tokenizer, vocabulary, tmp_path / "slm")
    text = "Bin blue at f, two now. Lay red by ß nine please, said Mr. White! Set green."
    (tmp_path / "m.jsonl").write_text(
        json.dumps({"id": "a", "audio": "a.wav", "text": text, "split": "test"})
        + "\n"
        + json.dumps({"id": "b", "audio": "b.wav", "text": "lay red", "split": "test"})
        + "\n"
    )
    settings = [f"data.path={tmp_path / 'm.jsonl'}", "decoding.min_seconds=0.5", "pause_s=0.4"]
    config = recipe(synthesize, *settings, f"run_dir={tmp_path / 'run'}")
    assert synthesize.plan(config)["parts they are cut into"] == 5
    cut, whole = lines(synthesize.run(config))
    segments = cut["segments"]
    assert [segment["text"] for segment in segments] == [
        "Bin blue at f, two now.",
        "Lay red by ß nine please,",
        "said Mr. White!",
        "Set green.",
    ]
    audio, rate = soundfile.read(tmp_path / "run" / cut["audio"])
    assert len(audio) / rate == pytest.approx(segments[-1]["end_s"], abs=1e-3)
    assert len(audio) == cut["n_codes"] * 1280 + (0.4 + 0.2 + 0.4) * rate  # the pause in a sentence is half as long
    for one, other, pause in zip(segments, segments[1:], (0.4, 0.2, 0.4), strict=False):
        assert other["start_s"] - one["end_s"] == pytest.approx(pause, abs=2e-3)
        assert not audio[round(one["end_s"] * rate) + 20 : round(other["start_s"] * rate) - 20].any()
    assert cut["finish_reason"] == ("length" if cut["truncated"] else "stop") and "ß" in cut["warnings"][0]
    # An untrained model stops anywhere: each part whose length does not fit its text is named.
    for segment in segments:
        seconds, n = segment["end_s"] - segment["start_s"], len(segment["text"])
        if seconds < n / 11 / 1.5 or segment["finish_reason"] == "length":
            assert any(segment["text"] in warning for warning in cut["warnings"])
            assert f"a: {next(w for w in cut['warnings'] if segment['text'] in w)}" in caplog.text
    assert "segments" not in whole and len(cut["warnings"]) > 1
    assert json.loads((tmp_path / "run" / "complete.json").read_text())["summary"]["n_with_warnings"] >= 1
    with pytest.raises(ConfigError, match="a: not in the training's texts.*: ß"):
        synthesize.run(recipe(synthesize, *settings, "strict=true", f"run_dir={tmp_path / 'strict'}"))
    assert not list((tmp_path / "strict").glob("audio/*"))


def test_the_limits_follow_the_training_s_rate_of_speech(untrained) -> None:
    """At most 1.5 times its slowest, at least half of its fastest; what is below its shortest is allowed as much."""
    known = TrainedOn("abc", 24, 3.0, characters_per_s=(8, 10, 16), shortest_text=10)
    told = dataclasses.replace(untrained.vocabulary, trained_on=known)
    before = dataclasses.replace(untrained.vocabulary, trained_on=TrainedOn("abc", 24, 3.0, (8, 10, 16)))
    for vocabulary, characters, settings, expected in (
        (told, 40, {}, (1.5 * 40 / 8, 0.5 * 40 / 16)),
        (told, 2, {}, (1.5 * 10 / 8, 0.5 * 2 / 16)),
        (before, 40, {}, (4 + 40 * 2 / 8, 0)),  # a model folder of before keeps the rule of before
        (untrained.vocabulary, 40, {}, (4 + 40 * 0.25, 0)),
        (told, 40, {"seconds_per_character": 0.5, "min_seconds": 3.0, "min_seconds_per_character": 0.01}, (23.0, 0.4)),
        (told, 40, {"seconds_per_character": 0.5}, (20.0, 0.5 * 40 / 16)),
    ):
        found = speech_limits(vocabulary, "a" * characters, SynthesizeSettings(**settings))
        assert (found.most_s, found.least_s) == pytest.approx(expected)
    assert speech_limits(told, "a" * 40, SynthesizeSettings(), speech_s=2.0, is_said=False) == SpeechLimits(11.5, 0.0)
    assert speech_limits(told, "", SynthesizeSettings(), speech_s=2.0).most_s == 4.0 + 2 * 2.0  # speech goes on


@pytest.mark.parametrize(("name", "kind"), [("a.wav", "WAV"), ("a.mp3", "MP3"), ("a.OGG", "OGG"), ("a.flac", "FLAC")])
def test_the_output_s_ending_names_its_format(recipe, tmp_path, name, kind) -> None:
    short = ["decoding.min_seconds=1", "decoding.seconds_per_character=0"]
    out = synthesize.run(recipe(synthesize, "text=red", f"output={tmp_path / name}", *short))
    assert soundfile.info(out).format in (kind, "MPEG" if kind == "MP3" else kind)
    for wrong in ("out", "out.txt", "out.raw"):
        with pytest.raises(ConfigError, match=rf"output \(-o\): '{wrong}' must end"):
            recipe(synthesize, "text=red", f"output={wrong}")


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


def test_a_user_s_slips_are_told_with_the_way_out(recipe, tmp_path, capsys, caplog) -> None:
    (tmp_path / "a folder").mkdir()
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    (tmp_path / "empty.wav").touch()
    time_s = np.arange(8000) / 8000
    stereo = np.stack([0.3 * np.sin(1300 * time_s)] * 2, axis=1)
    for name in ("a b.mp3", "a b.ogg"):
        soundfile.write(tmp_path / name, stereo, 8000)
    bad = [str(tmp_path / name) for name in ("a folder", "silent.wav", "none.wav", "empty.wav", "absent.wav")]
    with pytest.raises(ValueError) as error:
        transcribe.run(recipe(transcribe, f"files={json.dumps(bad)}"))
    for line, name, told in zip(
        str(error.value).splitlines(),
        bad,
        ("a folder, not a recording", "silent", "0.0 ms", "empty", "no such file"),
        strict=True,
    ):
        assert line.startswith(f"{name}: {told}")
    assert not capsys.readouterr().out and not caplog.records  # each is told once
    good = [str(tmp_path / "a b.mp3"), str(tmp_path / "a b.ogg")]
    texts = transcribe.run(recipe(transcribe, f"files={json.dumps([*good, bad[1]])}"))
    assert [texts[name] is not None for name in (*good, bad[1])] == [True, True, False]
    assert capsys.readouterr().out.count(bad[1]) == 1
    with pytest.raises(ConfigError, match="model: not set.*slm finetune"):
        transcribe.plan(load_config(transcribe.Config, None, [f"files={json.dumps(good)}", 'model=""']))
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "slm", tmp_path / "run" / "model")
    with pytest.raises(ValueError, match=f"give {tmp_path / 'run' / 'model'}$"):
        transcribe.plan(recipe(transcribe, f"files={json.dumps(good)}", f"model={tmp_path / 'run'}"))


@pytest.fixture
def own_tasks():
    """`say`, whose prompt is that of `tts`; `ask`, which asks about speech in words; `sing`, whose text is a column."""
    register(Task("say", "speech", get_task("tts").turn))
    register(
        Task(
            "ask",
            "text",
            lambda u: Turn([Speech(u.codes), Text(u.text)], [Text(u.columns["answer"])]),
            columns=("answer",),
            reference="answer",
        )
    )
    sing = lambda u: Turn([Text(u.columns["notes"]), Mark(SYNTHESIZE)], [Speech(u.codes)])  # noqa: E731
    register(Task("sing", "speech", sing, columns=("notes",)))
    yield
    for name in ("say", "ask", "sing"):
        registry._TASKS.pop(name)


def test_a_task_with_the_prompt_of_tts_says_the_same(recipe, tmp_path, own_tasks) -> None:
    for name in ("tts", "say"):
        config = recipe(synthesize, "text=lay red by a. set white in z", f"task={name}", "max_characters=14")
        config.output = str(tmp_path / f"{name}.wav")
        assert synthesize.plan(config)["parts they are cut into"] == 2
        synthesize.run(config)
    assert (tmp_path / "tts.wav").read_bytes() == (tmp_path / "say.wav").read_bytes()
    rows = lines(synthesize.run(recipe(synthesize, f"corpus={tmp_path / 'codes'}", f"run_dir={tmp_path / 'r'}")))
    said = lines(
        synthesize.run(recipe(synthesize, f"corpus={tmp_path / 'codes'}", f"run_dir={tmp_path / 's'}", "task=say"))
    )
    assert {row["task"] for row in said} == {"say"}
    assert [row["n_codes"] for row in said] == [row["n_codes"] for row in rows]
    sidecars = [json.loads((tmp_path / run / "predictions.json").read_text()) for run in ("r", "s")]
    assert [(one["task"], one["answers"], one["reference"]) for one in sidecars] == [
        ("tts", "speech", "text"), ("say", "speech", "text"),
    ]  # fmt: skip


def test_the_text_of_a_prompt_may_be_a_column(recipe, tmp_path, own_tasks) -> None:
    rows = [{"id": i, "audio": "none.wav", "split": "test", "text": "la la"} for i in ("a", "b")]
    rows[0]["notes"] = "c d e f g a b c"
    (tmp_path / "songs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"data.path={tmp_path / 'songs.jsonl'}", "task=sing", "max_characters=5", f"run_dir={tmp_path / 'r'}"]
    config = recipe(synthesize, *given, "decoding.min_seconds=1", "decoding.seconds_per_character=0.5")
    assert synthesize.plan(config)["speech tokens at most"] == int((1 + 0.5 * 21 + 1 + 0.5 * 6) * 12.5)
    song, noteless = lines(synthesize.run(config))
    assert song["error"] is None and song["n_codes"] > 0 and "segments" not in song
    assert "task sing: an utterance without text" in noteless["error"]
    with pytest.raises(ConfigError, match="text: task sing: an utterance without text"):
        synthesize.run(recipe(synthesize, "text=la la", "task=sing", f"output={tmp_path / 'o.wav'}"))


def test_a_recording_beside_a_text_is_asked_about_as_a_whole(recipe, tmp_path, own_tasks) -> None:
    soundfile.write(tmp_path / "a.wav", spoken(0, 4.0), 16000)
    rows = [{"id": "a", "audio": "a.wav", "split": "test", "text": "what is it", "answer": "a tone"}]
    rows.append(rows[0] | {"id": "b", "text": ""})
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(task: str) -> list[dict]:
        given = [f"data.path={manifest}", f"run_dir={tmp_path / task}", f"task={task}", "piece_s=1.0"]
        return lines(transcribe.run(recipe(transcribe, *given)))

    assert all(row["reference"] == rows[i]["text"] and row["segments"] for i, row in enumerate(run("asr")))
    asked, wordless = run("ask")
    assert (asked["reference"], asked["error"], "segments" in asked) == ("a tone", None, False)
    assert asked["hypothesis"] is not None and wordless["hypothesis"] is None
    assert wordless["error"] == "b: task ask: an utterance without text, which its sequence is made of"
    # The answers belong to what was asked: others need another folder.
    manifest.write_text(manifest.read_text().replace("a tone", "a hum"))
    with pytest.raises(ConfigError, match="files, data or corpus"):
        run("ask")
    with pytest.raises(ConfigError, match="a prompt of ask holds a text, which FILE has not"):
        transcribe.plan(recipe(transcribe, f"files=[{tmp_path / 'a.wav'}]", "task=ask"))


def test_file_names_never_meet() -> None:
    names = [file_name(name) for name in ("a", "a/b", "a_b", "../a", "utt#1", "utt_1", ".a")]
    assert len(set(names)) == len(names) and all("/" not in name and not name.startswith(".") for name in names)
    assert tiny_tokenizer().eos_token_id is not None
