"""slm encode: what goes in comes out coded, bad files are named and counted, a killed run ends in the same bytes."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import tone
from processes import slm, start
from safetensors.torch import load_file, save_file

from recipes.commands import encode
from recipes.commands.encode import Config
from recipes.config import ConfigError, dump_config, load_config
from recipes.encoding.plan import Item, Variation, assign_shards, bucket, data_fingerprint, deal, interleaved
from recipes.runs.files import text_lines
from slm.corpus import CodedCorpus
from tokenizer import LMSPTModel, load_tokenizer
from tokenizer.data.utterances import AudioError, DataError, DataSource, Utterance
from tokenizer.model.configuration import preset_config


@pytest.fixture
def config(tmp_path, tiny_tokenizer, make_corpus):
    manifest = make_corpus(6)
    return Config(
        run_dir=str(tmp_path / "codes"),
        tokenizer=str(tiny_tokenizer),
        data=[DataSource(str(manifest))],
        precision="fp32",
    )


def test_codes_are_the_tokenizer_s(config, tiny_tokenizer):
    corpus = CodedCorpus.open(encode.run(config))
    rows = {row["id"]: row for row in corpus.rows("train")}
    assert set(rows) == {f"train{n}" for n in range(6)} and corpus.splits == ["train"]
    tokenizer = load_tokenizer(tiny_tokenizer)
    waveform, _ = soundfile.read(os.path.join(os.path.dirname(config.data[0].path), "train3.flac"), dtype="float32")
    with torch.inference_mode():
        alone = tokenizer.encode(torch.from_numpy(waveform)[None, None]).audio_codes[0].numpy()
    assert rows["train3"]["audio_codes"].shape == alone.shape
    assert (rows["train3"]["audio_codes"] == alone).mean() > 0.99
    assert rows["train3"]["text"] == "text 3" and rows["train3"]["speaker"] == "anna"
    assert rows["train3"]["duration"] == pytest.approx(0.6)
    assert corpus.metadata.fingerprint == tokenizer.fingerprint("fp32")


def test_columns_that_a_source_is_asked_for_are_kept(config, tmp_path):
    manifest = Path(config.data[0].path)
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    rows = [row | ({"translation": f"Satz {i}", "topic": 7} if i else {}) for i, row in enumerate(rows)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plain = CodedCorpus.open(encode.run(config))
    assert plain.metadata.columns == [] and next(plain.rows("train"))["columns"] == {}
    config.run_dir, config.data[0].columns = str(tmp_path / "more"), ["translation", "topic"]
    corpus = CodedCorpus.open(encode.run(config))
    found = {row["id"]: row["columns"] for row in corpus.rows("train")}
    assert found["train0"] == {"translation": "", "topic": ""}
    assert found["train5"] == {"translation": "Satz 5", "topic": "7"}
    assert corpus.metadata.plan["data"] != plain.metadata.plan["data"]
    config.run_dir, config.data[0].columns = str(tmp_path / "none"), ["translatoin"]
    with pytest.raises(ConfigError, match="no utterance has a column 'translatoin'"):
        encode.run(config)


def test_a_hash_of_the_data_knows_columns_only_where_there_are_any():
    told = json.dumps(["test", "a", "one", "anna", 1.5])
    plain = Utterance("a", "a.wav", "one", "anna")
    assert data_fingerprint({"test": [plain]}, [1.5]) == hashlib.sha256(told.encode()).hexdigest()
    more = dataclasses.replace(plain, columns={"translation": "eins"})
    assert data_fingerprint({"test": [more]}, [1.5]) != data_fingerprint({"test": [plain]}, [1.5])


def test_texts_of_any_alphabet_are_encoded_where_the_locale_knows_none(config, tmp_path):
    """A C locale as it was before Python 3.7: every file is opened with its own encoding."""
    manifest = Path(config.data[0].path)
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").split("\n") if line][:3]
    rows[0]["text"], rows[1]["text"] = "Gr\u00fc\u00dfe\u2028\u5317\u4eac", "tab\tand\nline\0"
    rows[2] |= {"id": "\u5317\u4eac\x85", "audio": "gone.flac"}
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    manifest.write_text(lines, encoding="utf-8")
    (tmp_path / "job.yaml").write_text(dump_config(config), encoding="utf-8")
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    command = [sys.executable, "-m", "recipes.cli", "encode", "--config", str(tmp_path / "job.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    found = {row["id"]: row["text"] for row in CodedCorpus.open(config.run_dir).rows("train")}
    assert found == {row["id"]: row["text"] for row in rows[:2]}
    (skipped,) = [json.loads(line) for line in text_lines(Path(config.run_dir) / "skipped.jsonl")]
    assert skipped["id"] == rows[2]["id"] and "no such file" in skipped["reason"]


def test_a_complete_corpus_is_skipped_and_another_configuration_refused(config):
    folder = encode.run(config)
    before = (folder / "index.json").stat().st_mtime_ns
    config.num_workers = 0  # how, not what: this may change
    encode.run(config)
    assert (folder / "index.json").stat().st_mtime_ns == before
    config.copies = 2
    with pytest.raises(ConfigError, match="copies: was 1, is now 2"):
        encode.run(config)


def test_a_complete_corpus_of_other_recordings_or_weights_is_refused(config, make_corpus, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(config.tokenizer, tokenizer)
    config.tokenizer = str(tokenizer)
    encode.run(config)
    weights = load_file(tokenizer / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, tokenizer / "model.safetensors")
    with pytest.raises(ConfigError, match=r"last change of tokenizer .*--restart"):
        encode.run(config)
    save_file(weights, tokenizer / "model.safetensors")
    encode.run(config)
    manifest = Path(config.data[0].path)
    lines = manifest.read_text(encoding="utf-8")
    manifest.write_text("".join(lines.splitlines(keepends=True)[:-1]), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"last change of data: .*--restart"):
        encode.run(config)
    manifest.unlink()
    encode.run(config)  # gone: the codes still serve


def test_a_preset_s_random_weights_are_refused(config):
    config.tokenizer = "nano-6.25hz"
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="random weights.*allow_untrained=true"):
        encode.plan(config)
    config.allow_untrained = True
    with pytest.warns(UserWarning):
        assert encode.plan(config)["frame rate (Hz)"] == 6.25


def test_a_plan_counts_tokens_and_writes_nothing(config, tmp_path):
    plan = encode.plan(config)
    assert plan["train"]["utterances"] == 6
    frames = sum(-(-round((0.3 + 0.1 * n) * 16000) // 1280) for n in range(6))
    assert plan["train"]["frames (speech tokens of book 0)"] == frames
    assert plan["train"]["codes"] == 3 * frames
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize(("key", "message"), [("tokenizer", "tokenizer: missing"), ("data", "data: missing")])
def test_what_is_missing_is_named(config, key, message):
    setattr(config, key, type(getattr(config, key))())
    with pytest.raises(ConfigError, match=message):
        encode.plan(config)


@pytest.fixture
def bad_corpus(make_corpus, tmp_path):
    """Two good recordings and every kind of bad one; returns (manifest, id -> what its message must say)."""
    manifest = make_corpus(1, name="bad")
    folder = manifest.parent
    soundfile.write(folder / "stereo.wav", np.stack([tone(0.5, 44100), tone(0.5, 44100, 300)], axis=1), 44100)
    (folder / "empty.flac").write_bytes(b"")
    (folder / "words.flac").write_text("this is no audio")
    soundfile.write(folder / "short.wav", tone(0.005), 16000)
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    soundfile.write(folder / "long.flac", tone(40.0), 16000)
    expected = {
        "missing.flac": "no such file",
        "empty.flac": "empty",
        "words.flac": "not audio",
        "short.wav": "5.0 ms",
        "silent.wav": "silent",
        "nan.wav": "NaN",
    }
    with manifest.open("a") as file:
        for name in ("stereo.wav", "long.flac", *expected):
            file.write(json.dumps({"id": name, "audio": name, "text": "x", "split": "train"}) + "\n")
    return manifest, expected


def test_bad_files_are_set_aside_named_and_counted(config, bad_corpus):
    manifest, expected = bad_corpus
    config.data = [DataSource(str(manifest))]
    folder = encode.run(config)
    corpus = CodedCorpus.open(folder)
    rows = {row["id"]: row for row in corpus.rows("train")}
    assert set(rows) == {"train0", "stereo.wav", "long.flac"}
    assert rows["stereo.wav"]["duration"] == pytest.approx(0.5, abs=1e-3)
    assert rows["long.flac"]["duration"] == pytest.approx(40.0, abs=1e-3)
    skipped = {row["id"]: row for row in map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())}
    assert set(skipped) == set(expected)
    for name, words in expected.items():
        assert words in skipped[name]["reason"] and name in skipped[name]["reason"]
        assert skipped[name]["file"].endswith(name)
    assert corpus.index["extra"] == {"n_skipped": 6, "n_encoded": 3}


def test_clips_over_the_limit_are_set_aside(config, bad_corpus):
    config.data, config.max_duration_s = [DataSource(str(bad_corpus[0]))], 30.0
    folder = encode.run(config)
    reasons = [json.loads(line)["reason"] for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert len(reasons) == 7 and any("long.flac: 40.0 s, more than max_duration_s=30" in reason for reason in reasons)


def test_long_recordings_are_cut_into_chunks_and_come_out_as_if_they_were_not(config, bad_corpus):
    """40 s with a batch of 30 s: read in blocks, varied copy included; a header's time is not trusted for the rest."""
    config.data, config.copies = [DataSource(str(bad_corpus[0]))], 2
    found = {}
    for seconds in (60.0, 30.0):
        config.batch_seconds, config.run_dir = seconds, f"{config.run_dir}-{seconds:g}"
        found[seconds] = {row["id"]: row for row in CodedCorpus.open(encode.run(config)).rows("train")}
    whole, cut = found[60.0], found[30.0]
    assert set(whole) == set(cut)
    for name, row in whole.items():
        assert row["audio_codes"].shape == cut[name]["audio_codes"].shape
        assert cut[name]["duration"] == pytest.approx(row["duration"], abs=1e-3)
        # a varied copy is resampled in one step in place of two
        assert (row["audio_codes"] == cut[name]["audio_codes"]).mean() >= (0.9 if name == "long.flac#1" else 0.995)


