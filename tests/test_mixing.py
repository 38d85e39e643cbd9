"""Training data of several sources: shares, order, streams, and the place where a resumed run goes on."""

from __future__ import annotations

import io
import json
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from conftest import tone
from test_codec_training import config, metrics

from recipes.commands import train_tokenizer
from recipes.tokenizer_training.data import read_audio
from tokenizer.data.manifest import read_source, read_sources
from tokenizer.data.mixing import BLOCK, Mixture, training_audio, validation_utterances
from tokenizer.data.streams import Stream, open_stream, stream_head
from tokenizer.data.tables import NoSplitError, no_split_error
from tokenizer.data.utterances import AudioError, DataError, DataSource


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """A folder of two Parquet files: eight training rows, two of the valid split."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    # `datasets` waits five seconds at the end of an epoch for threads of its own
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.0)
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        rows = []
        for row in range(5):
            wav = io.BytesIO()
            soundfile.write(wav, tone(0.3 + 0.05 * row), 16000, format="WAV")
            split = "valid" if row == 4 else "train"
            rows.append({"id": f"{shard}-{row}", "audio": {"bytes": wav.getvalue(), "path": None}, "split": split})
        datasets.Dataset.from_list(rows).to_parquet(str(folder / f"{shard}.parquet"))
    return folder


def taken(audio, positions) -> list[str]:
    return [audio.recording(audio.key(position))[0].id for position in positions]


def test_each_source_gets_its_share_and_no_item_twice_before_all_once():
    mixture = Mixture([3.0, 1.0, 0.006], seed=1)
    places = [mixture.place(position) for position in range(3 * BLOCK)]
    assert sum(mixture.counts) == BLOCK
    counts = Counter(source for source, _ in places)
    assert counts[0] / len(places) == pytest.approx(3 / 4.006, abs=2e-3) and counts[2] == 3 * mixture.counts[2]
    for source in range(3):
        assert [k for other, k in places if other == source] == list(range(counts[source]))
    first, second = (Counter(source for source, _ in places[i : i + 100])[1] for i in (0, BLOCK))
    assert 10 < first < 40 and 10 < second < 40  # mixed, not one source after the other
    assert places != [Mixture([3.0, 1.0, 0.006], seed=2).place(position) for position in range(3 * BLOCK)]
    assert places[1700] == Mixture([3.0, 1.0, 0.006], seed=1).place(1700)
    with pytest.raises(ValueError, match="smallest must be at least 1/1000"):
        Mixture([1.0, 1e-5], seed=0)


def test_weights_are_shares_of_the_crops_and_without_them_recordings_count(make_corpus):
    few, many = make_corpus(1, name="few"), None
    many = few.parent.parent / "many"
    many.mkdir()
    rows = []
    for number in range(9):
        soundfile.write(many / f"{number}.wav", tone(0.3), 16000)
        rows.append({"id": f"many{number}", "audio": f"{number}.wav"})
    (many / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = training_audio([DataSource(str(few)), DataSource(str(many))], 16000, seed=0)
    assert Counter(taken(plain, range(100)))["train0"] == 10
    weighted = training_audio([DataSource(str(few), weight=4), DataSource(str(many), weight=1)], 16000, seed=0)
    assert Counter(taken(weighted, range(1000)))["train0"] == 800
    assert "1 (80.0% of the crops); 9 (20.0% of the crops)" == weighted.describe()
    with pytest.raises(DataError, match="no weight for .*many"):
        training_audio([DataSource(str(few), weight=4), DataSource(str(many))], 16000, seed=0)
    with pytest.raises(ValueError, match="weight=0: must be above 0"):
        DataSource("x", weight=0)


def test_a_stream_shuffles_each_epoch_anew_and_goes_on_where_it_is_told(shards):
    source = DataSource(str(shards), stream=True, shuffle_buffer=4)
    stream = Stream(source, "train", seed=5)
    ids = [stream.item(k)[0].id for k in range(24)]
    epochs = [ids[i : i + 8] for i in (0, 8, 16)]
    assert all(sorted(epoch) == sorted(f"{s}-{r}" for s in range(2) for r in range(4)) for epoch in epochs)
    assert epochs[0] != epochs[1] and stream.epoch_starts[:3] == [0, 8, 16]
    # with others to fall back on: those before in the epoch, nearest first, then those after
    assert [row.id for row in stream.item(17)] == [ids[17], ids[16], ids[18]]
    assert [row.id for row in stream.item(21)] == [ids[21], ids[20], ids[19]]
    fresh = Stream(source, "train", seed=5)
    assert [fresh.item(k)[0].id for k in (1, 6, 7, 13)] == [ids[k] for k in (1, 6, 7, 13)]
    resumed = Stream(source, "train", seed=5)
    resumed.epoch_starts = stream.epoch_starts
    opened = []
    real = resumed._begin_epoch
    resumed._begin_epoch = lambda start: opened.append(start) or real(start)
    assert resumed.item(19)[0].id == ids[19] and opened == [16]  # epochs that are over are not read again
    assert [Stream(source, "train", seed=6).item(k)[0].id for k in range(8)] != epochs[0]


def test_a_stream_that_cannot_be_listed_or_opened_says_so(shards, tmp_path):
    with pytest.raises(DataError, match="stream=true cannot be listed"):
        read_source(DataSource(str(shards), stream=True), "train")
    with pytest.raises(DataError, match="cannot be streamed here.*no file fits"):
        training_audio([DataSource(str(tmp_path), stream=True)], 16000, 0)
    with pytest.raises(DataError, match="no column 'sound'"):
        training_audio([DataSource(str(shards), stream=True, audio_column="sound")], 16000, 0)
    with pytest.raises(DataError, match="owner/unknown-set: cannot be streamed here"):
        training_audio([DataSource("owner/unknown-set", stream=True)], 16000, 0)
    with pytest.raises(DataError, match="no rows in split 'test'"):
        Stream(DataSource(str(shards), stream=True), "test", 0).item(0)
    ((path, valid),) = validation_utterances([DataSource(str(shards), stream=True)], 8)
    assert path == str(shards) and [utterance.id for utterance in valid] == ["0-4", "1-4"]


def test_a_streamed_row_that_cannot_be_decoded_is_replaced_by_the_one_before(shards, caplog):
    audio = training_audio([DataSource(str(shards), stream=True)], 16000, seed=0)
    position, (row, before, *_) = audio.key(3)
    broken = type(row)(id="broken", audio=b"no audio")
    assert audio.recording((position, (broken, before)))[0].id == before.id
    assert audio.n_failed == 1 and "left out: broken" in caplog.text


def test_a_run_of_streamed_rows_that_cannot_be_decoded_does_not_end_the_training(shards, tmp_path):
    """All but one row of the epoch: the first are stood in for by one that comes later."""
    import datasets

    rows = list(datasets.Dataset.from_parquet([str(file) for file in sorted(shards.glob("*.parquet"))]).cast_column(
        "audio", datasets.Audio(decode=False)))  # fmt: skip
    rows = [row for row in rows if row["split"] == "train"]
    source = DataSource(str(tmp_path / "broken.parquet"), stream=True, shuffle_buffer=1)
    for good in (0, 7):
        for number, row in enumerate(rows):
            row["audio"] = row["audio"] if number == good else {"bytes": b"no audio", "path": None}
        datasets.Dataset.from_list(rows).to_parquet(source.path)
        rows[7 - good]["audio"] = rows[good]["audio"]
        audio = training_audio([source], 16000, seed=0)
        assert set(taken(audio, range(8))) == {rows[good]["id"]} and audio.n_failed == 7
    assert set(taken(training_audio([source], 16000, seed=0), (5, 6))) == {rows[7]["id"]}  # whoever reads from there


def test_a_stream_without_a_readable_row_says_so_and_the_last_one_read_is_the_last_resort(shards):
    audio = training_audio([DataSource(str(shards), stream=True)], 16000, seed=0)
    position, (row, *_) = audio.key(3)
    silent = type(row)(id="silent", audio=b"")
    with pytest.raises(AudioError, match=r"shards: of its streamed rows silent, silent none.*data.N.stream=false"):
        audio.recording((position, (silent, silent)))
    assert audio.recording((position, (row,)))[0].id == row.id
    assert audio.recording((position, (silent, silent)))[0].id == row.id


@pytest.fixture
def hub(shards, monkeypatch):
    """Says which splits the hub's sets have, from then on: "owner/set" and any other."""
    import datasets

    real, files = datasets.load_dataset, {}

    def from_disk(name, subset=None, **settings):
        return real(name, **settings) if name == "parquet" else real("parquet", data_files=files, **settings)

    monkeypatch.setattr("datasets.load_dataset", from_disk)
    return lambda *names: files.update({n: str(shards / f"{i}.parquet") for i, n in enumerate(names)})


