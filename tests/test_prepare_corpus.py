"""The embedded corpus: its texts and splits, and the same audio in every run."""

import json
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import soundfile

from recipes.commands import prepare_corpus
from recipes.commands.prepare_corpus import DIGITS, Config, make_lines, read_sentences
from recipes.config import ConfigError, load_config
from recipes.runs.run_folder import RunFolder
from recipes.voices import espeak, flite
from recipes.voices.espeak import EspeakError
from recipes.voices.speaking import Line
from tokenizer.data.utterances import DataError

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


def manifest_of(folder, texts: dict[str, list[str]]):
    rows = [
        {"id": f"{split}-{n}", "audio": "a.flac", "text": text, "speaker": "s", "duration": 1.0, "split": split}
        for split, members in texts.items()
        for n, text in enumerate(members)
    ]
    (folder / "a.flac").touch()
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_phrases_follow_the_training_texts_and_never_say_a_held_out_one(tmp_path):
    texts = {"train": ["The cat sat there, on a mat.", "a dog sat on the cat"], "test": ["a mat the cat"]}
    texts["test"].append(make_lines(Config(n_sentences=0, n_digit_strings=0))[0].text)
    config = Config(n_sentences=0, n_digit_strings=0, n_phrases=30, texts_from=[manifest_of(tmp_path, texts)])
    lines = make_lines(config)
    pairs = {("a", "mat"), ("cat", "sat"), ("dog", "sat"), ("mat", "the"), ("mat", "a"), ("there", "on")}
    phrases = [line.text.split() for line in lines if line.id.startswith("phrase")]
    assert len(phrases) == 30 and all(4 <= len(words) <= 9 for words in phrases)
    follows = {(a, b) for words in phrases for a, b in zip(words, words[1:], strict=False)}
    assert pairs & follows and ("sat", "a") not in follows and ("dog", "cat") not in follows
    assert {word for words in phrases for word in words} <= {"the", "cat", "sat", "there", "on", "a", "mat", "dog"}
    assert not {line.text for line in lines} & set(texts["test"])


def test_no_text_of_another_kind_stands_in_another_split(tmp_path, monkeypatch):
    # Of two words there are 248 strings of 3 to 7, and phrases of them are mostly such strings too.
    monkeypatch.setattr(prepare_corpus, "DIGITS", ("one", "two"))
    texts = {"train": ["one two one two", "two one two one", "one one two", "two two one"]}
    config = Config(n_commands=0, n_sentences=0, n_digit_strings=200, valid_share=0.3, test_share=0.3)
    config.n_phrases, config.texts_from = 60, [manifest_of(tmp_path, texts)]
    kinds, splits = defaultdict(set), defaultdict(set)
    for line in make_lines(config):
        kinds[line.text].add(line.id.split("-")[0])
        splits[line.text].add(line.split)
    assert all(len(found) == 1 for found in splits.values())
    assert any(len(found) == 2 for found in kinds.values())  # within a split, it may be said again


def test_texts_of_held_out_splits_are_left_out_everywhere(tmp_path):
    said = [line.text for line in make_lines(Config())]
    texts = {"train": said[:3], "valid": [said[10].capitalize() + "."], "test": [said[200], said[700], said[-1]]}
    lines = make_lines(Config(texts_excluded=[manifest_of(tmp_path, texts)]))
    now = {line.text for line in lines}
    assert not now & {said[10], said[200], said[700], said[-1]} and set(said[:3]) <= now
    assert make_lines(Config(texts_excluded=[])) == make_lines(Config())
    with pytest.raises(DataError, match="nowhere"):
        make_lines(Config(texts_excluded=["nowhere/manifest.jsonl"]))


def test_too_many_phrases_are_refused(tmp_path):
    manifest = manifest_of(tmp_path, {"train": ["one two"]})
    with pytest.raises(ConfigError, match="50 different texts are asked for, but only"):
        make_lines(Config(n_phrases=50, texts_from=[manifest]))
    with pytest.raises(ConfigError, match="texts_from"):
        load_config(Config, None, ["n_phrases=5"])


def test_flite_speaks_where_it_is_installed(tmp_path, monkeypatch):
    if flite.missing_message():
        pytest.skip("the system package flite is not installed")
    settings = SMALL | {"voices": ["flite:slt", "flite:rms"], "held_out_voice": "flite:awb"}
    manifest = prepare_corpus.run(Config(run_dir=str(tmp_path / "c"), **settings))
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert {row["source"] for row in rows} == {"flite"} and {row["speaker"] for row in rows} >= {"flite:slt"}
    for row in rows:
        info = soundfile.info(manifest.parent / row["audio"])
        assert info.samplerate == 16000 and info.duration == pytest.approx(row["duration"], abs=1e-3)
    with pytest.raises(ConfigError, match="flite has no voice nobody; it has"):
        prepare_corpus.run(Config(run_dir=str(tmp_path / "d"), **settings | {"voices": ["flite:nobody"]}))


def test_a_missing_flite_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="install the system package flite"):
        prepare_corpus.plan(Config(run_dir=str(tmp_path / "c"), voices=["flite:slt"]))