def test_a_recording_shorter_than_a_frame_of_published_lengths_gets_one_code(config, tmp_path):
    sizes = {f"{part}_width": 32 for part in ("semantic_encoder", "acoustic_encoder", "decoder", "auxiliary_decoder")}
    model = LMSPTModel(preset_config("release-12.5hz", **sizes, latent_dim=16, codebook_sizes=[32, 16], trained=True))
    model.save_pretrained(tmp_path / "release")
    config.tokenizer = str(tmp_path / "release")
    soundfile.write(os.path.join(os.path.dirname(config.data[0].path), "train0.flac"), tone(0.03), 16000)
    rows = {row["id"]: row for row in CodedCorpus.open(encode.run(config)).rows("train")}
    assert rows["train0"]["audio_codes"].shape == (2, 1) and rows["train0"]["duration"] == pytest.approx(0.03)
    assert rows["train1"]["audio_codes"].shape == (2, 5)  # 0.4 s


def test_a_folder_begun_under_the_former_limit_is_still_its_own(config):
    config.max_duration_s = 120.0
    encode.run(config)
    config.max_duration_s = None
    encode.run(config)
    config.max_duration_s = 60.0
    with pytest.raises(ConfigError, match="max_duration_s: was 120.0, is now 60.0"):
        encode.run(config)


