"""``slm score``: files of other systems against references, joined by id, with the report that `evaluate` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import soundfile

from eval.differences import compare_rows
from eval.judges.config import JudgeError
from eval.rescoring import rescored
from eval.results_file import load_results
from eval.text.normalisers import get_normaliser
from recipes.commands import evaluate, score
from recipes.config import ConfigError, from_values, load_config
from recipes.scoring import evaluation, text_scores

TEXTS = {
    "u1": "bin blue at f two now",
    "u2": "set <script>alert(1)</script> by g \u2028 now",
    "u3": "",
    "u4": "lay green with a nine soon",
    "u5": "place white in b one again",
}
HEARD = {
    "u1": "bin blue at f two now",
    "u2": "set script alert one script by g now",
    "u3": "uh huh",
    "u4": "lay green with nine nine soon please",
    "extra": "nobody said this",
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    columns = {"speaker": ["s1", "s1", "s1", "s2", "s2"], "duration": [1.0, 3.0, 3.5, 12.0, 30.0]}
    rows = [
        {"id": i, "text": text, **{key: values[k] for key, values in columns.items()}}
        for k, (i, text) in enumerate(TEXTS.items())
    ]
    (tmp_path / "ref.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (tmp_path / "asr.txt").write_text("".join(f"{i} {text}\n" for i, text in HEARD.items()))
    return tmp_path


def configure(files: Path, **changes: Any) -> score.Config:
    settings = {"reference": str(files / "ref.jsonl"), "hypothesis": [str(files / "asr.txt")], "bootstrap_samples": 100}
    return score.Config(**settings | changes)


def test_counts_are_jiwer_s_and_the_report_is_written(files, capsys) -> None:
    folder = score.run(configure(files, output=str(files / "out")))
    (row,) = load_results(folder).rows
    basic = get_normaliser("basic")
    said = [basic(text) for text in TEXTS.values()]
    heard = [basic(HEARD.get(i, "")) for i in TEXTS]
    expected = jiwer.process_words(said, heard)
    assert (row.substitutions, row.deletions, row.insertions) == (
        expected.substitutions,
        expected.deletions,
        expected.insertions,
    )
    assert row.wer == pytest.approx(expected.wer) and row.cer == pytest.approx(
        jiwer.process_characters(said, heard).cer
    )
    assert (row.n_scored, row.n_failed, row.name, row.system) == (4, 1, "asr", "transcripts")
    assert row.interval[0] < row.wer < row.interval[1] and row.cer_interval[0] < row.cer < row.cer_interval[1]
    # Of the four with words: none wrong, none, two of six, six of six without an answer.
    assert row.mean_wer == pytest.approx((0 + 0 + 2 / 6 + 1) / 4) and row.above_half == 1 / 4
    printed = capsys.readouterr().out
    assert (
        "Transcripts (ref, 5 utterances" in printed
        and "u4 (2/6): lay green with (a->nine) nine soon (*->please)" in printed
    )
    assert "note: asr: no answer for 1 utterance, counted as failed (u5)" in printed
    assert "note: asr: 1 utterance beyond the reference, not scored (extra)" in printed
    for line in ("(a->nine)", "s2 ", "under 2 s", "2 to 5 s", "10 to 20 s", "20 s and over"):
        assert line in printed
    tables = {"results.md", "results.tex", "results.tables"}
    assert {p.name for p in folder.iterdir()} == {"results.json", "report.html", "errors-asr.txt", *tables}
    assert "# 1\t(a->nine)\n" in (folder / "errors-asr.txt").read_text()
    page = (folder / "report.html").read_text()
    assert "By speaker" in page and "By length of the recording" in page and "(a-&gt;nine)" in page
    assert "<script>alert" not in page and "\u2028" not in page
    assert load_results(folder).versions.keys() >= {"jiwer", "machine"}


def test_several_hypotheses_are_held_against_the_first(files, capsys) -> None:
    (files / "better.csv").write_text("id,hypothesis\n" + "".join(f'{i},"{text}"\n' for i, text in TEXTS.items()))
    names = [str(files / "asr.txt"), str(files / "better.csv")]
    folder = score.run(configure(files, hypothesis=names, names=["old", "new"], output=str(files / "out")))
    old, new = load_results(folder).rows
    found = compare_rows(new, old)
    assert old.difference is None and new.wer == 0 and new.interval_by == "wilson" and new.interval[1] > 0.05
    assert (new.difference.against, new.difference.wer) == ("old", found.difference) and found.difference < 0
    assert new.difference.mapsswe_segments == 4
    assert "new - old: " in capsys.readouterr().out


def test_sclite_s_split_on_request_is_another_protocol(files) -> None:
    (files / "ref.txt").write_text("u1 one two\nu2 three\n")
    (files / "asr.txt").write_text("u1 two five\nu2 three\n")
    rows = []
    for name in ("jiwer", "sclite"):
        config = configure(files, reference=str(files / "ref.txt"), alignment=name, output=str(files / name))
        rows += load_results(score.run(config)).rows
    assert [(row.substitutions, row.deletions, row.insertions) for row in rows][1] == (0, 1, 1)
    assert rescored(load_results(files / "sclite"), get_normaliser("basic")).rows == rows[1:]
    with pytest.raises(ValueError, match=r"differ in alignment \(jiwer and sclite\)"):
        compare_rows(*rows)


def test_a_hypothesis_s_own_reference(files) -> None:
    rows = [{"id": i, "task": "asr", "reference": text, "hypothesis": HEARD.get(i)} for i, text in TEXTS.items()]
    (files / "asr").mkdir()
    (files / "asr" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = score.run(configure(files, reference=None, hypothesis=str(files / "asr"), output=str(files / "out")))
    (row,) = load_results(folder).rows
    assert (row.name, row.n_failed, row.n_words) == ("asr", 1, 26)
    with pytest.raises(ConfigError, match="asr.txt has one column of texts, the only one: give reference=FILE"):
        score.plan(configure(files, reference=None))


class Lengths:
    """Hears the text whose number is the clip's length in tenths of a second."""

    sampling_rate = 16_000
    identity = {"name": "lengths", "kind": "test", "weights_sha256": "ab", "decoding": "none"}
    name = "lengths"

    def transcribe(self, audios: list[np.ndarray], sampling_rate: int) -> list[str]:
        return [list(TEXTS.values())[round(10 * len(audio) / sampling_rate) - 1] for audio in audios]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    read: list[int] = []

    class Noted(Lengths):
        def transcribe(self, audios, sampling_rate):
            read.extend(len(audio) for audio in audios)
            return super().transcribe(audios, sampling_rate)

    monkeypatch.setattr(text_scores, "check_judge", lambda config: Lengths.identity)
    monkeypatch.setattr("recipes.scoring.judges.load_judge", lambda config, device: Noted())
    return read


