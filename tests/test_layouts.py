"""Corpora as they are downloaded: texts, speakers and splits are those that the corpus means."""

from __future__ import annotations

import logging

import pytest
import soundfile
from conftest import tone

from tokenizer.data.manifest import read_source
from tokenizer.data.utterances import DataError, DataSource


def build(root, audio, texts):
    for name in audio:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, tone(0.2), 16000)
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def read(path, wanted="train", **settings):
    found = read_source(DataSource(str(path), **settings), wanted)
    return {u.id.rsplit("/", 1)[-1]: (u.text, u.speaker) for u in found}


def test_librispeech(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = build(
        tmp_path / "LibriSpeech",
        [f"{part}/84/121123/84-121123-000{n}.flac" for part in ("train-clean-100", "dev-other") for n in range(2)]
        + ["test-clean/61/70968/61-70968-0000.flac", "test-clean/61/70970/61-70970-0000.flac"],
        {
            "train-clean-100/84/121123/84-121123.trans.txt": "84-121123-0000 GO\n84-121123-0001 DO YOU\u2028 HEAR\n",
            "dev-other/84/121123/84-121123.trans.txt": "84-121123-0000 OTHER\n",
            "test-clean/61/70968/61-70968.trans.txt": "61-70968-0000 ONE CHAPTER\n",
            "test-clean/61/70970/61-70970.trans.txt": "61-70970-0000 AND ANOTHER\n",
            "SPEAKERS.TXT": "; of the whole\n",
        },
    )
    assert read(root) == {"84-121123-0000": ("GO", "84"), "84-121123-0001": ("DO YOU\u2028 HEAR", "84")}
    assert "read as LibriSpeech" in caplog.text and "no transcript" not in caplog.text
    assert read(root, "valid") == {"84-121123-0000": ("OTHER", "84"), "84-121123-0001": ("", "84")}
    assert "1 of 2 have no transcript: dev-other/84/121123/84-121123-0001" in caplog.text
    assert read(root, "test").keys() == {"61-70968-0000", "61-70970-0000"}
    # a part alone, by its own name, and the path has the last word
    assert read(root / "test-clean") == {} and len(read(root / "test-clean", "test")) == 2
    assert read(root / "dev-other" / "84" / "121123", "valid")["84-121123-0000"] == ("OTHER", "84")
    assert len(read(root / "test-clean", "train", split="train")) == 2


def test_libritts(tmp_path, caplog):
    folder = "dev-clean/84/121123"
    root = build(
        tmp_path / "LibriTTS",
        [f"{folder}/84_121123_000008_00000{n}.wav" for n in range(3)],
        {
            f"{folder}/84_121123_000008_000000.normalized.txt": "Mister Five?\n",
            f"{folder}/84_121123_000008_000000.original.txt": "Mr. 5?\n",
            f"{folder}/84_121123_000008_000001.original.txt": "Mr. 6.\n",
            f"{folder}/84_121123.trans.tsv": "84_121123_000008_000000\tMr. 5?\tMister Five?\n",
        },
    )
    names = [f"84_121123_000008_00000{n}" for n in range(3)]
    assert read(root) == {}
    assert read(root, "valid") == dict(zip(names, [("Mister Five?", "84"), ("Mr. 6.", "84"), ("", "84")], strict=True))
    assert f"1 of 3 have no transcript: {folder}/{names[2]}" in caplog.text


def test_ljspeech(tmp_path, caplog):
    lines = 'LJ001-0001|"He said 5|"He said five\nLJ001-0002|Only this|\nLJ001-0003|both|Both\x85 of it\n'
    root = build(tmp_path / "LJSpeech-1.1", [f"wavs/LJ001-000{n}.wav" for n in range(1, 5)], {"metadata.csv": lines})
    speaker = "LJSpeech-1.1"
    assert read(root) == {
        "LJ001-0001": ('"He said five', speaker),
        "LJ001-0002": ("Only this", speaker),
        "LJ001-0003": ("Both\x85 of it", speaker),
        "LJ001-0004": ("", speaker),
    }
    assert "1 of 4 have no transcript: wavs/LJ001-0004" in caplog.text
    assert read(root, "test") == {} and len(read(root, "test", split="test")) == 4


@pytest.mark.parametrize("version", ["0.92", "0.80"])
def test_vctk(tmp_path, caplog, version):
    if version == "0.92":
        audio = [f"wav48_silence_trimmed/{s}/{s}_001_mic{mic}.flac" for s in ("p225", "p226") for mic in (1, 2)]
        names = ("p225_001_mic1", "p226_001_mic1")
    else:
        audio, names = [f"wav48/{s}/{s}_001.wav" for s in ("p225", "p226")], ("p225_001", "p226_001")
    root = build(tmp_path / "VCTK", audio, {"txt/p225/p225_001.txt": "Please call Stella.\n", "readme.txt": "VCTK"})
    assert read(root) == {names[0]: ("Please call Stella.", "p225"), names[1]: ("", "p226")}
    assert "1 of 2 have no transcript" in caplog.text


def test_seed_tts_eval(tmp_path, caplog):
    """Its recordings with the texts to be spoken; the voices that prompt them are no utterances."""
    lines = [
        "a-b|A prompt.|prompt-wavs/a.wav|Get to the bank.",
        "c-d.wav|Another.|prompt-wavs/a.wav|你好。",
        "e-f|Another.|prompt-wavs/a.wav|Elsewhere.|human/f.wav",
        "g-h|Another.|prompt-wavs/a.wav|Not recorded.",
    ]
    audio = ["wavs/a-b.wav", "wavs/c-d.wav", "human/f.wav", "prompt-wavs/a.wav"]
    root = build(tmp_path / "en", audio, {"meta.lst": "\n".join(lines) + "\n", "hardcase.lst": "x|y|z|another set\n"})
    assert read(root) == {"a-b": ("Get to the bank.", ""), "c-d": ("你好。", ""), "f": ("Elsewhere.", "")}
    assert "meta.lst names 1 recordings that are not there" in caplog.text
    assert read(root, "test", split="test").keys() == {"a-b", "c-d", "f"} and read(root, "test") == {}


def test_any_other_tree_is_read_as_before_through_links_and_once(tmp_path, caplog):
    elsewhere = build(tmp_path / "disk", ["anna/a b.wav", "anna/\u5317.wav"], {"anna/a b.txt": "hello\n"})
    root = build(tmp_path / "mine", ["bert/z.wav"], {})
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(root)
    found = read_source(DataSource(str(root)), "train")
    assert [u.id for u in found] == ["bert/z", "linked/anna/a b", "linked/anna/\u5317"]
    assert [(u.text, u.speaker) for u in found] == [("", "bert"), ("hello", "anna"), ("", "anna")]
    assert "2 of 3 have no transcript: bert/z, linked/anna/\u5317" in caplog.text
    caplog.clear()
    assert len(read(build(tmp_path / "audio", ["x.wav", "y.wav"], {}))) == 2  # audio alone is enough
    assert "transcript" not in caplog.text
    (root / "bert" / "z.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="z.txt: not UTF-8"):
        read(root)
    with pytest.raises(DataError, match="no audio files"):
        read(build(tmp_path / "texts", [], {"a.txt": "x"}))


def test_many_missing_transcripts_are_counted_and_the_first_are_named(tmp_path, caplog):
    audio = [f"test-clean/1/2/1-2-{n:04d}.flac" for n in range(9)]
    read(build(tmp_path, audio, {"test-clean/1/2/1-2.trans.txt": "1-2-0000 A\n"}), "test")
    assert "8 of 9 have no transcript" in caplog.text and "1-2-0005 and 3 more" in caplog.text
