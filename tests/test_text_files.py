"""References and hypotheses from files: every form gives the same texts, and a wrong line is named."""

from __future__ import annotations

import json

import pytest

from recipes.config import ConfigError
from recipes.scoring.text_files import Columns, read_texts

TEXTS = {"u1": "Bin blue, at f", "u2": "", "u3": 'set "white" \u2028 by <b>'}


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


FORMS = {
    "text": "".join(f"{i} {text}\n" for i, text in TEXTS.items()),
    "tabs.txt": "".join(f"{i}\t{text}\r\n" for i, text in TEXTS.items()),
    "hyp.trn": "".join(f"{text} ({i})\n" for i, text in TEXTS.items()),
    "a.jsonl": "\ufeff" + jsonl([{"id": i, "text": text, "other": 3} for i, text in TEXTS.items()]),
    "nemo.jsonl": jsonl([{"audio_filepath": f"x/{i}.wav", "text": text, "duration": 2} for i, text in TEXTS.items()]),
    "list.json": json.dumps([{"utt_id": i, "transcript": text} for i, text in TEXTS.items()]),
    "map.json": json.dumps(TEXTS),
    "a.csv": 'sentence,path\n"Bin blue, at f",clips/u1.mp3\n,clips/u2.mp3\n"set ""white"" \u2028 by <b>",c/u3.mp3\n',
    "a.tsv": 'id\ttext\nu1\tBin blue, at f\nu2\t\nu3\tset "white" \u2028 by <b>\n',
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("role", ["reference", "hypothesis"])
def test_every_form_gives_the_same_texts(name, role, tmp_path) -> None:
    (tmp_path / name).write_text(FORMS[name], encoding="utf-8", newline="")
    found = read_texts(str(tmp_path / name), role)
    assert {i: entry.text.strip() for i, entry in found.entries.items()} == TEXTS
    assert not found.is_audio


def test_one_file_may_hold_both_sides(tmp_path) -> None:
    rows = [{"audio_filepath": "a/u1.wav", "text": "said", "pred_text": "heard", "mine": "other"}]
    (tmp_path / "both.jsonl").write_text(jsonl(rows))
    name = str(tmp_path / "both.jsonl")
    assert read_texts(name, "reference").entries["u1"].text == "said"
    assert read_texts(name, "hypothesis").entries["u1"].text == "heard"
    assert read_texts(name, "hypothesis", Columns(hypothesis="mine")).entries["u1"].text == "other"
    with pytest.raises(ConfigError, match="not 'absent': name it with reference_column="):
        read_texts(name, "reference", Columns(reference="absent"))


def test_speakers_and_durations_come_along(tmp_path) -> None:
    (tmp_path / "text").write_text("u1 a\nu2 b\n")
    (tmp_path / "utt2spk").write_text("u1 anna\nu2 ben\n")
    (tmp_path / "utt2dur").write_text("u1 1.5\nu2 2\n")
    found = read_texts(str(tmp_path), "reference").entries
    assert [(e.speaker, e.duration) for e in found.values()] == [("anna", 1.5), ("ben", 2.0)]
    (tmp_path / "a.csv").write_text("id,text,spk,duration\nu1,a,anna,1.5\nu2,b,,\n")
    found = read_texts(str(tmp_path / "a.csv"), "reference").entries
    assert [(e.speaker, e.duration) for e in found.values()] == [("anna", 1.5), ("", None)]


def test_a_manifest_of_several_splits_asks_which(tmp_path) -> None:
    rows = [{"id": s, "audio": f"{s}.wav", "text": s, "split": s} for s in ("train", "test")]
    (tmp_path / "manifest.jsonl").write_text(jsonl(rows))
    with pytest.raises(ConfigError, match="holds the splits test, train: name one, as split=test"):
        read_texts(str(tmp_path), "reference")
    found = read_texts(str(tmp_path), "reference", split="test")
    assert list(found.entries) == ["test"] and found.entries["test"].audio == str(tmp_path / "test.wav")


def test_predictions_answer_in_text_or_in_speech(tmp_path) -> None:
    asr = [{"id": "u1", "task": "asr", "reference": "r", "hypothesis": "h"}]
    asr += [{"id": "u2", "task": "asr", "reference": "r", "hypothesis": None, "error": "too long"}]
    tts = [{"id": "u1", "task": "tts", "text": "asked", "audio": "1.wav"}]
    tts += [{"id": "u2", "task": "tts", "text": "asked", "audio": None, "error": "too long"}]
    for name, rows in (("asr", asr), ("tts", tts)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictions.jsonl").write_text(jsonl(rows))
    found = read_texts(str(tmp_path / "asr"), "hypothesis")
    assert [entry.text for entry in found.entries.values()] == ["h", None] and not found.is_audio
    found = read_texts(str(tmp_path / "tts"), "hypothesis")
    assert found.is_audio and found.entries["u1"].audio == str(tmp_path / "tts" / "1.wav")
    assert found.entries["u2"].audio is None


def test_a_folder_of_audio_goes_by_the_files_names(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a1.wav", "b/a2.FLAC", "b/notes.txt"):
        (tmp_path / name).touch()
    found = read_texts(str(tmp_path), "hypothesis")
    assert found.is_audio and list(found.entries) == ["a1", "a2"]
    (tmp_path / "b" / "a1.ogg").touch()
    with pytest.raises(ConfigError, match="two files called 'a1'"):
        read_texts(str(tmp_path), "hypothesis")
    with pytest.raises(ConfigError, match="reference: .* holds no predictions.jsonl, no Kaldi `text`"):
        read_texts(str(tmp_path), "reference")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "u1 a\nu2 b\nu1 c\n", "line 3: id 'u1' occurs twice .the first word of a line is its id"),
        ("a.txt", "\n \n", "holds no utterance"),
        ("a.trn", "words (u1)\nwords\n", r"line 2: not `words \(id\)`"),
        ("a.jsonl", '{"id": 1, "text": "a"}\n{"id"\n', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: holds a list, not an object"),
        ("a.jsonl", '{"id": "a", "text": 3}\n', "line 1: text holds 3, which is no text"),
        ("a.jsonl", '{"id": "a", "text": "\\ud800"}\n', "line 1: holds .*half of a character"),
        ("a.jsonl", '{"id": "", "text": "a"}\n', "line 1: id is empty or missing"),
        ("a.jsonl", '{"name": "a", "words": "a"}\n', "has the columns name, words, not any of id"),
        ("a.jsonl", '{"id": "a", "text": "a", "duration": "long"}\n', "line 1: duration 'long' is not a number"),
        ("a.json", "{", "not JSON"),
        ("a.json", '{"a": [1]}', "must hold a list of objects"),
        ("a.csv", "id,text\nu1,a,b\n", "line 2: more fields than the header's 2; quote"),
        ("a.csv", "id,text\nu1\n", "line 2: fewer fields"),
        ("a.csv", 'id,text\nu1,"a\n', "line [1-4]: unexpected end of data"),
        ("a.tsv", "u1\ta\n", "has the columns"),
    ],
)
def test_a_wrong_line_is_named(name, content, message, tmp_path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_texts(str(tmp_path / name), "reference")


def test_files_that_are_not_there_or_not_utf8(tmp_path) -> None:
    with pytest.raises(ConfigError, match="hypothesis: .*none.txt does not exist"):
        read_texts(str(tmp_path / "none.txt"), "hypothesis")
    (tmp_path / "latin.txt").write_bytes("u1 süß\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="latin.txt: not UTF-8"):
        read_texts(str(tmp_path / "latin.txt"), "hypothesis")
    (tmp_path / "text").write_text("u1 a\n")
    (tmp_path / "utt2dur").write_text("u1 long\n")
    with pytest.raises(ConfigError, match="utt2dur: 'long' is not a number of seconds"):
        read_texts(str(tmp_path), "reference")
