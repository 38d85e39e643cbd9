"""Test sets by the length of their texts: which utterances fall where, and what tables and contrasts make of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_matrix import matrix, ran  # noqa: F401 - a fixture

from eval.merging import merge_results
from eval.protocol import Protocol, TestSet
from eval.report.answer import answers
from eval.report.lengths import length_table
from eval.report.markdown import results_markdown
from eval.report.page import write_report
from eval.report.terminal import format_table
from eval.results_file import load_results, save_results
from eval.schema import Results, Row, make_row
from eval.stats import bootstrap_interval
from eval.text.lengths import LengthBin, in_order
from eval.text.normalisers import get_normaliser
from eval.text.wer import score_pairs
from eval.text_lengths import row_within, rows_within
from recipes.commands import compare, evaluate, score
from recipes.config import ConfigError, load_config

TEXTS = ["a b", "a b c", "a b c d", *(" ".join("abcdefghij") for _ in range(3)), "a b c d e f"]
BINS = in_order([LengthBin("long", 8), LengthBin("short", 1, 4)])


def row(name: str, wrong_short: int, wrong_long: int, texts: list[str] = TEXTS) -> Row:
    """A row with so many words misheard in each utterance below and above 8 words."""
    wrong = [wrong_long if len(text.split()) >= 8 else wrong_short for text in texts]
    heard = [" ".join(["x"] * n + text.split()[n:]) for n, text in zip(wrong, texts, strict=True)]
    rates = score_pairs(texts, heard, get_normaliser("basic"), [f"u{i}" for i in range(len(texts))])
    protocol = Protocol("asr", {}, "basic", "2", TestSet("t", "0", len(texts)), bootstrap_samples=200)
    return make_row(name, "asr", "m", protocol, rates)


def test_bins_are_ranges_with_both_ends() -> None:
    short, long = BINS
    assert (short.name, long.name) == ("short", "long")
    assert [short.holds(n) for n in (0, 1, 4, 5)] == [False, True, True, False]
    assert [long.holds(n) for n in (7, 8, 1000)] == [False, True, True]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ("[{name: short, least: 7, most: 1}]", "text_lengths.0.*short: 7 to 1 words is no range"),
        ("[{least: 7}]", "text_lengths.0.name: missing"),
        (
            "[{name: a, most: 8}, {name: b, least: 8, most: 9}]",
            r"a \(1 to 8 words\) and b \(8 to 9 words\) share a len",
        ),
        ("[{name: a}, {name: b, least: 8, most: 9}]", "share a length"),
        ("[{name: a, most: 8}, {name: a, least: 9}]", "a name of its own"),
    ],
)
@pytest.mark.parametrize("command", [evaluate, score, compare])
def test_wrong_bins_are_named_by_every_command(command, lengths, message) -> None:
    own = {score: ["hypothesis=x"], compare: ["stages=[{command: evaluate}]", "cells=[{name: a}]"]}
    with pytest.raises(ConfigError, match=message):
        load_config(command.Config, None, [*own.get(command, []), f"text_lengths={lengths}"])


def test_a_part_is_scored_as_a_test_set_of_its_own() -> None:
    short, long = (row_within(row("m", 1, 3), bin_) for bin_ in BINS)
    assert (short.wer, long.wer) == (3 / 9, 9 / 30) and (short.n_scored, long.n_words) == (3, 30)
    assert short.interval == bootstrap_interval([1, 1, 1], [2, 3, 4], samples=200, seed=0)
    assert (short.protocol.test_set.name, short.protocol.test_set.n) == ("t, short texts", 3)
    assert short.protocol.key() != long.protocol.key() != row("m", 1, 3).protocol.key()
    assert row_within(row("m", 1, 1), LengthBin("none", 100)) is None
    assert rows_within([row("m", 1, 1)], LengthBin("six", 6, 6), least=2) == []


def test_the_table_shows_where_the_order_turns() -> None:
    rows = [row("one", 0, 4), row("other", 1, 1)]
    assert rows[0].wer > rows[1].wer
    table = length_table(rows, ["one", "other"], BINS)
    assert table.headings == ["system", "short", "long"]
    wers = [[float(cell.split(" ")[0]) for cell in line[1:]] for line in table.lines]
    assert wers == [[0.0, 40.0], [33.3, 10.0]]  # the first is better on short texts, the second on long ones
    assert all("[" in cell for line in table.lines for cell in line[1:])
    assert "short (1 to 4 words): 3 utterances, 9 words; long (8 words or more): 3 utterances, 30 words" in table.note
    assert "1 utterances of other lengths are in none" in table.note
    assert length_table(rows, ["one", "other"], []) is None


def test_page_markdown_and_terminal_have_the_table_and_results_keep_the_bins(tmp_path: Path) -> None:
    results = Results("t", [row("one", 0, 4)], text_lengths=BINS)
    save_results(results, tmp_path)
    found = load_results(tmp_path)
    assert found.text_lengths == BINS == merge_results([found, results], "m").text_lengths
    for shown in (write_report(found, tmp_path).read_text("utf-8"), results_markdown(found), format_table(found)):
        assert "By length of text" in shown and "40.0 [" in shown
    assert "By length of text" not in format_table(Results("t", [row("one", 0, 4)]))


def test_contrasts_are_drawn_on_each_length_too(tmp_path: Path, ran) -> None:  # noqa: F811
    lengths = [LengthBin("six", 6, 6), LengthBin("none", 50)]
    compare.run(matrix(tmp_path, text_lengths=lengths))
    found = load_results(tmp_path / "runs")
    names = dict.fromkeys(one.name for one in found.contrasts)
    assert [text.split(":")[0].split(" (")[-1] for text in answers(found)[:2]] == ["rates)", "rates, six texts)"]
    assert list(names) == ["rates", "rates, six texts"]
    compare.run(matrix(tmp_path))  # nothing runs anew for it
    assert len(ran) == 10
    assert {one.name for one in load_results(tmp_path / "runs").contrasts} == {"rates"}


def test_scored_files_are_told_apart_by_length(tmp_path: Path, capsys) -> None:
    said = "".join(f"u{i} {text}\n" for i, text in enumerate(TEXTS))
    (tmp_path / "ref").write_text(said, encoding="utf-8")
    (tmp_path / "hyp").write_text(said.replace("u0 a b", "u0 x b"), encoding="utf-8")
    files = [f"reference={tmp_path / 'ref'}", f"hypothesis={tmp_path / 'hyp'}"]
    score.run(
        load_config(score.Config, None, [*files, "text_lengths=[{name: short, most: 4}, {name: long, least: 8}]"])
    )
    assert "By length of text: WER %" in capsys.readouterr().out


def test_the_shipped_comparison_of_lengths_has_texts_of_each(shared_data: Path) -> None:
    config = load_config(compare.Config, "embedded/compare-slm-open-english", [])
    read, said = get_normaliser("whisper-english"), shared_data / "kathleen-arctic" / "manifest.jsonl"
    rows = [json.loads(line) for line in said.read_text(encoding="utf-8").splitlines()]
    n_words = [len(read(line["text"]).split()) for line in rows if line["split"] == "test"]
    assert [sum(map(one.holds, n_words)) for one in config.text_lengths] == [33, 42]
