"""`slm encode` with precision=auto: bf16 only where book 0 agrees with fp32, and one decision for a whole run."""

from __future__ import annotations

import json

import pytest
import torch

from recipes import encode, encode_stream
from recipes.encode import Config
from slm.corpus import CodedCorpus
from tokenizer import load_tokenizer
from tokenizer.data import DataSource
from tokenizer.modeling import LMSPTEncoderOutput
from tokenizer.precision import precision_agreement


@pytest.fixture
def config(tmp_path, tiny_tokenizer, make_corpus):
    data = [DataSource(str(make_corpus(6)))]
    return Config(run_dir=str(tmp_path / "codes"), tokenizer=str(tiny_tokenizer), data=data)


@pytest.fixture
def fast_bf16(config, monkeypatch):
    """`auto` as on hardware that multiplies bf16 fast, and a place to set what is measured there."""
    config.precision = "auto"
    monkeypatch.setattr(
        encode, "resolve_precision", lambda precision, device: "bf16" if precision == "auto" else precision
    )
    measured = []

    def agreement(tokenizer, values, mask, precision):
        measured.append((precision, tuple(values.shape)))
        return [fast_bf16.book_0, 0.5, 0.5]

    def fast_bf16(book_0):
        fast_bf16.book_0 = book_0
        monkeypatch.setattr(encode_stream, "precision_agreement", agreement)
        return measured

    return fast_bf16


def test_auto_takes_bf16_only_where_book_0_agrees_and_a_resumed_run_keeps_what_was_decided(
    config, fast_bf16, tiny_tokenizer, caplog
):
    measured = fast_bf16(0.989)
    with caplog.at_level("WARNING", logger="slm"):
        corpus = CodedCorpus.open(encode.run(config))
    assert len(measured) == 1 and measured[0][0] == "bf16"
    assert "book 0 has fp32's code in 98.90 % of frames" in caplog.text
    assert corpus.metadata.precision == "fp32"
    assert corpus.metadata.fingerprint == load_tokenizer(tiny_tokenizer).fingerprint("fp32")

    config.run_dir += "-agreeing"
    measured = fast_bf16(0.99)
    folder = encode.run(config)
    shards = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    corpus = CodedCorpus.open(folder)
    assert corpus.metadata.precision == "bf16"
    assert corpus.metadata.fingerprint == load_tokenizer(tiny_tokenizer).fingerprint("bf16")
    # Cut off before the index, and now it would be measured otherwise: it goes on as it was begun.
    begun = {"format": corpus.index["format"], "metadata": corpus.index["metadata"]}
    (folder / "begun.json").write_text(json.dumps(begun))
    for name in ("index.json", "complete.json", min(shards)):
        (folder / name).unlink()
    fast_bf16(0.5)
    assert CodedCorpus.open(encode.run(config)).metadata.precision == "bf16"
    assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == shards


def test_a_plan_says_how_far_a_lower_precision_agrees_book_by_book(config, fast_bf16):
    fast_bf16(0.995)
    plan = encode.plan(config)
    assert plan["precision"] == "bf16" and plan["frames as in fp32, by book (%)"] == [99.5, 50.0, 50.0]


def test_agreement_counts_valid_frames_of_each_book():
    class Off(torch.nn.Module):
        """Under autocast every fourth code of book 1 is another one, and so is all padding."""

        def encode(self, values, mask):
            codes = torch.arange(8).repeat(2, 2, 1)
            valid = torch.ones(2, 8, dtype=torch.bool)
            valid[1, 4:] = False
            if torch.is_autocast_enabled("cpu"):
                codes[:, 1, ::4] += 1
                codes[1, :, 4:] = -2
            return LMSPTEncoderOutput(audio_codes=codes, audio_codes_mask=valid)

    found = precision_agreement(Off(), torch.zeros(2, 1, 80), None, "bf16")
    assert found == pytest.approx([1.0, 0.75])
    assert precision_agreement(Off(), torch.zeros(2, 1, 80), None, "fp32") == [1.0, 1.0]
