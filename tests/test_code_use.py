"""How a coded corpus uses the books, and the tables that say so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eval.codes import code_statistics, most_frames
from eval.report.markdown import results_markdown
from eval.report.page import write_report
from eval.report.tables import code_table, quality_table
from eval.report.terminal import format_table
from eval.results_file import load_results, save_results
from eval.schema import Results
from eval.speech.quality import Quality as Clip
from eval.speech.quality import QualitySummary, summarise_quality
from eval.stats import mean_interval
from recipes.commands import compare
from recipes.config import ConfigError, load_config
from recipes.runs.pipeline import make_steps
from recipes.scoring.code_use import corpus_code_statistics
from slm.corpus import CodedCorpusWriter, CorpusError, CorpusMetadata


def write_corpus(folder: Path, codes: dict[str, list[int]], copies: int, split: str = "train") -> Path:
    """A coded corpus of one split as `slm encode` leaves it, in two shards; its book 0 has eight entries."""
    writer = CodedCorpusWriter(folder, CorpusMetadata("own", [8, 4], 12.5, 16_000, plan={"copies": copies}))
    rows = [
        {"id": name, "text": "one", "duration": 0.3, "audio_codes": np.array([book, [0] * len(book)])}
        for name, book in codes.items()
    ]
    for shard in range(2):
        writer.write_shard(split, shard, 2, rows[shard::2])
    writer.finish()
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two recordings, one with a varied copy."""
    codes = {"a": [0, 0, 1, 1], "b#x": [2, 2, 3, 3], "a#1": [4, 5, 6, 7]}
    return write_corpus(tmp_path / "codes", codes, copies=2)


def test_varied_copies_do_not_count(corpus: Path) -> None:
    found = corpus_code_statistics(str(corpus), "train", "mine", "own")
    assert (found.name, found.data, found.n_scored, found.n_frames) == ("mine", "train split", 2, 8)
    assert (found.books[0].used, found.books[0].use) == (4, 0.5)
    assert found.books[0].perplexity == pytest.approx(4.0) and found.books[1].used == 1


@pytest.mark.parametrize(
    ("ids", "copies", "split", "counted"),
    [
        (["call#1", "call#2"], 1, "train", 2),  # nothing was varied
        (["call#1", "call#2", "call#1#1", "call#2#1"], 2, "train", 2),
        (["a", "a#1", "a#7"], 2, "train", 2),  # no seventh copy was made
        (["a", "a#01", "b#1"], 2, "train", 3),  # not as a copy is named; no plain copy beside it
        (["a", "a#1"], 2, "test", 2),  # only the train split has copies
    ],
)
def test_recordings_whose_names_end_like_a_copy_s_count(tmp_path: Path, ids, copies, split, counted) -> None:
    folder = write_corpus(tmp_path / "codes", {name: [0] for name in ids}, copies, split)
    assert corpus_code_statistics(str(folder), split, "mine", "own").n_scored == counted


def test_codes_of_another_tokenizer_and_absent_splits_are_refused(corpus: Path) -> None:
    with pytest.raises(CorpusError, match="another|fingerprint"):
        corpus_code_statistics(str(corpus), "train", "mine", "other")
    with pytest.raises(ConfigError, match="has no split 'test'.*it has train"):
        corpus_code_statistics(str(corpus), "test", "mine", None)


def results() -> Results:
    rng = np.random.default_rng(0)
    codes = [
        code_statistics([rng.integers(0, 64, (2, frames))], [64, 64], hz, f"{hz:g}hz", data)
        for hz in (12.5, 6.25)
        for data, frames in (("grid test", 40), ("train split", 400))
    ]
    values = [{"mel_distance_db": 3.0 + i, "stoi": 0.8 + 0.01 * i, "level_difference_db": -1.0} for i in range(6)]
    clips = [Clip(found, 0.0, ["PESQ: too short"]) for found in values]
    quality = [summarise_quality("12.5hz: reconstruction", "nano", [*clips, None], "grid test", 200)]
    return Results("T", [], codes=codes, quality=quality)


def test_measures_stand_in_the_terminal_the_page_and_the_document(tmp_path: Path) -> None:
    found = results()
    low, high = found.quality[0].intervals["stoi"]
    assert low < found.quality[0].values["stoi"] < high
    stoi = f"0.825 [{low:.3f}, {high:.3f}]"
    save_results(found, tmp_path)
    assert load_results(tmp_path).quality == found.quality
    table, page, text = format_table(found), write_report(found, tmp_path).read_text(), results_markdown(found)
    used = f"{found.codes[1].books[0].used} of 64"
    for shown in (page, text):
        assert stoi in shown and used in shown and "train split" in shown and "PESQ: too short (6 clips)" in shown
    assert stoi in table and f"{100 * found.codes[1].books[0].use:.1f}" in table
    assert max(map(len, table.splitlines())) <= 110
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines if "12.5hz" in line} == {14, 11}
    assert [item.data for item in most_frames(found.codes)] == ["train split"] * 2


def test_older_results_have_neither_intervals_nor_names_of_recordings() -> None:
    values = {"mel_distance_db": 4.0, "stoi": 0.8, "pesq": None, "level_difference_db": -1.0}
    summary = QualitySummary("reconstruction", "nano", 3, values, {"mel_distance_db": 3, "stoi": 2}, [])
    (line,) = quality_table([summary]).lines
    assert line[:7] == ["reconstruction", "nano", "3", "0", "4.00", "0.800 (2 clips)", "n/a"]
    assert "codes of" not in code_table([code_statistics([np.zeros((1, 3), int)], [4], 25.0)]).headings


def test_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(5.0, 1.0, 400)
    low, high = mean_interval(list(values))
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.02)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert mean_interval([1.0]) is None


@pytest.mark.parametrize("name", ["compare", "compare-tokenizers"])
def test_each_cell_reads_one_tokenizer_and_its_own_codes(name: str, tmp_path: Path) -> None:
    config = load_config(compare.Config, f"embedded/{name}", [f"run_dir={tmp_path}"])
    assert [cell.name for cell in config.cells] == ["25hz", "12.5hz", "6.25hz"]
    for cell in config.cells:
        steps = make_steps(config, cell.name, cell.set)
        tokenizers = {s.config.tokenizer for s in steps if s.stage.command in ("encode", "evaluate")}
        assert tokenizers == {f"embedded-{cell.name}"}
        for step in steps:
            assert Path(step.config.run_dir).parent == tmp_path / cell.name
            if step.stage.command == "evaluate":
                assert step.config.precision == "fp32"
                # The second reading of a test set, by another judge, repeats neither its quality nor its codes.
                assert step.config.codes == ([steps[0].config.run_dir] if step.config.quality else [])
