"""`slm synthesize`: texts, corpora, long texts, tasks that answer in speech, and the audio files."""

from __future__ import annotations

import dataclasses
import json

import pytest
import soundfile
from slm_standin import lines
from slm_tiny import tiny_tokenizer

from recipes.commands import synthesize
from recipes.config import ConfigError
from recipes.inference.scripts import file_name
from slm.model.modeling import save_slm
from slm.tasks import Task, get_task, register, registry
from slm.tasks.registry import Mark, Speech, Text, Turn
from slm.trained_on import TrainedOn
from slm.vocabulary import SYNTHESIZE


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
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(ConfigError, match="folder.wav cannot be written: a folder has that name"):
        synthesize.run(recipe(synthesize, "text=Lay red", f"output={tmp_path / 'folder.wav'}", *short))
    with pytest.raises(ConfigError, match=r"output \(-o\).*run_dir"):
        recipe(synthesize, "text=red", f"output={out}", f"run_dir={tmp_path / 'both'}")
    with pytest.raises(ConfigError, match="nothing to say"):
        synthesize.run(recipe(synthesize, "text='?!'", f"output={out}"))


def test_a_long_text_is_said_in_parts_and_what_looks_lost_is_told(recipe, tmp_path, untrained_slm, caplog) -> None:
    known = TrainedOn(" abcdefghijklmnopqrstuvwxyz", longest_text=24, longest_s=3.0, characters_per_s=(9, 10, 11))
    vocabulary = dataclasses.replace(untrained_slm.vocabulary, trained_on=known)
    save_slm(untrained_slm.model, untrained_slm.text_tokenizer, vocabulary, tmp_path / "slm")
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


@pytest.mark.parametrize(("name", "kind"), [("a.wav", "WAV"), ("a.mp3", "MP3"), ("a.OGG", "OGG"), ("a.flac", "FLAC")])
def test_the_output_s_ending_names_its_format(recipe, tmp_path, name, kind) -> None:
    short = ["decoding.min_seconds=1", "decoding.seconds_per_character=0"]
    out = synthesize.run(recipe(synthesize, "text=red", f"output={tmp_path / name}", *short))
    assert soundfile.info(out).format in (kind, "MPEG" if kind == "MP3" else kind)
    for wrong in ("out", "out.txt", "out.raw"):
        with pytest.raises(ConfigError, match=rf"output \(-o\): '{wrong}' must end"):
            recipe(synthesize, "text=red", f"output={wrong}")


@pytest.fixture
def say_and_sing():
    """Tasks: `say`, whose prompt is that of `tts`, and `sing`, whose text is a column."""
    register(Task("say", "speech", get_task("tts").turn))
    sing = lambda u: Turn([Text(u.columns["notes"]), Mark(SYNTHESIZE)], [Speech(u.codes)])  # noqa: E731
    register(Task("sing", "speech", sing, columns=("notes",)))
    yield
    for name in ("say", "sing"):
        registry._TASKS.pop(name)


def test_a_task_with_the_prompt_of_tts_says_the_same(recipe, tmp_path, say_and_sing) -> None:
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


def test_the_text_of_a_prompt_may_be_a_column(recipe, tmp_path, say_and_sing) -> None:
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


def test_file_names_never_meet() -> None:
    names = [file_name(name) for name in ("a", "a/b", "a_b", "../a", "utt#1", "utt_1", ".a")]
    assert len(set(names)) == len(names) and all("/" not in name and not name.startswith(".") for name in names)
    assert tiny_tokenizer().eos_token_id is not None