def test_a_tokenizer_that_cannot_be_cut_is_named(config, bad_corpus, monkeypatch, caplog):
    monkeypatch.setattr(encode, "can_chunk", lambda tokenizer: False)
    config.data, config.batch_seconds = [DataSource(str(bad_corpus[0]))], 30.0
    with caplog.at_level("WARNING", logger="slm"):
        encode.plan(config)
    assert "cannot be cut into chunks: the longest recording (40 s)" in caplog.text


def test_strict_stops_at_the_first_bad_file(config, bad_corpus):
    config.data, config.strict = [DataSource(str(bad_corpus[0]))], True
    with pytest.raises(AudioError, match=r"bad/(missing|empty|words|short)\."):
        encode.run(config)
    assert not os.path.exists(os.path.join(config.run_dir, "index.json"))
    config.run_dir += "-again"
    config.precision = "fp32"  # so that no sample of the recordings is encoded to choose it
    with pytest.raises(AudioError, match=r"bad/(missing|empty|words)\."):
        encode.plan(config)
    config.strict = False
    assert encode.plan(config)["train"]["headers that cannot be read"] == 3


def test_a_dry_run_of_headers_none_of_which_can_be_read_is_refused(config, bad_corpus):
    manifest, _ = bad_corpus
    lines = [
        line for line in manifest.read_text().splitlines() if json.loads(line)["id"] in ("missing.flac", "words.flac")
    ]
    manifest.write_text("\n".join(lines))
    config.data, config.precision = [DataSource(str(manifest))], "fp32"
    with pytest.raises(AudioError, match=r"bad/(missing|words)\.flac: "):
        encode.plan(config)