def test_a_hub_set_without_our_split_says_which_it_has(hub, caplog):
    """Listed and streamed, in the words of `datasets` itself."""
    hub("train", "validation")
    for stream in (False, True):
        caplog.clear()
        source = {"path": "owner/set", "stream": stream}
        with pytest.raises(DataError, match="no utterances in split 'valid'"):
            validation_utterances([DataSource(**source)], 8)
        assert "no split 'valid' among train, validation" in caplog.text
        assert "data.N.hub_splits.valid=validation" in caplog.text
        ((_, valid),) = validation_utterances([DataSource(**source, hub_splits={"valid": "validation"})], 8)
        assert len(valid) == 5
        wrong = DataSource(**source, hub_splits={"valid": "validaton"})
        with pytest.raises(NoSplitError, match="no split 'validaton' among .*hub_splits.valid=validation"):
            stream_head(wrong, "valid", 8) if stream else read_source(wrong, "valid", needs_text=False)


@pytest.mark.parametrize("stream", [False, True])
def test_a_hub_set_without_training_data_of_our_name_is_an_error_beside_other_sources(
    hub, make_corpus, tmp_path, stream
):
    """Of several sources, none may be missing from the training for a warning that scrolls by."""
    hub("train.100", "validation")
    sources = [{"path": str(make_corpus()), "weight": 1.0}, {"path": "owner/set", "stream": stream, "weight": 1.0}]
    remedy = r"owner/set: no split 'train' among train.100, validation: .*data.N.hub_splits.train=train.100;"
    with pytest.raises(NoSplitError, match=remedy):
        training_audio([DataSource(**source) for source in sources], 16000, seed=0, needs_text=False)
    if not stream:
        with pytest.raises(NoSplitError, match=remedy):  # before anything is trained
            train_tokenizer.run(config("", tmp_path / "run", None, data=sources))
    named = DataSource(**sources[1], hub_splits={"train": "train.100"})
    audio = training_audio([DataSource(**sources[0]), named], 16000, seed=0, needs_text=False)
    assert len(audio.parts) == 2
    alone = {"path": "owner/set", "stream": stream, "split": "valid", "hub_splits": {"valid": "validation"}}
    sources = [DataSource(**sources[0]), DataSource(**alone)]
    assert len(training_audio(sources, 16000, seed=0, needs_text=False).parts) == 1
    assert [len(own) for path, own in validation_utterances(sources, 8) if path == "owner/set"] == [5]