def write_audio(folder: Path, numbers: dict[str, int]) -> Path:
    folder.mkdir()
    for name, number in numbers.items():
        soundfile.write(folder / f"{name}.wav", 0.1 * np.ones(1600 * number), 16_000)
    return folder


def test_a_folder_of_audio_is_read_by_a_judge_and_what_it_heard_is_kept(files, judge) -> None:
    folder = write_audio(files / "wavs", {"u1": 1, "u2": 2, "u4": 5})
    (folder / "u5.wav").write_text("no audio")
    config = configure(files, hypothesis=str(folder), output=str(files / "out"), judges=[{"name": "lengths"}])
    config = load_config(score.Config, None, [f"reference={config.reference}", f"hypothesis={folder}"])
    with pytest.raises(ConfigError, match="wavs is audio and needs a reader: judges="):
        score.plan(config)
    overrides = ["judges=[{name: lengths}]", f"output={files / 'out'}", "bootstrap_samples=100"]
    config = load_config(score.Config, None, [f"reference={config.reference}", f"hypothesis={folder}", *overrides])
    score.run(config)
    results = load_results(files / "out")
    (row,) = results.rows
    assert (row.system, row.protocol.task, row.n_failed) == ("speech", "speech", 2)  # u3 has no file, u5 is none
    assert {u.id: u.errors for u in row.utterances} == {"u1": 0, "u2": 0, "u3": 0, "u4": 6, "u5": 6}
    assert any("u5.wav" in note for note in results.notes)
    before = len(judge)
    (files / "out" / "results.json").unlink()  # as if it had been killed before the end
    score.run(config)
    assert len(judge) == before and load_results(files / "out").rows[0].wer == row.wer


