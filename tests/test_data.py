"""Sources to utterances to waveforms: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
import re
import sys
import time

import numpy as np
import pytest
import soundfile

from recipes.encoding.plan import read_splits
from recipes.runs.files import text_lines
from recipes.scoring.predictions import read_predictions
from recipes.scoring.text_files import read_texts
from tokenizer.data.audio import load_audio
from tokenizer.data.augmentation import AugmentationConfig, augment, move_formants, reverberate
from tokenizer.data.manifest import read_source, read_sources
from tokenizer.data.mixing import epoch_item
from tokenizer.data.pieces import AudioStore
from tokenizer.data.utterances import AudioError, DataError, DataSource, Utterance, text_of


def tone(seconds: float, rate: int = 16000) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_manifest(folder, rows):
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_manifest_keeps_its_own_splits_unless_told_otherwise(tmp_path):
    path = write_manifest(
        tmp_path,
        [
            {"id": "a", "audio": "a.wav", "text": "one", "split": "train"},
            {"id": "b", "audio": "b.wav", "split": "test"},
        ],
    )
    assert [u.id for u in read_source(DataSource(str(path)), "train")] == ["a"]
    assert [u.id for u in read_source(DataSource(str(tmp_path)), "test")] == ["b"]
    assert read_source(DataSource(str(path)), "valid") == []
    whole = read_source(DataSource(str(path), split="valid"), "valid")
    assert [(u.id, u.split) for u in whole] == [("a", "valid"), ("b", "valid")]
    assert read_source(DataSource(str(path), split="valid"), "train") == []


def test_relative_audio_paths_start_at_the_manifest(tmp_path):
    path = write_manifest(tmp_path, [{"id": "a", "audio": "sub/a.wav"}])
    assert read_source(DataSource(str(path)), "train")[0].audio == str(tmp_path / "sub" / "a.wav")


@pytest.mark.parametrize(
    ("line", "words"),
    [("{}", "line 1"), ("not json", "line 1"), ('{"id": "a", "audio": "a", "split": "dev"}', "'dev'")],
)
def test_a_bad_manifest_line_is_named(tmp_path, line, words):
    (tmp_path / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=words):
        read_source(DataSource(str(tmp_path)), "train")


@pytest.mark.parametrize("duration", ["-1.5", "0", "NaN", "Infinity", '"3"', "true"])
def test_a_duration_that_cannot_be_is_named(tmp_path, duration):
    (tmp_path / "manifest.jsonl").write_text(f'{{"id": "a", "audio": "a", "duration": {duration}}}\n')
    with pytest.raises(DataError, match="manifest.jsonl, line 1: duration .* is not a number of seconds above 0"):
        read_source(DataSource(str(tmp_path)), "train")


ODD = "one\u2028two\u2029three\x85four\nfive\0six\x1cseven \U0001f600"


def test_any_character_of_a_text_comes_back_from_a_manifest(tmp_path):
    rows = [{"id": "a", "audio": "a.wav", "text": ODD}, {"id": "b", "audio": "b.wav"}]
    for plain in (True, False):
        lines = "".join(json.dumps(row, ensure_ascii=not plain) + "\n" for row in rows)
        (tmp_path / "manifest.jsonl").write_text(lines, encoding="utf-8-sig" if plain else "utf-8")
        assert [u.text for u in read_source(DataSource(str(tmp_path)), "train")] == [ODD, ""]


def test_a_text_that_no_file_could_hold_is_named(tmp_path):
    write_manifest(tmp_path, [{"id": "a", "audio": "a.wav", "text": "half \ud83d of it"}])
    with pytest.raises(DataError, match=r"line 1: holds '\\ud83d', half of a character"):
        read_source(DataSource(str(tmp_path)), "train")
    (tmp_path / "manifest.jsonl").write_bytes('{"id": "a", "audio": "a", "text": "Gr\xfc\xdfe"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"manifest.jsonl: not UTF-8 .*iconv -f ISO-8859-1"):
        read_source(DataSource(str(tmp_path)), "train")
    (tmp_path / "manifest.jsonl").write_bytes('{"id": "a", "audio": "a", "text": "Grüße"}'.encode("utf-16"))
    with pytest.raises(DataError, match=r"manifest.jsonl: not UTF-8 .*iconv -f UTF-16"):
        read_source(DataSource(str(tmp_path)), "train")


def test_a_recording_where_texts_or_a_manifest_were_to_be_is_named_as_what_it_is(tmp_path):
    recording = tmp_path / "a.wav"
    soundfile.write(recording, tone(0.2), 16000)
    with pytest.raises(DataError, match=r"a\.wav: a file, but no manifest.* give their folder"):
        read_source(DataSource(str(recording)), "train")
    for read in (text_of, text_lines):
        with pytest.raises(DataError, match=r"a\.wav: no text but audio"):
            read(recording)
    for read in (read_predictions, lambda name: read_texts(name, "hypothesis")):
        with pytest.raises(ValueError, match=r"a\.wav: no text but audio"):
            read(str(recording))


def test_a_manifest_of_100000_rows_is_read_in_seconds(tmp_path):
    row = json.dumps({"id": "ID", "audio": "ID.wav", "text": "some words to say", "speaker": "s", "duration": 3.5})
    (tmp_path / "manifest.jsonl").write_text("".join(row.replace("ID", f"u{n}") + "\n" for n in range(100_000)))
    started = time.process_time()
    assert len(read_sources([DataSource(str(tmp_path))], "train")) == 100_000
    assert time.process_time() - started < 20


def test_paths_of_any_characters_and_links_are_read_and_what_is_no_file_is_named(tmp_path, monkeypatch):
    name = "a b/\u5317\u4eac #1%.flac"
    (tmp_path / "a b").mkdir()
    soundfile.write(tmp_path / name, tone(0.5), 16000)
    (tmp_path / "link.flac").symlink_to(tmp_path / name)
    rows = [{"id": str(n), "audio": audio} for n, audio in enumerate([name, "link.flac", "a b", str(tmp_path / name)])]
    found = read_source(DataSource(str(write_manifest(tmp_path, rows))), "train")
    assert [len(load_audio(found[n], 16000)) for n in (0, 1, 3)] == [8000] * 3
    with pytest.raises(AudioError, match="a b: a folder, not a recording"):
        load_audio(found[2], 16000)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read anything
    with pytest.raises(AudioError, match=r"link.flac: may not be read by this user: chmod \+r"):
        load_audio(found[1], 16000)


ASKED = {"role": "user", "content": "Which colour?"}
SAID = {"role": "assistant", "content": "Gr\u00fcn."}
HEARD = {
    "role": "user",
    "content": [{"type": "audio", "audio_url": "x.wav"}, {"type": "text", "text": "Which colour?"}],
}


@pytest.fixture
def read_row(tmp_path):
    """Reads the columns of one row with a further key, from a manifest and from a Parquet file: both must agree."""
    datasets = pytest.importorskip("datasets")
    soundfile.write(tmp_path / "x.wav", tone(0.5), 16000)
    names = ["instruction", "answer", "words"]

    def read(**further):
        (of_manifest,) = read_source(
            DataSource(str(write_manifest(tmp_path, [{"id": "x", "audio": "x.wav"} | further])), columns=names), "train"
        )
        table = datasets.Dataset.from_list(
            [{"id": "x", "audio": {"bytes": None, "path": "x.wav"}, "text": ""} | further]
        )
        table.to_parquet(str(tmp_path / "t.parquet"))
        (of_table,) = read_source(DataSource(str(tmp_path / "t.parquet"), columns=names), "train")
        assert dict(of_manifest.columns) == dict(of_table.columns)
        return dict(of_table.columns)

    return read


@pytest.mark.parametrize("exchange", [[ASKED, SAID], json.dumps([ASKED, SAID]), [HEARD, SAID]])
def test_an_exchange_of_messages_is_an_instruction_and_its_answer(read_row, exchange):
    if exchange[0] is HEARD:
        exchange = json.dumps(exchange)  # a Parquet column holds one type
    assert read_row(messages=exchange) == {"instruction": "Which colour?", "answer": "Gr\u00fcn.", "words": ""}


def test_columns_of_their_own_go_before_messages(read_row):
    """As in what `slm describe-corpus` writes, whose messages tell the metadata too."""
    own = {"instruction": "What?", "answer": ""}
    assert read_row(messages=[ASKED, SAID], words=["one"], **own) == own | {"words": '["one"]'}
    assert read_row(messages=[ASKED]) == {"instruction": "Which colour?", "answer": "", "words": ""}


@pytest.mark.parametrize(
    ("exchange", "words"),
    [
        ([ASKED, SAID, ASKED, SAID], "turns user, assistant, user, assistant; one of the user and then one of the as"),
        ([{"role": "system", "content": "Be brief."}, ASKED, SAID], "turns system, user, assistant"),
        ([SAID], "turns assistant"),
        ([{"from": "human", "value": "Which colour?"}], 'must be a list of {"role": ..., "content": ...}'),
        ("user: Which colour?", "messages is not JSON"),
        ([{"role": "user", "content": [{"type": "image", "url": "a.png"}]}, SAID], "parts of type text and audio"),
        ([{"role": "user", "content": None}, SAID], "the content of messages must be a text"),
    ],
)
def test_other_messages_are_refused_with_their_row(tmp_path, exchange, words):
    rows = [
        {"id": "a", "audio": "a.wav", "messages": [ASKED, SAID]},
        {"id": "b", "audio": "b.wav", "messages": exchange},
    ]
    source = DataSource(str(write_manifest(tmp_path, rows)), columns=["answer"])
    with pytest.raises(DataError, match=rf"manifest.jsonl, line 2: .*{re.escape(words)}"):
        read_source(source, "train")
    assert len(read_source(DataSource(source.path), "train")) == 2  # who does not ask for it is not stopped


def test_duplicate_ids_and_empty_splits_are_refused(tmp_path):
    path = write_manifest(tmp_path, [{"id": "a", "audio": "a.wav"}, {"id": "a", "audio": "b.wav"}])
    with pytest.raises(DataError, match="ids must differ"):
        read_sources([DataSource(str(path))], "train")
    with pytest.raises(DataError, match=r"no utterances in split 'test' of \S+; there are train \(\d+\)"):
        read_sources([DataSource(str(path))], "test")
    with pytest.raises(DataError, match=r"no utterances in split 'valid', 'test' of \S+; there are train \(2\)"):
        read_splits([DataSource(str(path))], ["valid", "test"])
    with pytest.raises(DataError, match="nowhere.jsonl: no such manifest; correct the path, or make it first"):
        read_sources([DataSource("nowhere.jsonl")], "train")
    with pytest.raises(DataError, match="^nowhere.parquet: no such Parquet file: correct the path$"):
        read_sources([DataSource("nowhere.parquet")], "train")
    path.write_text("\n")
    with pytest.raises(DataError, match=r"^no utterances in \S+manifest.jsonl, in no split: correct the path$"):
        read_sources([DataSource(str(path))], "train")


def test_folder_takes_text_from_beside_the_audio(tmp_path):
    (tmp_path / "anna").mkdir()
    soundfile.write(tmp_path / "anna" / "x.flac", tone(0.5), 16000)
    (tmp_path / "anna" / "x.txt").write_text("hello\n")
    (found,) = read_source(DataSource(str(tmp_path), split="test"), "test")
    assert (found.id, found.text, found.speaker, found.split) == ("anna/x", "hello", "anna", "test")


def test_parquet_rows_are_read_without_decoding_in_datasets(tmp_path, monkeypatch):
    """By soundfile, as a FLAC beside it: torchcodec and torchaudio, which datasets decodes by, may be absent."""
    datasets = pytest.importorskip("datasets")
    for package in ("torchcodec", "torchaudio"):
        monkeypatch.setitem(sys.modules, package, None)
    soundfile.write(tmp_path / "y.flac", tone(0.5), 16000)
    assert np.allclose(load_audio(str(tmp_path / "y.flac"), 16000), tone(0.5), atol=1e-3)
    soundfile.write(tmp_path / "x.wav", tone(0.5), 16000)
    rows = {"audio": [{"bytes": (tmp_path / "x.wav").read_bytes(), "path": "x.wav"}], "text": ["one"], "id": ["x"]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "set.parquet"))
    (found,) = read_source(DataSource(str(tmp_path / "set.parquet"), split="train"), "train")
    assert found.text == "one"
    assert np.allclose(load_audio(found, 16000), tone(0.5), atol=1e-3)


def test_a_hub_name_that_cannot_be_reached_says_so():
    with pytest.raises(DataError, match="owner/unknown-set.*manifest"):
        read_source(DataSource("owner/unknown-set"), "train")


def bad_files(folder):
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.flac").write_text("this is not audio")
    soundfile.write(folder / "short.wav", tone(0.005), 16000)
    soundfile.write(folder / "silent.wav", np.zeros(16000, np.float32), 16000)
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    return {
        "missing.wav": "no such file",
        "empty.wav": "empty",
        "text.flac": "not audio",
        "short.wav": "5.0 ms",
        "silent.wav": "silent",
        "nan.wav": "NaN",
    }


def test_every_fault_is_told_apart_and_names_the_file(tmp_path):
    for name, words in bad_files(tmp_path).items():
        with pytest.raises(AudioError, match=words) as caught:
            load_audio(str(tmp_path / name), 16000)
        assert name in str(caught.value)
    soundfile.write(tmp_path / "long.wav", tone(2.0), 16000)
    with pytest.raises(AudioError, match="2.0 s, more than max_duration_s=1"):
        load_audio(str(tmp_path / "long.wav"), 16000, max_duration_s=1)


def test_stereo_of_another_rate_becomes_mono_at_the_rate_asked_for(tmp_path):
    left = tone(1.0, 44100)
    soundfile.write(tmp_path / "s.wav", np.stack([left, left], 1), 44100)
    samples = load_audio(str(tmp_path / "s.wav"), 16000)
    assert samples.shape == (16000,) and samples.dtype == np.float32
    assert np.abs(samples[500:-500] - tone(1.0)[500:-500]).max() < 1e-2


def test_the_store_replaces_what_it_cannot_read_and_counts_it(tmp_path):
    names = list(bad_files(tmp_path))
    soundfile.write(tmp_path / "good.wav", tone(0.5), 16000)
    store = AudioStore([Utterance(n, str(tmp_path / n)) for n in [*names, "good.wav"]], 16000)
    assert all(store.readable(index)[0].id == "good.wav" for index in range(len(store)))
    assert store.n_failed == len(names)
    with pytest.raises(AudioError, match="none of the 1 recordings"):
        AudioStore([Utterance("x", str(tmp_path / "empty.wav"))], 16000).readable(0)


def test_every_epoch_visits_each_item_once_in_a_new_order():
    epochs = [[epoch_item(e * 10 + i, 10, seed=3) for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[1] == [epoch_item(10 + i, 10, seed=3) for i in range(10)]
    assert epochs[0] != [epoch_item(i, 10, seed=4) for i in range(10)]


def test_augmentation_is_drawn_from_the_generator_alone_and_zero_changes_nothing():
    config = AugmentationConfig()
    first = augment(tone(1.0), config, np.random.default_rng((1, 2)), 16000)
    again = augment(tone(1.0), config, np.random.default_rng((1, 2)), 16000)
    other = augment(tone(1.0), config, np.random.default_rng((1, 3)), 16000)
    assert np.array_equal(first, again)
    assert len(first) != len(other)
    nothing = AugmentationConfig(speed=0, level_db=0, noise_probability=0)
    assert np.array_equal(augment(tone(1.0), nothing, np.random.default_rng(0), 16000), tone(1.0))
    assert np.abs(augment(tone(1.0), AugmentationConfig(level_db=40.0), np.random.default_rng(5), 16000)).max() <= 1.0


def vowel(pitch_hz: float = 100.0, formant_hz: float = 1000.0) -> np.ndarray:
    """One second at 16 kHz: harmonics of a pitch under one formant."""
    time_s = np.arange(16000) / 16000
    harmonics = np.arange(1, int(7000 / pitch_hz)) * pitch_hz
    levels = np.exp(-(((harmonics - formant_hz) / 300) ** 2)) + 1e-3
    return (0.1 * levels[:, None] * np.sin(2 * np.pi * harmonics[:, None] * time_s)).sum(0).astype(np.float32)


@pytest.mark.parametrize("factor", [0.85, 1.15])
def test_formants_move_and_the_pitch_stays(factor):
    moved = move_formants(vowel(), factor, 16000)
    power = np.abs(np.fft.rfft(moved[2000:14000] * np.hanning(12000))) ** 2
    frequencies = np.fft.rfftfreq(12000, 1 / 16000)
    centre = (power * frequencies).sum() / power.sum()
    assert centre == pytest.approx(1000 * factor, rel=0.04)
    at_harmonics = np.abs(frequencies / 100 - np.round(frequencies / 100)) < 0.05
    assert power[at_harmonics].sum() > 0.98 * power.sum()
    assert np.sqrt(np.mean(moved**2) / np.mean(vowel() ** 2)) == pytest.approx(1, abs=0.2)


def test_formants_by_a_factor_of_one_are_the_waveform_itself():
    assert np.abs(move_formants(vowel(), 1.0, 16000) - vowel()).max() < 1e-5


def test_a_room_decays_as_long_as_it_was_asked_to_and_leaves_the_direct_sound():
    click = np.zeros(16000, np.float32)
    click[0] = 1.0
    room = reverberate(click, 0.3, 10.0, 16000, np.random.default_rng(0))
    assert len(room) == len(click) and room[0] == pytest.approx(1.0, abs=1e-5)
    tail = room[1:].astype(np.float64) ** 2
    assert 10 * np.log10(tail.sum()) == pytest.approx(-10, abs=0.1)
    left = 10 * np.log10(tail[::-1].cumsum()[::-1] / tail.sum())
    assert (left < -30).argmax() / 16000 == pytest.approx(0.15, rel=0.15)  # half of the way to -60 dB


def test_room_and_formants_leave_the_other_draws_alone():
    """A training that was begun before there were any goes on with the same crops."""
    plain, rich = AugmentationConfig(), AugmentationConfig(formants=0.15, reverb_probability=1.0)
    for config in (plain, rich):
        rng = np.random.default_rng((1, 2))
        augment(tone(1.0), config, rng, 16000)
        config.next_draw = rng.uniform()
    assert plain.next_draw == rich.next_draw
    changed = augment(tone(1.0), rich, np.random.default_rng((1, 2)), 16000)
    assert len(changed) == len(augment(tone(1.0), plain, np.random.default_rng((1, 2)), 16000))


@pytest.mark.parametrize(
    "settings", [{"formants": 0.6}, {"reverb_probability": 2}, {"reverb_t60_s": (0, 1)}, {"reverb_drr_db": (2, 1)}]
)
def test_augmentation_that_cannot_be_names_its_key(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AugmentationConfig(**settings)


def test_added_noise_has_the_level_asked_for():
    config = AugmentationConfig(speed=0, level_db=0, noise_probability=1, noise_snr_db=(20, 20))
    noise = augment(tone(1.0), config, np.random.default_rng(0), 16000) - tone(1.0)
    snr = 10 * np.log10(np.mean(tone(1.0) ** 2) / np.mean(noise**2))
    assert abs(snr - 20) < 0.1


def test_two_sources_with_the_same_ids_are_read_together_by_a_prefix(make_corpus):
    manifest = str(make_corpus(2, "train"))
    with pytest.raises(DataError, match=r"'train0' .*ids must differ; .*id_prefix"):
        read_sources([DataSource(manifest), DataSource(manifest)], "train")
    both = read_sources([DataSource(manifest), DataSource(manifest, id_prefix="b-")], "train")
    assert [utterance.id for utterance in both] == ["train0", "train1", "b-train0", "b-train1"]
    assert both[0].audio == both[2].audio


def test_a_split_is_made_of_some_of_a_sources_own(make_corpus):
    """Held-out parts of small corpora together: their training part must stay out."""
    for split in ("train", "valid", "test"):
        manifest = make_corpus(2, split)
    wanted = ["valid0", "valid1", "test0", "test1"]
    held_out = DataSource(str(manifest), split="test", own_splits=["valid", "test"])
    assert [u.id for u in read_source(held_out, "test")] == wanted
    assert all(u.split == "test" for u in read_source(held_out, "test")) and not read_source(held_out, "train")
    with pytest.raises(ValueError, match="own_splits goes with `split`"):
        DataSource(str(manifest), own_splits=["valid"])
    (folder := manifest.parent / "plain").mkdir()
    with pytest.raises(DataError, match="own_splits reads a manifest or a Parquet file"):
        read_source(DataSource(str(folder), split="test", own_splits=["valid"]), "test")
