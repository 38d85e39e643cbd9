"""The bridge to VERSA: what it is given, and what the report makes of what it gives back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from eval.report.tables import quality_table
from eval.results_file import load_results, save_results
from eval.schema import Results
from eval.speech.quality import QualitySummary
from eval.stats import mean_interval
from recipes.commands import evaluate, export_versa
from recipes.config import ConfigError, load_config
from recipes.exporting.versa import plan_export
from recipes.scoring.predictions import read_predictions
from recipes.scoring.versa import read_versa, summarise_versa, with_versa

TEXTS = ["one two  three", "four five", "six", "seven eight"]
# As VERSA writes it: numbers of several kinds, counts of a recogniser's errors, texts, and what it could not measure.
SCORES = [
    {"key": "u0", "utmos": 4.0, "whisper_hyp_text": "one two", "whisper_wer_delete": 1, "whisper_wer_insert": 0,
     "whisper_wer_replace": 0, "whisper_wer_equal": 2, "new_measure": 1},
    {"key": "u1", "utmos": 3.0, "whisper_hyp_text": "four nine", "whisper_wer_delete": 0, "whisper_wer_insert": 1,
     "whisper_wer_replace": 1, "whisper_wer_equal": 1, "new_measure": float("nan")},
]  # fmt: skip


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    """Predictions of four utterances, of which the third has no answer and the last one no file."""
    folder = tmp_path / "tts"
    (folder / "audio").mkdir(parents=True)
    lines = []
    for i, text in enumerate(TEXTS):
        lines.append({"id": f"u{i}", "task": "tts", "text": text, "audio": f"audio/{i}.wav", "error": None})
        if i < 2:
            soundfile.write(folder / "audio" / f"{i}.wav", 0.1 * np.sin(np.arange(8000) / 9), 16_000)
    lines[2] |= {"audio": None, "error": "too long"}
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    (folder / "predictions.json").write_text(json.dumps({"model": "runs/slm/model", "frame_rate": 12.5}), "utf-8")
    return folder


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "my corpus"
    folder.mkdir()
    lines = []
    for i, text in enumerate(TEXTS):
        soundfile.write(folder / f"{i}.flac", 0.1 * np.sin(np.arange(9000) / 7), 16_000)
        lines.append({"id": f"u{i}", "audio": f"{i}.flac", "text": text, "split": "test", "duration": 9000 / 16_000})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return folder / "manifest.jsonl"


def export(spoken: Path, *more: str) -> Path:
    folder = spoken.parent / "versa"
    return export_versa.run(
        load_config(export_versa.Config, None, [f"predictions={spoken}", f"run_dir={folder}", *more])
    )


def scp(path: Path) -> dict[str, str]:
    """A list as VERSA reads it with --io soundfile."""
    return dict(line.strip().split(maxsplit=1) for line in path.read_text("utf-8").splitlines())


def test_versa_gets_audio_text_and_recordings_under_one_id(spoken, recordings, capsys) -> None:
    folder = export(spoken, f"data=[{{path: '{recordings}'}}]")
    pred, gt, text = (scp(folder / name) for name in ("pred.scp", "gt.scp", "text"))
    assert list(pred) == list(gt) == list(text) == ["u0", "u1"]
    assert text == {"u0": "one two three", "u1": "four five"}
    assert all(Path(path).is_absolute() and soundfile.info(path).frames == 8000 for path in pred.values())
    assert all(soundfile.info(path).frames == 9000 for path in gt.values())  # the recordings' own files, spaces and all
    command = capsys.readouterr().out.split()
    assert command[0] == "versa-score" and command[command.index("--io") + 1] == "soundfile"
    assert command[command.index("--gt") + 1] == str(folder / "gt.scp")
    about = json.loads((folder / "versa.json").read_text("utf-8"))
    assert set(about["left_out"]) == {"u2", "u3"} and "too long" in about["left_out"]["u2"]


def test_without_recordings_there_is_no_ground_truth_and_a_second_start_does_nothing(spoken, capsys) -> None:
    folder = export(spoken)
    assert not (folder / "gt.scp").exists() and "--gt" not in capsys.readouterr().out
    before = (folder / "pred.scp").stat().st_mtime_ns
    export(spoken)
    assert (folder / "pred.scp").stat().st_mtime_ns == before


def test_recordings_that_are_no_files_are_copied(spoken, tmp_path) -> None:
    from tokenizer.data.utterances import Utterance

    content = (spoken / "audio" / "0.wav").read_bytes()
    utterances = {i: Utterance(i, content, "x") for i in ("u0", "u1")}
    predictions = read_predictions(str(spoken))
    export_versa.write_export(tmp_path / "v", predictions, plan_export(predictions, utterances), utterances, 24_000)
    copied = [soundfile.info(path) for path in scp(tmp_path / "v" / "gt.scp").values()]
    assert [(one.samplerate, one.frames) for one in copied] == [(24_000, 12_000)] * 2


def test_what_versa_cannot_take_is_named(spoken, recordings, tmp_path) -> None:
    predictions = read_predictions(str(spoken))
    with pytest.raises(ConfigError, match="no recording of 2 of 2 utterances, such as 'u0'"):
        plan_export(predictions, {"other": None})
    predictions.lines["a b"] = predictions.lines.pop("u0")
    with pytest.raises(ConfigError, match="id 'a b' has a space, which ends a Kaldi id"):
        plan_export(predictions, {})
    line = {"id": "u0", "task": "asr", "reference": "a", "hypothesis": "a"}
    (tmp_path / "asr").mkdir()
    (tmp_path / "asr" / "predictions.jsonl").write_text(json.dumps(line), "utf-8")
    with pytest.raises(ConfigError, match=r"holds texts \(asr\)"):
        plan_export(read_predictions(str(tmp_path / "asr")), {})
    with pytest.raises(ConfigError, match="predictions: not set"):
        export_versa.plan(export_versa.Config())


def scored(spoken: Path, lines: list[str] | None = None) -> Path:
    folder = export(spoken)
    lines = [json.dumps(row) for row in SCORES] if lines is None else lines
    (folder / "scores.jsonl").write_text("".join(line + "\n" for line in lines), "utf-8")
    return folder


def test_its_numbers_become_measures_under_their_own_names(spoken) -> None:
    scores = read_versa(str(scored(spoken)))
    found = summarise_versa(scores, ["u0", "u1", "u2", "u3"], "t", samples=300, seed=0)
    assert found.values == {"versa_utmos": 3.5, "versa_whisper_wer %": 60.0, "versa_new_measure": 1.0}
    assert found.n_measured == {"versa_utmos": 2, "versa_whisper_wer %": 2, "versa_new_measure": 1}
    assert (found.n_scored, found.n_failed, found.system, found.name) == (2, 2, "tts", "SLM TTS")
    assert found.intervals["versa_utmos"] == mean_interval([4.0, 3.0], samples=300, seed=0)
    low, high = found.intervals["versa_whisper_wer %"]
    assert 0 <= low < 60 < high  # three errors in five words, over the corpus and not the mean of 33 and 100 %
    assert found.notes == ["VERSA: whisper_hyp_text: no numbers, left out"]


def test_dictionaries_of_older_versions_are_read_too(spoken) -> None:
    lines = [str(row) for row in SCORES]
    assert "nan" in lines[1]
    one, other = read_versa(str(scored(spoken))), read_versa(str(scored(spoken, lines)))
    assert one.lines == other.lines and one.lines["u1"]["new_measure"] is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["no"], "line 1: neither JSON nor a dictionary"),
        (['{"utmos": 1}'], "line 1: no `key`"),
        (['{"key": "u0"}', '{"key": "u0"}'], "line 2: 'u0' occurs twice"),
        (['{"key": "u2"}'], "line 1: 'u2' is no utterance"),
        ([], "is empty"),
    ],
)
def test_wrong_results_are_named_by_line(spoken, lines, message) -> None:
    with pytest.raises(ConfigError, match=message):
        read_versa(str(scored(spoken, lines)))


def test_results_of_other_predictions_or_none_are_refused(spoken, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no versa.json; `slm export-versa"):
        read_versa(str(tmp_path))
    folder = export(spoken)
    with pytest.raises(ConfigError, match="run VERSA with --output_file"):
        read_versa(str(folder))
    scored(spoken)
    (spoken / "predictions.jsonl").write_text((spoken / "predictions.jsonl").read_text("utf-8") + "\n", "utf-8")
    with pytest.raises(ConfigError, match="was made anew since"):
        read_versa(str(folder))


def test_they_stand_beside_our_own_measures_of_the_system(spoken, tmp_path) -> None:
    scores = summarise_versa(read_versa(str(scored(spoken))), ["u0", "u1"], "t", samples=100, seed=0)
    own = QualitySummary(scores.name, scores.model, 2, {"stoi": 0.5}, {"stoi": 2}, [], test_set="t", system="tts")
    (both,) = with_versa([own], [scores])
    assert both.values == {"stoi": 0.5} | scores.values and with_versa([], [scores]) == [scores]
    table = quality_table([both])
    assert {"STOI", "VERSA utmos", "VERSA whisper_wer %", "VERSA new_measure"} <= set(table.headings)
    save_results(Results("t", [], quality=[both]), tmp_path)
    assert load_results(tmp_path).quality == [both]


def test_evaluate_takes_them_in_and_notices_when_they_change(spoken, tmp_path) -> None:
    folder = scored(spoken)
    own = [f"run_dir={tmp_path / 'scores'}", f"versa=['{folder}']", "quality=false", "bootstrap_samples=100"]
    line = {"id": "u0", "task": "asr", "reference": "one two three", "hypothesis": "one two"}
    (tmp_path / "asr").mkdir()
    (tmp_path / "asr" / "predictions.jsonl").write_text(json.dumps(line), "utf-8")
    own += [f"predictions=['{tmp_path / 'asr'}']"]
    evaluate.run(load_config(evaluate.Config, None, own))
    (quality,) = load_results(tmp_path / "scores").quality
    assert quality.values["versa_utmos"] == 4.0 and quality.label == "SLM TTS"  # of the test set's one utterance
    assert "VERSA utmos" in (tmp_path / "scores" / "report.html").read_text("utf-8")
    (folder / "scores.jsonl").write_text(json.dumps(SCORES[0] | {"utmos": 1.0}), "utf-8")
    with pytest.raises(ConfigError, match="holds the scores of other inputs"):
        evaluate.run(load_config(evaluate.Config, None, own))