def test_nothing_usable_is_an_error(config, bad_corpus):
    manifest, expected = bad_corpus
    lines = [line for line in manifest.read_text().splitlines() if json.loads(line)["id"] in expected]
    manifest.write_text("\n".join(lines))
    config.data = [DataSource(str(manifest))]
    with pytest.raises(AudioError, match="none of the 6 recordings.*skipped.jsonl"):
        encode.run(config)


def test_one_id_twice_is_refused(config):
    config.data = [*config.data, *config.data]
    with pytest.raises(DataError, match="'train0' stands for both"):
        encode.plan(config)


def test_a_parquet_set_of_datasets_goes_through(config, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = []
    for number in range(3):
        file = tmp_path / f"{number}.flac"
        soundfile.write(file, tone(0.4, pitch_hz=200 + number), 16000)
        rows.append({"audio": {"bytes": file.read_bytes(), "path": file.name}, "text": f"row {number}"})
        file.unlink()
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "set.parquet"))
    config.data = [DataSource(str(tmp_path / "set.parquet"), split="test")]
    rows = list(CodedCorpus.open(encode.run(config)).rows("test"))
    assert sorted(row["text"] for row in rows) == ["row 0", "row 1", "row 2"]


def test_copies_vary_only_the_training_split(config, make_corpus):
    manifest = make_corpus(2, split="test")
    config.data, config.copies = [DataSource(str(manifest))], 3
    corpus = CodedCorpus.open(encode.run(config))
    rows = {row["id"]: row for row in corpus.rows("train")}
    assert len(rows) == 18 and corpus.count("test") == 2
    assert {"train0", "train0#1", "train0#2"} <= set(rows)
    assert rows["train5#1"]["text"] == rows["train5"]["text"]
    assert rows["train5#1"]["duration"] != rows["train5#2"]["duration"]


def test_a_variation_is_drawn_from_seed_id_and_copy_and_within_bounds():
    assert Variation.draw("a", 0, 0, 1280) == Variation()
    drawn = [Variation.draw(f"u{n}", 1, 0, 1280) for n in range(200)]
    assert Variation.draw("u7", 1, 0, 1280) == drawn[7]
    assert Variation.draw("u7", 2, 0, 1280) != drawn[7] != Variation.draw("u7", 1, 1, 1280)
    assert all(0 <= v.shift <= 1280 and 0.95 <= v.speed <= 1.05 and 0.5 < v.gain < 2.0 for v in drawn)
    assert min(v.speed for v in drawn) < 0.96 and max(v.speed for v in drawn) > 1.04


def test_a_variation_shifts_scales_and_stretches():
    waveform = tone(1.0)
    varied = Variation(shift=100, gain=0.5, speed=1.05).apply(waveform, 16000)
    assert len(varied) == pytest.approx(100 + 16000 / 1.05, abs=2)
    assert (varied[:100] == 0).all()
    assert np.abs(varied).max() == pytest.approx(0.5 * np.abs(waveform).max(), rel=0.1)
    spectrum = np.abs(np.fft.rfft(varied[100:]))
    assert np.argmax(spectrum) * 16000 / len(varied[100:]) == pytest.approx(210, abs=2)
    assert np.abs(Variation(gain=2.0).apply(0.9 * waveform / np.abs(waveform).max(), 16000)).max() == pytest.approx(1.0)


def test_batches_are_of_like_length_within_their_budget_and_dealt_evenly():
    items = [Item(Utterance(f"u{n:03d}", "x"), 0, Variation(), 0.5 + (n * 37 % 100) / 10) for n in range(100)]
    shards = deal(items, batch_seconds=30, shard_size=25)
    assert len(shards) == 4
    batches = [batch for shard in shards for batch in shard]
    assert sorted(item.id for batch in batches for item in batch) == sorted(item.id for item in items)
    assert all(len(batch) * max(item.duration_s for item in batch) <= 30 for batch in batches)
    assert deal(items[::-1], 30, 25) == shards
    means = [np.mean([item.duration_s for batch in shard for item in batch]) for shard in shards]
    assert max(means) - min(means) < 3