@pytest.mark.parametrize(
    ("split", "names", "likely"),
    [("train", "dev, test", "NAME"), ("test", "dev, train", "NAME"), ("valid", "train, dev", "dev"),
     ("valid", "train, validation", "validation"), ("train", "dev, train.100", "train.100")],
)  # fmt: skip
def test_only_for_valid_is_dev_proposed(split, names, likely):
    found = no_split_error(
        DataSource("owner/set"), split, ValueError(f"Bad split: {split}. Available splits: [{names}]")
    )
    assert f"data.N.hub_splits.{split}={likely}" in str(found).replace(";", " ").split()


def test_a_split_that_no_source_has_names_every_way_to_give_one(hub):
    hub("train", "validation")
    with pytest.raises(DataError, match="no utterances in split 'test' of owner/set: .*`hub_splits: {test: NAME}`"):
        read_sources([DataSource("owner/set")], "test")


def test_a_streamed_parquet_file_that_says_no_split_is_train_alone(shards, tmp_path, caplog):
    import datasets

    plain = DataSource(str(tmp_path / "plain.parquet"), stream=True)
    rows = datasets.Dataset.from_parquet(str(shards / "0.parquet"))
    rows.remove_columns("split").to_parquet(plain.path)
    assert len(list(open_stream(plain, "train"))) == 5 and not caplog.text
    for split in ("valid", "test"):
        listed = read_source(DataSource(plain.path), split, needs_text=False)
        assert list(open_stream(plain, split)) == stream_head(plain, split, 8) == listed == []
    with pytest.raises(DataError, match="no utterances in split 'valid'"):
        validation_utterances([plain], 8)
    assert len(stream_head(DataSource(plain.path, stream=True, split="valid"), "valid", 8)) == 5
    apart = stream_head(DataSource(plain.path, stream=True, split="valid", id_prefix="b-"), "valid", 8)
    assert [one.id for one in apart] == [f"b-{one.id}" for one in stream_head(plain, "train", 8)]


