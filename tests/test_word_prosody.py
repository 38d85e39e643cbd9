"""Prosody of words: what is relative to what, whose statistics hold, and the command that writes the column."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from eval.speech.measures.pitch import load_praat
from eval.speech.prosody import ProsodyError, ProsodyStatistics, SpokenWord, agreement, measure_words
from recipes.commands import measure_prosody
from recipes.config import ConfigError, from_values

RATE = 16_000
with_praat = pytest.mark.skipif(importlib.util.find_spec("parselmouth") is None, reason="extra `f0` is not installed")


def word(seconds: float, hz: float | None = 150.0, level_db: float = -20.0, units: str = "ab") -> SpokenWord:
    return SpokenWord(units, seconds, tuple(units), None if hz is None else float(np.log(hz)), level_db)


def test_a_word_is_as_long_as_its_units_are_in_the_training_split():
    statistics = ProsodyStatistics.of([("s", [word(0.2, units="ab"), word(0.3, units="c")])])
    assert statistics.unit_s == pytest.approx({"a": 0.1, "b": 0.1, "c": 0.3})
    usual, longer, unknown = statistics.relative(
        [word(0.4, units="ac"), word(0.8, units="ac"), word(1, units="z")], "s"
    )
    assert usual["duration"] == 0 and longer["duration"] == pytest.approx(np.log(2), abs=1e-4)
    assert unknown["duration"] == pytest.approx(np.log(1 / statistics.any_unit_s), abs=1e-4)


def test_f0_is_a_speaker_s_own_and_a_word_without_it_has_none():
    melody = [1.0, 1.2, 0.9, 1.1]
    low, high = ([word(0.2, hz * step) for step in melody] for hz in (100.0, 220.0))
    statistics = ProsodyStatistics.of([("low", low), ("high", high)])
    of_low, of_high = (
        [one["f0"] for one in statistics.relative(words, speaker)] for words, speaker in ((low, "low"), (high, "high"))
    )
    assert of_low == pytest.approx(of_high, abs=1e-3)
    assert np.mean(of_low) == pytest.approx(0, abs=1e-3) and np.std(of_low) == pytest.approx(1, abs=1e-3)
    assert statistics.relative([word(0.2, None)], "low")[0]["f0"] is None
    with pytest.raises(ProsodyError, match="no F0 is known of the speaker 'new'"):
        statistics.relative([word(0.2)], "new")
    theirs = statistics.with_speakers([("new", [word(0.2, 300 * step) for step in melody]), ("low", high)])
    assert theirs.f0["low"] == statistics.f0["low"]  # whom the training split has
    own = [one["f0"] for one in theirs.relative([word(0.2, 300 * step) for step in melody], "new")]
    assert own == pytest.approx(of_low, abs=1e-3)
    monotone = ProsodyStatistics.of([("s", [word(0.2), word(0.2)])])
    assert monotone.relative([word(0.2)], "s")[0]["f0"] == 0


def test_energy_is_relative_to_the_utterance():
    statistics = ProsodyStatistics.of([("s", [word(0.2)])])
    for gain_db in (0.0, -30.0):
        words = [word(0.2, level_db=level + gain_db) for level in (-20.0, -14.0, -26.0)]
        assert [one["energy"] for one in statistics.relative(words, "s")] == [0, 6, -6]


def test_statistics_go_through_json_and_others_are_refused():
    statistics = ProsodyStatistics.of([("s", [word(0.2), word(0.3, 200.0)]), ("t", [word(0.1, None)])])
    assert ProsodyStatistics.from_dict(json.loads(json.dumps(statistics.as_dict()))) == statistics
    with pytest.raises(ProsodyError, match="no statistics of prosody"):
        ProsodyStatistics.from_dict({"f0": {}})
    with pytest.raises(ProsodyError, match="no aligned word"):
        ProsodyStatistics.of([("s", [])])


def words_of(values: list[float | None]) -> list[dict]:
    return [{"word": "w", "duration": value, "f0": value, "energy": 0.0} for value in values]


def test_agreement_is_a_correlation_over_words():
    rng = np.random.default_rng(0)
    asked = [rng.integers(0, 8, 6).tolist() for _ in range(20)]
    same = agreement([(words_of(one), words_of([2.0 * value - 1 for value in one])) for one in asked])
    assert same["duration"] == {"correlation": 1.0, "interval": [1.0, 1.0], "words": 120}
    assert same["energy"] == {"correlation": None, "interval": None, "words": 120}  # nothing varies
    other = agreement([(words_of(one), words_of(rng.normal(size=6).tolist())) for one in asked])
    low, high = other["duration"]["interval"]
    assert low < other["duration"]["correlation"] < high and abs(other["duration"]["correlation"]) < 0.4
    gaps = agreement([(words_of([1, 2, 3, 4]), [w | {"f0": None} for w in words_of([1, 2, 3, 4])])])
    assert gaps["f0"]["words"] == 0 and gaps["duration"] == {"correlation": 1.0, "interval": None, "words": 4}
    assert agreement([])["duration"]["correlation"] is None


def buzz(seconds: float, hz: float) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return 0.1 * sum(np.sin(2 * np.pi * hz * k * time) / k for k in range(1, 12))


def hiss(seconds: float) -> np.ndarray:
    return 0.01 * np.random.default_rng(1).standard_normal(round(seconds * RATE))


def recording(hz: float, stretch: float = 1.0) -> tuple[np.ndarray, list[dict], list[dict]]:
    """`low` at a pitch, `hiss` without one, `high` at 1.5 times the first; with silence around."""
    lengths = [0.3 * stretch, 0.2, 0.2]
    sounds = [buzz(lengths[0], hz), hiss(lengths[1]), 2 * buzz(lengths[2], 1.5 * hz)]
    ends = 0.2 + np.cumsum(lengths)
    words = [
        {"word": name, "start": float(end - length), "end": float(end)}
        for name, length, end in zip(("low", "hiss", "high"), lengths, ends, strict=True)
    ]
    phones = [{"phone": one["word"].upper(), "start": one["start"], "end": one["end"]} for one in words]
    return np.pad(np.concatenate(sounds), round(0.2 * RATE)).astype(np.float32), words, phones


@with_praat
def test_words_are_measured_where_they_stand():
    audio, words, phones = recording(150.0)
    low, unvoiced, high = measure_words(load_praat(), audio, words, phones)
    assert np.exp(low.log_f0) == pytest.approx(150, rel=0.02) and np.exp(high.log_f0) == pytest.approx(225, rel=0.02)
    assert unvoiced.log_f0 is None and unvoiced.level_db == pytest.approx(-40, abs=0.5)
    assert high.level_db - low.level_db == pytest.approx(6, abs=0.5)
    assert low.units == ("LOW",) and low.duration_s == pytest.approx(0.3)
    assert measure_words(load_praat(), audio, words)[0].units == ("l", "o", "w")  # without phones
    late = [{"word": "late", "start": 9.0, "end": 9.1}]
    for wrong, message in ((late, "'late' .* outside the recording"), ([], "no word is aligned")):
        with pytest.raises(ProsodyError, match=message):
            measure_words(load_praat(), audio, wrong)


def write_manifest(folder: Path, more: list[dict] = ()) -> str:
    rows = []
    for name, split, hz, stretch in (
        ("a", "train", 140.0, 1.0),
        ("b", "train", 160.0, 1.4),
        ("c", "test", 150.0, 1.2),
    ):
        audio, words, phones = recording(hz, stretch)
        soundfile.write(folder / f"{name}.flac", audio, RATE)
        rows.append({"id": name, "audio": f"{name}.flac", "text": "low hiss high", "speaker": "s", "split": split})
        rows[-1] |= {"words": words, "phones": phones}
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    return str(folder / "manifest.jsonl")


def measured(source: str, run_dir: Path, **more: str) -> dict[str, dict]:
    values = {"data": [{"path": source}], "run_dir": str(run_dir)} | more
    manifest = measure_prosody.run(from_values(measure_prosody.Config, values))
    return {row["id"]: row for row in map(json.loads, manifest.read_text().splitlines())}


@with_praat
def test_the_command_writes_the_column_and_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch):
    not_aligned = {"id": "d", "audio": "a.flac", "text": "low", "speaker": "s", "split": "train"}
    source = write_manifest(tmp_path, [not_aligned])
    rows = measured(source, tmp_path / "run")
    assert list(rows) == ["a", "b", "c"] and isinstance(rows["a"]["words"], list)
    assert [one["word"] for one in rows["a"]["prosody"]] == ["low", "hiss", "high"]
    assert [one["f0"] is None for one in rows["a"]["prosody"]] == [False, True, False]
    durations = [rows[name]["prosody"][0]["duration"] for name in "acb"]
    assert durations == sorted(durations) and durations[0] < 0 < durations[2]
    skipped = json.loads((tmp_path / "run" / "skipped.jsonl").read_text())
    assert skipped == {"id": "d", "error": "no word is aligned"}
    # Killed behind the first utterance.
    original, calls = measure_prosody.measure_words, []

    def kill(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(measure_prosody, "measure_words", kill)
    with pytest.raises(KeyboardInterrupt):
        measured(source, tmp_path / "killed")
    again = measured(source, tmp_path / "killed")
    assert len(calls) == 2 + 3  # the first is not measured again
    assert [row["prosody"] for row in again.values()] == [row["prosody"] for row in rows.values()]


@with_praat
def test_statistics_are_the_training_split_s_and_can_be_had_from_an_earlier_run(tmp_path: Path):
    source = write_manifest(tmp_path)
    rows = measured(source, tmp_path / "run")
    file = tmp_path / "run" / "statistics.json"
    lines = Path(source).read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:2]) + "\n")
    measured(str(tmp_path / "train.jsonl"), tmp_path / "train")
    assert (tmp_path / "train" / "statistics.json").read_text() == file.read_text()
    # A model's output names no speaker.
    said = json.loads(lines[2]) | {"speaker": "", "split": "train"}
    (tmp_path / "said.jsonl").write_text(json.dumps(said) + "\n")
    asked = [{"word": "low", "duration": 3, "f0": 1, "energy": 4}, {"word": "hiss", "duration": 1, "f0": None}]
    asked = [*(one | {"energy": 1} for one in asked), {"word": "high", "duration": 2, "f0": 7, "energy": 6}]
    (tmp_path / "predictions.jsonl").write_text(json.dumps({"id": "c", "prosody": asked}) + "\n")
    more = {"statistics": str(file), "speaker": "s", "reference": str(tmp_path / "predictions.jsonl")}
    again = measured(str(tmp_path / "said.jsonl"), tmp_path / "said", **more)
    assert again["c"]["prosody"] == rows["c"]["prosody"]
    found = json.loads((tmp_path / "said" / "agreement.json").read_text())
    assert found["utterances"] == 1 and found["duration"]["words"] == 3 and found["f0"]["words"] == 2


@with_praat
def test_what_cannot_be_measured_is_refused(tmp_path: Path):
    source = write_manifest(tmp_path)
    lines = Path(source).read_text().splitlines()
    (tmp_path / "test.jsonl").write_text(lines[2] + "\n")
    plain = {key: value for key, value in json.loads(lines[0]).items() if key not in ("words", "phones")}
    (tmp_path / "plain.jsonl").write_text(json.dumps(plain) + "\n")
    (tmp_path / "asr.jsonl").write_text('{"id": "a", "text": "low"}\n')
    for name, more, message in (
        ("plain", {}, "has the column words; `slm align` writes"),
        ("test", {}, "no train split to take statistics of; give statistics="),
        ("manifest", {"statistics": str(tmp_path / "none.json")}, "none.json: no statistics of prosody"),
        ("manifest", {"reference": str(tmp_path / "asr.jsonl")}, "none of its rows has prosody"),
        ("manifest", {"reference": str(tmp_path / "none.jsonl")}, "no such file; give RUN_DIR/predictions.jsonl"),
    ):
        with pytest.raises(ConfigError, match=message):
            measured(str(tmp_path / f"{name}.jsonl"), tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()