def test_batches_are_padded_to_few_shapes_and_neighbouring_shards_meet_them_together():
    """Kernels are made and kept for each shape: with a corpus's size the batches grow in number, not the shapes."""
    items = [Item(Utterance(f"u{n:05d}", "x"), 0, Variation(), 1 + 9 * (n * 7919 % 5000) / 5000) for n in range(5000)]
    shards = dict(enumerate(deal(items, batch_seconds=60, shard_size=250)))

    def shape(batch):
        return len(batch), bucket(max(item.duration_s for item in batch))

    order = [(key, shape(batch)) for key, batch in interleaved(shards, 4)]
    assert len(order) == sum(map(len, shards.values())) > 400
    assert len({found for _, found in order}) < 80
    padded = sum(n * seconds for _, (n, seconds) in order)
    assert padded < 1.04 * sum(item.duration_s for item in items)
    for key, batches in shards.items():
        assert [found for other, found in order if other == key] == [shape(batch) for batch in batches]
    assert {key for key, _ in order[: len(order) // 5 - 8]} == {0, 1, 2, 3}
    kept = sum(before == after for (_, before), (_, after) in zip(order, order[1:], strict=False))
    assert kept > len(order) / 2
    assert bucket(0.0) == 0.0 and 3.0 <= bucket(3.0) < 3.15


def test_shards_are_shared_out_evenly_whole_and_once():
    weights = [9.0, 1.0, 5.0, 5.0, 4.0, 3.0]
    for n_processes in (1, 2, 3, 8):
        shares = assign_shards(weights, n_processes)
        assert len(shares) == n_processes
        assert sorted(place for share in shares for place in share) == list(range(6))
    loads = [sum(weights[place] for place in share) for share in assign_shards(weights, 3)]
    assert max(loads) - min(loads) <= 1.0


def test_shards_are_the_same_bytes_whatever_the_number_of_threads(config, make_corpus):
    """Every batch is encoded by one thread, as many at a time as torch has threads, in order all the same."""
    config.data, config.batch_seconds, config.shard_size = [DataSource(str(make_corpus(20, name="more")))], 4.0, 6
    found, before = [], torch.get_num_threads()
    try:
        for threads, readers in ((1, 2), (3, 2), (2, 0)):
            torch.set_num_threads(threads)
            config.run_dir, config.num_workers = f"{config.run_dir}-{threads}", readers
            folder = encode.run(config)
            found.append({path.name: path.read_bytes() for path in folder.glob("*.parquet")})
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(found[0]) == 4 and found[0] == found[1] == found[2]


def test_settings_that_cannot_work_are_refused():
    for override in ("copies=0", "splits=[]", "batch_seconds=0", "splits=[train, train]"):
        with pytest.raises(ConfigError):
            load_config(Config, None, [override])


def test_a_killed_run_ends_in_the_same_bytes(tmp_path, tiny_tokenizer, make_corpus):
    manifest = make_corpus(20)
    (manifest.parent / "train7.flac").write_bytes(b"")

    settings = [f"tokenizer={tiny_tokenizer}", f"data=[{{path: {manifest}}}]", "copies=2", "shard_size=2"]
    settings += ["precision=fp32", "num_workers=1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    # As many threads as here, where the other runs are.
    options = {"log": tmp_path / "log", "threads": torch.get_num_threads()}
    (process,) = start(slm, "encode", f"run_dir={killed}", *settings, **options)
    deadline = time.monotonic() + 150
    while len(list(killed.glob("*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    done = {path.name for path in killed.glob("*.parquet")}
    assert 3 <= len(done) and not (killed / "index.json").exists(), "it was to be killed in mid-run"
    for run_dir in (killed, whole):
        encode.run(load_config(Config, None, [f"run_dir={run_dir}", *settings]))
    names = sorted(
        path.name for path in whole.iterdir() if path.suffix in (".parquet", ".jsonl") or path.name == "index.json"
    )
    assert len(names) > len(done) + 2
    for name in names:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert len((whole / "skipped.jsonl").read_text().splitlines()) == 2  # both copies of the empty file