def test_sentences_of_a_file_are_spoken_as_they_stand_and_held_out_texts_are_not(tmp_path):
    file = tmp_path / "prose.txt"
    file.write_text(
        "The cat sat down.\nHe said: no\u2028more!\n\nThe cat sat down.\nPlace red at C.\n", encoding="utf-8"
    )
    held_out = manifest_of(tmp_path, {"test": ["place red at c"]})
    none = {"n_commands": 0, "n_digit_strings": 0, "sentences": str(file)}
    lines = make_lines(Config(**none, n_sentences=3, texts_excluded=[held_out]))
    assert {line.text for line in lines} == {"The cat sat down.", "He said: no\u2028more!"}
    with pytest.raises(ConfigError, match="n_sentences=4: there are 3"):
        make_lines(Config(**none, n_sentences=4))
    file.write_text("Chapter 5 ends.\n5 cats.\nFive cats!\n", encoding="utf-8")
    held_out = manifest_of(tmp_path, {"test": ["chapter five ends"]})
    (line,) = make_lines(Config(**none, n_sentences=3, texts_excluded=[held_out]))
    assert line.text in ("5 cats.", "Five cats!")
    with pytest.raises(ConfigError, match="no such file"):
        make_lines(Config(sentences=str(tmp_path / "none.txt")))
    file.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        make_lines(Config(sentences=str(file)))


def test_piper_s_voice_is_named_by_its_file_and_spoken_in_parts(tmp_path, monkeypatch):
    voice = f"piper:{tmp_path}/en_US-x-medium.onnx"
    lines = make_lines(Config(n_commands=900, n_digit_strings=0, n_sentences=0, voices=["en-us", voice]))
    theirs = [line for line in lines if line.voice == voice]
    assert {Path(line.file).parent.as_posix() for line in theirs} == {"audio/piper-en_US-x-medium"}
    groups = prepare_corpus._spoken_together(lines)
    assert sorted(len(group) for group in groups if group[0].voice == voice)[-2:] == [200, 200]
    assert sum(group[0].voice == "en-us" for group in groups) == 1  # its engine carries state from line to line
    assert [line for group in groups for line in group if line.voice == voice] == theirs
    monkeypatch.setattr("recipes.voices.piper.missing_message", lambda: None)
    with pytest.raises(ConfigError, match=r"en_US-x-medium\.onnx, .*en_US-x-medium\.onnx\.json"):
        prepare_corpus.plan(Config(run_dir=str(tmp_path / "c"), voices=[voice]))


def test_a_missing_piper_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lmspt-slm\[piper\]'"):
        prepare_corpus.plan(Config(run_dir=str(tmp_path / "c"), voices=["piper:x.onnx"]))


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


@pytest.mark.parametrize(
    ("voice", "message"),
    [
        ("xx-none", "no voice xx-none"),
        ("xx+f2", r"no voice xx \(xx\+f2\)"),
        ("f2", "no voice f2"),
        ("en-us+zz", r"no variant zz \(en-us\+zz\); it has .*f2, .*m7"),
        ("en-us+F2", "no variant F2"),
        ("en-us+", "no variant ''"),
    ],
)
def test_an_unknown_voice_is_named_before_anything_is_spoken(tmp_path, voice, message):
    pytest.importorskip("espeakng_loader")
    config = Config(run_dir=str(tmp_path / "c"), **SMALL | {"voices": ["en-us", voice]})
    for what in (prepare_corpus.plan, prepare_corpus.run):
        with pytest.raises(ConfigError, match=f"espeak-ng has {message}.*choose others"):
            what(config)
    assert not (tmp_path / "c").exists()


def test_every_voice_of_the_shipped_configurations_is_there():
    pytest.importorskip("espeakng_loader")
    config = load_config(Config, "embedded/prepare-corpus")
    names = {*config.voices, config.held_out_voice, *Config().voices}
    assert not [found for voice in names if not flite.is_flite(voice) and (found := espeak.unknown_voice(voice))]


def test_an_unknown_voice_of_flite_is_named_by_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(flite, "missing_message", lambda: None)
    monkeypatch.setattr(flite, "voices", lambda: ("slt", "rms"))
    settings = SMALL | {"voices": ["flite:slt", "flite:nobody"], "held_out_voice": "flite:rms"}
    with pytest.raises(ConfigError, match="flite has no voice nobody; it has slt, rms"):
        prepare_corpus.plan(Config(run_dir=str(tmp_path / "c"), **settings))


@pytest.mark.parametrize("error", [EspeakError("no audio"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_after_an_error_no_further_voice_is_begun_and_what_is_spoken_is_kept(tmp_path, monkeypatch, error):
    begun, ending = [], threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            ending.set()
            super().shutdown(wait=wait)

    def speak(lines, folder):
        begun.append(lines[0].voice)
        if lines[0].voice == "b":
            raise error
        assert ending.wait(60)  # still at it when the other one fails
        return {line.id: 1.0 for line in lines}

    monkeypatch.setattr(prepare_corpus, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(prepare_corpus, "_check_voices", lambda voices: None)
    monkeypatch.setattr(prepare_corpus, "_in_fresh_process", speak)
    voices = ["a", "b", *(f"more-{number}" for number in range(20))]
    config = Config(run_dir=str(tmp_path / "c"), voices=voices, n_sentences=0, n_digit_strings=0)
    with pytest.raises(ConfigError if isinstance(error, EspeakError) else KeyboardInterrupt):
        prepare_corpus.run(config)
    assert {"a", "b"} <= set(begun) <= {"a", "b", "more-0"}
    kept = {path.name.rpartition("-")[0] for path in RunFolder(config.run_dir).checkpoints.iterdir()}
    assert kept == set(begun) - {"b"}


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
