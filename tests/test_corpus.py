"""Coded corpora: what is written is read, a killed encode resumes to the same bytes, damage is told."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from slm_tiny import CODES, metadata, translation, utterances, write_corpus

from slm.corpus import CodedCorpus, CodedCorpusWriter, CorpusError


def test_round_trip(tmp_path) -> None:
    corpus = CodedCorpus.open(write_corpus(tmp_path / "c"))
    corpus.verify()
    assert corpus.count("train") == 12 and corpus.count("nosuch") == 0
    assert corpus.metadata.frame_rate == 12.5 and corpus.metadata.n_codebooks == 2
    rows, given = list(corpus.rows("train")), utterances()
    for row, expected in zip(rows, given[::2] + given[1::2], strict=True):
        assert row["split"] == "train" and row["audio_codes"].dtype == np.int64
        assert (row["audio_codes"] == expected["audio_codes"]).all()
        assert {key: row[key] for key in ("id", "text", "speaker", "duration")} == {
            key: expected[key] for key in ("id", "text", "speaker", "duration")
        }
    index = corpus.index["splits"]["train"]
    assert index["frames"] == sum(row["audio_codes"].shape[1] for row in given)
    corpus.check_fingerprint("f" * 64)
    with pytest.raises(CorpusError, match="mean something else"):
        corpus.check_fingerprint("0")
    with pytest.raises(CorpusError, match="train, valid|test, train"):
        list(corpus.rows("dev"))


def test_further_columns_are_kept_and_a_corpus_without_them_is_as_before(tmp_path) -> None:
    plain, more = write_corpus(tmp_path / "plain"), write_corpus(tmp_path / "more", columns=["translation", "topic"])
    assert "columns" not in json.loads((plain / "index.json").read_text())["metadata"]
    assert next(CodedCorpus.open(plain).rows("test"))["columns"] == {}
    assert "translation" not in pq.read_schema(plain / "test-00000-of-00001.parquet").names
    corpus = CodedCorpus.open(more)
    assert corpus.metadata.columns == ["translation", "topic"]
    for row in corpus.rows("test"):
        assert row["columns"] == {"translation": translation(row["text"]), "topic": ""}
    with pytest.raises(CorpusError, match="columns: None there.*another folder"):
        CodedCorpusWriter(plain, metadata(columns=["translation"]))
    with pytest.raises(CorpusError, match="columns: text is a column of every corpus"):
        metadata(columns=["text"])


def test_large_codebooks_fit(tmp_path) -> None:
    writer = CodedCorpusWriter(tmp_path, metadata(codebook_sizes=[70000]))
    row = {"id": "a", "text": "", "speaker": "", "duration": 1.0, "audio_codes": np.array([[69999, 0, 40000]])}
    writer.write_shard("test", 0, 1, [row])
    writer.finish()
    assert next(CodedCorpus.open(tmp_path).rows("test"))["audio_codes"].tolist() == [[69999, 0, 40000]]


def test_a_killed_encode_resumes_to_the_same_bytes(tmp_path) -> None:
    whole = write_corpus(tmp_path / "whole")
    rows = utterances()
    writer = CodedCorpusWriter(tmp_path / "killed", metadata())
    writer.write_shard("train", 0, 2, rows[::2])
    (tmp_path / "killed" / ".train-00001-of-00002.parquet.tmp").write_bytes(b"torn")
    with pytest.raises(CorpusError, match="run the same `slm encode` again"):
        CodedCorpus.open(tmp_path / "killed")
    with pytest.raises(CorpusError, match="not whole"):
        writer.finish()
    again = CodedCorpusWriter(tmp_path / "killed", metadata())
    assert again.shard_done("train", 0) and not again.shard_done("train", 1) and not again.finished
    again.write_shard("train", 1, 2, rows[1::2])
    again.write_shard("valid", 0, 1, utterances(4, seed=1))
    again.write_shard("test", 0, 1, utterances(4, seed=2))
    again.finish()
    for path in whole.iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes(), path.name
    assert CodedCorpusWriter(tmp_path / "killed", metadata()).finished


def test_another_plan_is_refused(tmp_path) -> None:
    CodedCorpusWriter(tmp_path / "a", metadata())
    for change in ({"fingerprint": "0"}, {"plan": {"copies": 2}}, {"precision": "bf16"}):
        with pytest.raises(CorpusError, match=f"{next(iter(change))}.*another folder"):
            CodedCorpusWriter(tmp_path / "a", metadata(**change))
    finished = write_corpus(tmp_path / "b")
    with pytest.raises(CorpusError, match="other settings"):
        CodedCorpusWriter(finished, metadata(fingerprint="0"))
    (finished / "index.json").unlink()
    with pytest.raises(CorpusError, match="unknown what encoded it"):
        CodedCorpusWriter(finished, metadata())


def test_damage_is_told(tmp_path) -> None:
    with pytest.raises(CorpusError, match="no such folder"):
        CodedCorpus.open(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="never ran"):
        CodedCorpus.open(tmp_path / "empty")
    folder = write_corpus(tmp_path / "c")
    shard = folder / "test-00000-of-00001.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:-10] + bytes(10))
    with pytest.raises(CorpusError, match="hash"):
        CodedCorpus.open(folder).verify()
    shard.write_bytes(content[:-10])
    with pytest.raises(CorpusError, match="bytes"):
        CodedCorpus.open(folder)
    shard.unlink()
    with pytest.raises(CorpusError, match="missing"):
        CodedCorpus.open(folder)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"format": "x"}))
    with pytest.raises(CorpusError, match="format"):
        CodedCorpus.open(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(CorpusError, match="not readable"):
        CodedCorpus.open(folder)


def test_bad_codes_are_refused(tmp_path) -> None:
    writer = CodedCorpusWriter(tmp_path, metadata())
    for codes in (np.zeros((1, 3)), np.full((2, 3), CODES), np.array([[0, -1], [0, 0]]), np.zeros((2, 0))):
        with pytest.raises(CorpusError, match="u9"):
            writer.write_shard("train", 0, 1, [utterances(1)[0] | {"id": "u9", "audio_codes": codes.astype(int)}])
    assert not writer.shard_done("train", 0)


def test_two_utterances_of_one_id_are_refused_across_shards(tmp_path) -> None:
    """Predictions are kept by id: the second would pass for the first."""
    writer = CodedCorpusWriter(tmp_path / "c", metadata())
    writer.write_shard("train", 0, 2, utterances(3))
    writer.write_shard("train", 1, 2, utterances(1))
    writer.write_shard("valid", 0, 1, utterances(1))
    with pytest.raises(CorpusError, match="train-00001.*a second utterance of id 'u0' in split 'train'"):
        writer.finish()
    assert not writer.finished