def test_seed_tts_eval_gives_its_own_number_beside_the_one_that_counts_what_is_missing(files, judge, capsys) -> None:
    texts = {"a": "well-known words", "b": "don't stop", "c": "three more words"}
    (files / "ref.jsonl").write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in texts.items()))
    (files / "asr.txt").write_text("a wellknown word.\nb DON'T, stop!\n")
    config = configure(files, protocol="seed-tts-eval", output=str(files / "out"))
    score.run(config)
    results = load_results(files / "out")
    (row,) = results.rows
    assert row.official_wer == pytest.approx((1 / 2 + 0) / 2)  # c is skipped; "wellknown" is one word
    assert row.mean_wer == pytest.approx((1 / 2 + 0 + 1) / 3) and row.wer == pytest.approx(4 / 7)
    assert (row.protocol.name, row.protocol.normaliser, row.protocol.official) == (
        "seed-tts-eval, texts as given",
        "seed-tts-eval",
        "mean-of-answered",
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "official WER %" in printed and "25.0" in printed and "those without an answer left out" in printed
    for name in ("report.html", "results.md"):
        assert "official WER %" in (files / "out" / name).read_text()
    assert any("resampled by soxr" in note for note in results.notes)
    with pytest.raises(ConfigError, match="normaliser=none beside protocol=seed-tts-eval"):
        score.plan(configure(files, protocol="seed-tts-eval", normaliser="none"))
    with pytest.raises(ValueError, match="protocol 'seed' is unknown; there are\n  librispeech-hubert: HuBERT"):
        score.plan(configure(files, protocol="seed"))


def test_dwer_is_against_what_the_judge_hears_in_the_recordings(files, judge) -> None:
    recordings = write_audio(files / "recordings", {"u1": 2, "u4": 4, "u5": 5})
    rows = [{"id": i, "text": TEXTS[i], "audio": f"recordings/{i}.wav"} for i in ("u1", "u4", "u5")]
    (files / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outputs = write_audio(files / "outputs", {"u1": 2, "u4": 5, "u5": 5})
    settings = {"hypothesis": str(outputs), "protocol": "dwer-whisper-small", "output": str(files / "out")}
    score.run(configure(files, reference=str(files / "manifest.jsonl"), **settings))
    (row,) = load_results(files / "out").rows
    assert row.protocol.reference == "judge" and {u.id: u.errors for u in row.utterances} == {"u1": 0, "u4": 6, "u5": 0}
    assert row.utterances[0].reference == "set alert by g now"  # not what the manifest says was said
    assert row.protocol.test_set.audio_sha256 and recordings.is_dir()
    with pytest.raises(ConfigError, match="give a reference whose lines name their audio"):
        score.plan(configure(files, **settings))


def test_stored_texts_are_scored_again(files) -> None:
    score.run(configure(files, output=str(files / "out"), hypothesis=[str(files / "asr.txt")] * 2, names=["a", "b"]))
    stored = load_results(files / "out")
    assert rescored(stored, get_normaliser("basic")).rows == stored.rows
    folder = score.run(
        score.Config(results=str(files / "out"), normaliser="none", output=str(files / "raw"), bootstrap_samples=100)
    )
    one, two = load_results(folder).rows
    assert one.protocol.normaliser == "none" and one.utterances[1].reference == "set <script>alert(1)</script> by g now"
    assert one.n_words < stored.rows[0].n_words and two.difference.against == "a"
    with pytest.raises(ValueError, match=r"differ in normaliser \(none and basic\), normaliser version \(1 and 2\)"):
        compare_rows(one, stored.rows[0])
    with pytest.raises(ConfigError, match="which would be written over"):
        score.run(score.Config(results=str(files / "out"), output=str(files / "out")))
    with pytest.raises(ConfigError, match="no protocol or judge can be asked"):
        score.run(score.Config(results=str(files / "out"), protocol="embedded"))


def test_characters_are_words_where_there_are_no_spaces(files, capsys) -> None:
    (files / "ref.txt").write_text("u1 今天天气很好我们去公园\nu2 我喜欢吃苹果和香蕉还有梨\n")
    (files / "asr.txt").write_text("u1 今天天气很好我们去公园\nu2 我喜欢吃苹果和香蕉还有梅\n")
    score.run(configure(files, reference=str(files / "ref.txt")))
    assert "in 2 of 2 references a sentence, or much of one, is one word" in capsys.readouterr().out
    folder = score.run(
        configure(files, reference=str(files / "ref.txt"), normaliser="basic:zh", output=str(files / "o"))
    )
    results = load_results(folder)
    assert results.rows[0].n_words == 23 and results.rows[0].wer == results.rows[0].substitutions / 23 == 1 / 23
    assert not any("one word" in note for note in results.notes)


def test_what_cannot_be_scored_is_said_at_once(files) -> None:
    (files / "other.txt").write_text("v1 bin blue\n")
    with pytest.raises(ConfigError, match="none of the 5 ids of .*: there they are like 'u1', here like 'v1'"):
        score.plan(configure(files, hypothesis=str(files / "other.txt")))
    with pytest.raises(ConfigError, match="no answer for 1 utterance.*1 utterance beyond.*leave --strict"):
        score.plan(configure(files, strict=True))
    with pytest.raises(
        ConfigError, match="resample=speakers: the test set has utterances whose speaker is not known; add a column"
    ):
        score.plan(configure(files, reference=str(files / "asr.txt"), resample="speakers"))
    (files / "none.txt").write_text("u1 ...\n")
    with pytest.raises(ConfigError, match="no utterance has a word"):
        score.plan(configure(files, reference=str(files / "none.txt")))
    with pytest.raises(ConfigError, match="two hypotheses are called the same"):
        score.plan(configure(files, hypothesis=[str(files / "asr.txt")] * 2, names=["a", "a"]))
    with pytest.raises(JudgeError, match="paraformer-zh' needs the package funasr.*pip install funasr zhconv"):
        write_audio(files / "wavs", {"u1": 1})
        score.plan(configure(files, hypothesis=str(files / "wavs"), protocol="seed-tts-eval-zh"))
    (files / "mine").mkdir()
    (files / "mine" / "results.md").write_text("mine")
    with pytest.raises(ConfigError, match="holds results.md, but no run was begun there"):
        score.plan(configure(files, output=str(files / "mine")))
    (files / "mine" / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="is the folder of a run"):
        score.plan(configure(files, output=str(files / "mine")))
    for wrong in ({"hypothesis": []}, {"names": ["a", "b"]}, {"results": "x"}, {"top": 0}):
        with pytest.raises(ValueError):
            configure(files, **wrong)


def test_the_same_recordings_are_one_test_set_to_evaluate_and_to_score(files, judge, monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "check_judge", lambda config: Lengths.identity)
    monkeypatch.setattr("recipes.scoring.judges.load_judge", lambda config, device: Lengths())
    folder = write_audio(files / "wavs", {"u1": 1, "u4": 5})
    rows = [{"id": i, "text": TEXTS[i], "audio": f"wavs/{i}.wav", "split": "test"} for i in ("u1", "u4")]
    (files / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "run_dir": str(files / "a"),
        "data": [{"path": str(files / "manifest.jsonl")}],
        "judges": [{"name": "x"}],
    }
    settings |= {"bootstrap_samples": 100, "quality": False, "device": "cpu"}
    (truth,) = load_results(evaluate.run(from_values(evaluate.Config, settings))).rows
    overrides = {"hypothesis": str(folder), "judges": [{"name": "x"}], "output": str(files / "b"), "split": "test"}
    config = from_values(
        score.Config, {"reference": str(files / "manifest.jsonl"), "bootstrap_samples": 100} | overrides
    )
    (row,) = load_results(score.run(config)).rows
    assert row.protocol.test_set.audio_sha256 == truth.protocol.test_set.audio_sha256 is not None
    assert compare_rows(row, truth).difference == 0 and row.n_words == 12


def test_the_plan_says_which_columns_were_taken(files) -> None:
    facts = score.plan(configure(files))
    assert facts["reference"].endswith("ref.jsonl (jsonl, column text)") and facts["reference words"] == 26
    assert facts["hypothesis asr"].endswith("asr.txt (Kaldi text): 4 of 5 utterances")


def test_a_split_that_is_not_there_is_answered_with_those_that_are(files) -> None:
    rows = [{"id": i, "text": "lay red", "split": split} for i, split in (("u1", "train"), ("u2", "test"))]
    (files / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="has no split 'tset'; it has test, train"):
        text_scores.prepare(configure(files, reference=str(files / "manifest.jsonl"), split="tset"))


def test_lines_without_ids_are_told_how_they_were_read(files) -> None:
    """Their first words are taken for ids, as Kaldi's files have them."""
    (files / "ref.txt").write_text("bin blue now\nlay red soon\nset green again\n")
    (files / "other.txt").write_text("been blue now\nlay red soon\nsit green again\n")
    same = configure(files, reference=str(files / "ref.txt"), hypothesis=[str(files / "ref.txt")])
    (note,) = text_scores.prepare(same).notes
    assert "ref.txt was read as Kaldi's `id words`: the first word of each line is its id, such as 'bin'" in note
    assert "nl -ba" in note
    few = configure(files, reference=str(files / "ref.txt"), hypothesis=[str(files / "other.txt")])
    assert text_scores.prepare(few).notes[0].startswith("other: its ids hardly meet the reference's: 1 of 3 are among ")
    assert "other.txt was read as Kaldi's `id words`" in text_scores.prepare(few).notes[0]
    with pytest.raises(ConfigError, match="(?s)none of the 5 ids.*other.txt was read as Kaldi's `id words`.*jsonl was"):
        text_scores.prepare(configure(files, hypothesis=[str(files / "other.txt")]))
    assert not any("was read as" in note for note in text_scores.prepare(configure(files)).notes)
