"""The embedded corpus: its texts and splits, and the same audio in every run."""

import json
from collections import defaultdict

import pytest
import soundfile

from recipes import prepare_corpus
from recipes.config import ConfigError, load_config
from recipes.prepare_corpus import DIGITS, Config, Line, make_lines, read_sentences

SMALL = {"n_commands": 4, "n_digit_strings": 2, "n_sentences": 4, "voices": ["en-us"]}
SMALL |= {"valid_share": 0.25, "test_share": 0.5}


def test_the_texts_follow_their_grammars_and_no_text_stands_in_two_splits():
    lines = make_lines(Config())
    splits = defaultdict(set)
    for line in lines:
        splits[line.text].add(line.split)
        words = line.text.split()
        if line.id.startswith("command"):
            assert len(words) == 6 and words[4] in DIGITS and words[3] != "w" and len(words[3]) == 1
        elif line.id.startswith("digits"):
            assert 3 <= len(words) <= 7 and set(words) <= set(DIGITS)
        else:
            assert line.text in read_sentences()
    assert len(splits) == len(lines) and all(len(found) == 1 for found in splits.values())
    assert {line.split for line in lines} == {"train", "valid", "test"}


def test_the_held_out_voice_speaks_in_the_test_split_alone():
    config = Config()
    lines = make_lines(config)
    held_out = [line for line in lines if line.voice == config.held_out_voice]
    assert {line.split for line in held_out} == {"test"}
    assert 0.3 < len(held_out) / sum(line.split == "test" for line in lines) < 0.7
    assert {line.voice for line in lines if line.split == "train"} == set(config.voices)


def test_the_lines_depend_on_the_seed_alone():
    assert make_lines(Config()) == make_lines(Config())
    assert make_lines(Config(seed=1)) != make_lines(Config())


def test_the_sentences_are_plain_and_differ():
    sentences = read_sentences()
    assert len(sentences) >= 280 and len(set(sentences)) == len(sentences)
    assert all(3 <= len(text.split()) <= 12 for text in sentences)


def test_the_letter_a_is_spoken_as_a_letter():
    assert (
        Line("command-0", "set white at a two now", "train", "en-us", 160, 50).spoken == "set white at [[e'I]] two now"
    )
    assert Line("sentence-0", "he had a look at a red kite", "train", "en-us", 160, 50).spoken.count("[[") == 0


def test_settings_that_cannot_work_are_refused():
    for wrong in (["voices=[en-us+m7]"], ["valid_share=0"], ["test_share=0.99"], ["n_commands=-1"]):
        with pytest.raises(ConfigError):
            load_config(Config, None, wrong)
    with pytest.raises(ConfigError, match="there are"):
        make_lines(Config(n_sentences=100_000))


def test_a_missing_engine_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "espeakng_loader", None)
    with pytest.raises(ConfigError, match=r"pip install 'lmspt-slm\[synthesis\]'"):
        prepare_corpus.plan(Config(run_dir=str(tmp_path / "c")))


def test_an_unknown_voice_is_named(tmp_path):
    pytest.importorskip("espeakng_loader")
    with pytest.raises(ConfigError, match="xx-none.*espeak_SetVoiceByName"):
        prepare_corpus.run(Config(run_dir=str(tmp_path / "c"), **SMALL | {"voices": ["xx-none"]}))


def test_the_corpus_is_the_same_in_every_run_interrupted_or_not(tmp_path):
    pytest.importorskip("espeakng_loader")
    whole = prepare_corpus.run(Config(run_dir=str(tmp_path / "whole"), **SMALL)).parent
    # As if killed after the voices were spoken, before the manifest was written, one voice's audio half there.
    cut = prepare_corpus.run(Config(run_dir=str(tmp_path / "cut"), **SMALL)).parent
    for name in ("manifest.jsonl", "complete.json"):
        (cut / name).unlink()
    next((cut / "checkpoints").glob("en-us+m7*")).unlink()
    next((cut / "audio" / "en-us+m7").glob("*.flac")).unlink()
    prepare_corpus.run(Config(run_dir=str(tmp_path / "cut"), **SMALL))
    rows = [json.loads(line) for line in (whole / "manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and (cut / "manifest.jsonl").read_bytes() == (whole / "manifest.jsonl").read_bytes()
    for row in rows:
        assert (cut / row["audio"]).read_bytes() == (whole / row["audio"]).read_bytes()
        info = soundfile.info(whole / row["audio"])
        assert info.samplerate == 16000 and info.duration == pytest.approx(row["duration"], abs=1e-3)
        assert 0.4 < info.duration < 8