def test_a_stream_is_searched_for_valid_rows_only_so_far_and_one_fault_leaves_the_others_in(
    shards, tmp_path, monkeypatch, caplog
):
    source, whole = DataSource(str(shards), stream=True), DataSource(str(shards / "1.parquet"), split="valid")
    monkeypatch.setattr("tokenizer.data.streams.SEARCH_ROWS", 5)
    ((_, valid),) = validation_utterances([source], 8)
    assert [utterance.id for utterance in valid] == ["0-4"] and not caplog.text
    monkeypatch.setattr("tokenizer.data.streams.SEARCH_ROWS", 4)
    broken = DataSource(str(tmp_path / "none.parquet"), stream=True)
    ((path, valid),) = validation_utterances([source, broken, whole], 8)
    assert path == whole.path and len(valid) == 5
    assert "none of its first 4 rows is of split 'valid'" in caplog.text and "split: valid}" in caplog.text
    assert f"not validated on: {broken.path}: cannot be streamed here" in caplog.text
    assert len(list(open_stream(source, "train"))) == 8  # a training is not cut short


def test_a_table_needs_its_text_only_where_text_is_needed(shards):
    source = DataSource(str(shards / "0.parquet"))  # without a text column
    with pytest.raises(DataError, match="no column 'text'"):
        read_source(source, "train")
    assert len(training_audio([source], 16000, seed=0, needs_text=False).parts[0]) == 4
    assert [u.text for u in read_source(source, "valid", needs_text=False)] == [""]


def test_what_is_kept_in_memory_is_shared_out_among_those_that_decode(make_corpus, tmp_path, monkeypatch):
    manifest = make_corpus()
    whole, shared = (
        read_audio(config(manifest, tmp_path / "run", None, training={"num_workers": workers})) for workers in (0, 2)
    )
    assert whole.parts[0].cache_bytes == 2 * shared.parts[0].cache_bytes == 2 << 30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    four = read_audio(config(manifest, tmp_path / "run", None, training={"num_workers": 2}))
    assert four.parts[0].cache_bytes == (2 << 30) // 8


def test_a_run_mixes_a_stream_with_a_manifest_and_resumes_to_the_same_weights(make_corpus, shards, tmp_path):
    """With workers and without: they decode, and the training process reads the stream in order."""
    data = [
        {"path": str(make_corpus()), "weight": 1.0},
        {"path": str(shards), "stream": True, "weight": 3.0, "shuffle_buffer": 4},
    ]
    training = {"steps": 6, "save_steps": 3, "keep_checkpoints": 9, "validate_steps": 6, "batch_size": 4}
    settings = {"discriminator": {"enabled": False}, "data": data}
    whole = config("", tmp_path / "whole", None, training=training, **settings)
    train_tokenizer.run(whole)
    cut = config("", tmp_path / "cut", None, training=training | {"num_workers": 2}, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenizer.training.loop.train_step", _stops_at(4))
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer.run(cut)
    train_tokenizer.run(cut)
    losses = [
        [row["loss/total"] for row in metrics(tmp_path / name) if "loss/total" in row] for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    # workers count what they cannot read apart
    summaries = [json.loads((tmp_path / name / "complete.json").read_text())["summary"] for name in ("whole", "cut")]
    assert summaries[0]["n_failed"] == 0 and "n_failed" not in summaries[1]
    state = torch.load(tmp_path / "cut/checkpoints/checkpoint-0000006/optimizers.pt", weights_only=True)
    assert state["audio"]["epoch_starts"][0][:3] == [0, 8, 16]
    assert np.isfinite(metrics(tmp_path / "cut")[-1]["valid/mel"])  # the stream's own valid rows


def _stops_at(step: int):
    from tokenizer.training.step import train_step

    def stopping(state, *rest):
        if state.step == step:
            raise KeyboardInterrupt
        return train_step(state, *rest)

    return stopping
