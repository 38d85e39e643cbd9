"""Varied copies of `slm encode`: what their columns say of time is of the copy, or is not used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import tone
from slm_tiny import metadata, save_llm, utterances

from eval.text.normalisers import get_normaliser
from recipes.commands import encode, finetune
from recipes.config import ConfigError
from recipes.encoding.copies import OWN_TIMES, columns_of_copy
from recipes.encoding.plan import PLAIN, Variation
from recipes.finetuning.corpora import columns_of, open_corpora
from recipes.finetuning.words import words_of
from recipes.text_aligned.data import read_items
from slm.corpus import CodedCorpus, CodedCorpusWriter
from tokenizer.data.utterances import DataSource

RATE = 16_000
SLOW, FAST = Variation(shift=700, speed=0.95), Variation(shift=0, gain=0.5, speed=1.05)


@pytest.mark.parametrize("variation", [SLOW, FAST, Variation(shift=1280)])
def test_a_word_stands_where_the_copy_says_it(variation: Variation) -> None:
    """A tone is the word: where it sounds in the copy is where the copy's column has it."""
    waveform = np.zeros(RATE, dtype=np.float32)
    waveform[6400:11200] = tone(0.3)
    columns = {"words": json.dumps([{"word": "tone", "start": 0.4, "end": 0.7}])}
    loud = np.flatnonzero(np.abs(variation.apply(waveform, RATE)) > 0.03) / RATE
    (word,) = json.loads(columns_of_copy(columns, variation, RATE)["words"])
    assert word["word"] == "tone"
    assert [word["start"], word["end"]] == pytest.approx([loud[0], loud[-1]], abs=0.003)


def test_every_column_of_times_follows_and_no_other_changes() -> None:
    times = [{"x": "é", "start": 1, "end": 2.1, "score": 0.5}, {"x": "not aligned", "start": None, "end": None}]
    prosody = [{"word": "one", "duration": 0.25, "f0": -1.5, "energy": 2.0}]
    written = {name: json.dumps(times, ensure_ascii=False) for name in ("words", "characters", "phones", "own")}
    kept = {"translation": "[noise] eins", "numbers": "[1, 2]", "empty": "", "messages": '[{"role": "user"}]'}
    frames = {"word_frames": "[[0, 3], [3, 7]]"}  # of the recording's codes
    found = columns_of_copy(written | kept | frames | {"prosody": json.dumps(prosody)}, FAST, RATE)
    assert found["word_frames"] == "" and columns_of_copy(frames, PLAIN, RATE) == frames
    for name in written:
        assert json.loads(found[name]) == [times[0] | {"start": 0.9524, "end": 2.0}, times[1]]
    assert "é" in found["own"]
    assert {name: found[name] for name in kept} == kept
    # 5 % shorter; F0 is relative to the voice and energy to the utterance, which move as a whole.
    assert json.loads(found["prosody"]) == [prosody[0] | {"duration": 0.2012}]
    assert columns_of_copy(written, PLAIN, RATE) == written


@pytest.fixture
def encoded(tmp_path: Path, tiny_tokenizer: Path, make_corpus) -> CodedCorpus:
    """A corpus with copies whose recordings are one word, then another in the last tenth of a second."""
    manifest = make_corpus(4)
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        end = 0.3 + 0.1 * number
        spans = [("text", 0.0, end - 0.1), (str(number), end - 0.1, end)]
        row["words"] = [{"word": word, "start": start, "end": end} for word, start, end in spans]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = encode.Config(
        run_dir=str(tmp_path / "codes"),
        tokenizer=str(tiny_tokenizer),
        data=[DataSource(str(manifest), columns=["words"])],
        copies=3,
        precision="fp32",
        num_workers=0,
    )
    return CodedCorpus.open(encode.run(config))


def test_an_encoded_copy_has_its_own_times_and_word_frames(encoded: CodedCorpus) -> None:
    facts, normalise = encoded.metadata, get_normaliser("basic")
    rows = {row["id"]: row for row in encoded.rows("train")}
    assert len(rows) == 12
    for name, row in rows.items():
        words = json.loads(row["columns"]["words"])
        assert words[-1]["end"] == pytest.approx(row["duration"], abs=2e-3)  # the recording's last word ends it
        recording, _, copy = name.partition("#")
        variation = Variation.draw(recording, int(copy or 0), 0, 1280)
        assert words[-1]["end"] - words[-1]["start"] == pytest.approx(0.1 / variation.speed, abs=2e-4)
        frames = row["audio_codes"].shape[1]
        text = normalise(row["text"])
        found = words_of(row["columns"]["words"], text, frames, facts.frame_rate, normalise, name)
        assert len(found) == 2 and sum(found) == frames


def aligned_corpus(folder: Path, plan: dict[str, object]) -> CodedCorpus:
    """A corpus of recordings and one copy of each, with word times."""
    writer = CodedCorpusWriter(folder, metadata(columns=["words"], plan=plan))
    rows = []
    for row in utterances(4):
        length_s = row["duration"] / len(row["text"].split())
        words = [
            {"word": word, "start": number * length_s, "end": (number + 1) * length_s}
            for number, word in enumerate(row["text"].split())
        ]
        row["columns"] = {"words": json.dumps(words)}
        rows += [row, row | {"id": f"{row['id']}#1"}]
    writer.write_shard("train", 0, 1, rows)
    writer.finish()
    return CodedCorpus.open(folder)


EARLIER, NOW = {"copies": 2}, {"copies": 2} | OWN_TIMES


def test_copies_with_their_recordings_times_are_refused_by_tasks_that_go_word_by_word(tmp_path: Path) -> None:
    config = finetune.Config(model=str(save_llm(tmp_path / "llm")), task_weights={"tts-aligned": 1.0})
    for name, plan in {"earlier": EARLIER, "now": NOW, "without copies": {"copies": 1}}.items():
        aligned_corpus(tmp_path / name, plan)
        asked = dataclasses.replace(config, corpus=str(tmp_path / name))
        if name != "earlier":
            assert columns_of(asked, open_corpora(asked)) == []
            continue
        with pytest.raises(ConfigError, match=r"tts-aligned reads times, and in corpus .*encode it again"):
            columns_of(asked, open_corpora(asked))
        plain_task = dataclasses.replace(asked, task_weights={"tts": 1.0})
        assert columns_of(plain_task, open_corpora(plain_task)) == []  # reads no times


@pytest.mark.parametrize(("plan", "known"), [(EARLIER, 4), (NOW, 8)])
def test_a_text_aligned_model_knows_the_frames_of_words_whose_times_are_their_own(
    tmp_path: Path, plan: dict[str, object], known: int
) -> None:
    items = read_items(aligned_corpus(tmp_path / "codes", plan), "train", get_normaliser("basic"), most_frames=100)
    assert len(items) == 8
    assert sum(bool((item.spans[:, 1] > 0).any()) for item in items.values()) == known
