"""`slm transcribe`: files, corpora, long recordings, tasks that answer in text, and what users get wrong."""

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
from slm_standin import StandIn, lines
from slm_tiny import FINGERPRINT, utterances, write_corpus

from recipes.commands import synthesize, transcribe
from recipes.config import ConfigError, load_config
from recipes.inference import setup
from recipes.inference.long_recordings import encode_pieces
from recipes.runs.run_folder import RunFolder
from slm.model.modeling import save_slm
from slm.tasks import Task, register, registry
from slm.tasks.registry import Speech, Text, Turn
from slm.trained_on import TrainedOn
from tokenizer.data.utterances import Utterance


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
    with pytest.raises(ValueError, match=r"^1 of 2 files could not be used, the others are above: \S*bad\.flac$"):
        transcribe.run(recipe(transcribe, f"files=[{good}, {bad}]"))
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"{good}: ") and told[1].startswith(f"{bad}: not audio")
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
def hears(tmp_path, trained_slm, monkeypatch):
    """(codec, a loader of transcribe's configuration) with a model that was trained on utterances of up to 3 s."""
    codec = Hears()
    monkeypatch.setattr(setup, "load_tokenizer", lambda name, device=None: codec)
    known = TrainedOn(characters="abc", longest_text=40, longest_s=3.0, characters_per_s=(10, 15, 20))
    vocabulary = dataclasses.replace(trained_slm.vocabulary, trained_on=known)
    save_slm(trained_slm.model, trained_slm.text_tokenizer, vocabulary, tmp_path / "slm")

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


def test_a_manifest_of_which_nothing_can_be_used_is_no_finished_run(recipe, tmp_path) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"id": "a", "audio": "a.wav", "text": "...", "split": "test"}\n')
    for module, why in ((transcribe, "a.wav"), (synthesize, "nothing to say")):
        run = recipe(module, f"data.path={tmp_path}", f"run_dir={tmp_path / module.__name__}")
        with pytest.raises(ConfigError, match=f"none of the 1 utterances .*predictions.jsonl says why: .*{why}"):
            module.run(run)
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(16000) * 0.1) * 0.3, 16000)
    again = recipe(transcribe, f"data.path={tmp_path}", f"run_dir={tmp_path / transcribe.__name__}")
    assert lines(transcribe.run(again))[0]["error"] is None  # the same command, once it is mended


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
        str(error.value).splitlines()[:-1],
        bad,
        ("a folder, not a recording", "silent", "0.0 ms", "empty", "no such file"),
        strict=True,
    ):
        assert line.startswith(f"{name}: {told}")
    assert not capsys.readouterr().out and not caplog.records  # each is told once
    good = [str(tmp_path / "a b.mp3"), str(tmp_path / "a b.ogg")]
    with pytest.raises(ValueError, match=f"1 of 3 files could not be used, .*: {bad[1]}$"):
        transcribe.run(recipe(transcribe, f"files={json.dumps([*good, bad[1]])}"))
    told = capsys.readouterr().out
    assert [told.count(name) for name in (*good, bad[1])] == [1, 1, 1]
    assert set(transcribe.run(recipe(transcribe, f"files={json.dumps(good)}"))) == set(good)
    with pytest.raises(ConfigError, match="model: not set.*slm finetune"):
        transcribe.plan(load_config(transcribe.Config, None, [f"files={json.dumps(good)}", 'model=""']))
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "slm", tmp_path / "run" / "model")
    with pytest.raises(ValueError, match=f"give {tmp_path / 'run' / 'model'}$"):
        transcribe.plan(recipe(transcribe, f"files={json.dumps(good)}", f"model={tmp_path / 'run'}"))


@pytest.fixture
def ask():
    """A task that asks about speech in words."""
    turn = lambda u: Turn([Speech(u.codes), Text(u.text)], [Text(u.columns["answer"])])  # noqa: E731
    register(Task("ask", "text", turn, columns=("answer",), reference="answer"))
    yield
    registry._TASKS.pop("ask")


def test_a_recording_beside_a_text_is_asked_about_as_a_whole(recipe, tmp_path, ask) -> None:
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
