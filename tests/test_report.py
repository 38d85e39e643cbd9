"""Results on disk and the report: round trip, refusals, escaping, nothing from outside."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

from eval.codes import code_statistics
from eval.report import format_table, write_report
from eval.schema import (
    Clip,
    Difference,
    Protocol,
    Results,
    Row,
    Sample,
    TestSet,
    compare_rows,
    load_results,
    make_row,
    merge_results,
    save_results,
    test_set_sha256,
)
from eval.speech import QualitySummary
from eval.text import get_normaliser
from eval.wer import score_pairs

TEXTS = ["bin blue at f two now", "set <script>alert(1)</script> by g", "lay green with a nine soon"]
IDS = ["u1", "u2", "u<3>"]
JUDGE = {"name": "small-recogniser", "kind": "seq2seq", "weights_sha256": "ab" * 32, "decoding": "attention"}
MEASURED = {"mel_distance_db": 3, "stoi": 2, "pesq": 0, "level_difference_db": 3}


def protocol(task: str = "speech", judge: dict | None = None, **changes) -> Protocol:
    digest = test_set_sha256(list(zip(IDS, TEXTS, strict=True)))
    judge = (JUDGE if judge is None else judge) if task == "speech" else {}
    return Protocol(task, judge, "basic", "1", TestSet("grid-s1 test", digest, 3), bootstrap_samples=200, **changes)


def row(system: str, heard: list[str | None], rate: float | None = None, **changes) -> Row:
    rates = score_pairs(TEXTS, heard, get_normaliser("basic"), IDS)
    name = {"ground_truth": "ground truth", "tts": "SLM TTS", "asr": "SLM ASR"}.get(system, system.replace("_", " "))
    task = "asr" if system == "asr" else "speech"
    facts = {"protocol": protocol(task), "model": "", "frame_rate_hz": rate, "tokens_per_second": rate, **changes}
    return make_row(name, system, rates=rates, **facts)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    audio = tmp_path / "samples" / "u1.flac"
    audio.parent.mkdir()
    soundfile.write(audio, 0.1 * np.sin(np.arange(8000) / 10), 16_000)
    rows = [
        row("tts", [TEXTS[0], "set", None], 12.5, model="slm-12", n_truncated=1, real_time_factor=0.4),
        row("tts", ["bin", "set", None], 6.25, model="slm-6", generation={"temperature": 0.8}),
        row("ground_truth", TEXTS),
        row("semantic_reconstruction", [TEXTS[0], TEXTS[1], "lay green"], 12.5, model="codec-12"),
        row("asr", [TEXTS[0], "<b>", TEXTS[2]], 12.5, model="slm-12"),
    ]
    found = compare_rows(rows[0], rows[2])
    rows[0].difference = Difference("ground truth", found.difference, found.interval, found.p_value)
    rng = np.random.default_rng(0)
    return Results(
        title="A & B <compared>",
        rows=rows,
        codes=[code_statistics([rng.integers(0, 64, (3, 200))], [64] * 3, hz, f"codec-{hz}") for hz in (12.5, 6.25)],
        quality=[QualitySummary("reconstruction", "codec-12", 3, 4.2, 0.8, None, -1.0, MEASURED, ["PESQ: no extra"])],
        samples=[Sample("u1", TEXTS[1], [Clip("recording", str(audio), {"small-recogniser": "<i>bin</i>"})])],
        notes=["<img src=x> could not be read"],
        created="2026-01-01 12:00",
        versions={"torch": "2"},
    )


def test_round_trip(results: Results, tmp_path: Path) -> None:
    path = save_results(results, tmp_path)
    assert json.loads(path.read_text())["samples"][0]["clips"][0]["audio"] == "samples/u1.flac"
    assert dataclasses.asdict(load_results(tmp_path)) == dataclasses.asdict(results)


def test_wrong_files_are_refused(results: Results, tmp_path: Path) -> None:
    path = save_results(results, tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"schema_version": 99}))
    with pytest.raises(ValueError, match="schema version 99, this code reads version 1"):
        load_results(path)
    path.write_text(json.dumps(content | {"rows": [{"name": "x"}]}))
    with pytest.raises(ValueError, match="not a results file"):
        load_results(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a results file"):
        load_results(path)
    with pytest.raises(FileNotFoundError, match="slm evaluate"):
        load_results(tmp_path / "nothing")


def test_rows_of_different_protocols_are_never_compared(results: Results) -> None:
    tts, truth = results.rows[0], results.rows[2]
    assert compare_rows(tts, truth).difference == pytest.approx(tts.wer - truth.wer)
    renamed = row("ground_truth", TEXTS, protocol=protocol(judge=JUDGE | {"name": "elsewhere"}))
    assert compare_rows(tts, renamed).difference == pytest.approx(tts.wer)
    for changed, what in (
        (protocol(judge=JUDGE | {"weights_sha256": "cd" * 32}), "judge"),
        (protocol(judge=JUDGE | {"decoding": "ctc"}), "judge"),
        (dataclasses.replace(protocol(), normaliser="none"), "normaliser"),
        (dataclasses.replace(protocol(), test_set=TestSet("grid-s1 test", "0", 3)), "test set"),
        (protocol("asr"), "task, judge"),
    ):
        with pytest.raises(ValueError, match=f"protocols differ in {what}"):
            compare_rows(tts, row("ground_truth", TEXTS, protocol=changed))


def test_table_for_the_terminal(results: Results) -> None:
    text = format_table(results)
    assert "Speech as judge small-recogniser reads it" in text and "Speech recognition by the SLM" in text
    lines = text.splitlines()
    assert all(len(line) <= 110 for line in lines)
    truth = next(line for line in lines if line.strip().startswith("ground truth"))
    assert "0.0 [0.0, 0.0]" in truth and "0/3" in truth
    assert "\u0394 WER against ground truth" in lines
    tts = next(line for line in lines if line.strip().startswith("SLM TTS, slm-12"))
    difference = results.rows[0].difference
    assert f"{100 * difference.wer:+.1f} [{100 * difference.interval[0]:+.1f}, " in tts
    asr = lines[lines.index(next(line for line in lines if line.startswith("Speech recognition"))) :]
    assert "\u0394" not in asr[2] and any(line.strip().startswith("small-recogniser on ground") for line in asr)
    rates = [line.strip().split("  ")[0] for line in lines if "SLM TTS" in line]
    assert rates == ["SLM TTS, slm-12", "SLM TTS, slm-6"]


def test_a_wide_table_leaves_columns_out_and_cuts_none(results: Results) -> None:
    for number, one in enumerate(results.rows):
        one.name = f"12.5hz-with-a-long-name: {one.name}"
        one.substitutions, one.deletions, one.n_words, one.n_truncated = 12345, 12345, 123456, 1000
        one.difference = Difference(f"reference {number}", 1.0, (0.9, 1.1), 0.0)
        one.wer, one.interval, one.real_time_factor = 1.123, (1.001, 1.234), 0.012
    text = format_table(results)
    assert max(map(len, text.splitlines())) <= 110 and "\u2026" not in text
    assert "+100.0 [+90.0, +110.0]" in text and "112.3 [100.1, 123.4]" in text and "RTF" not in text
    assert "\u0394 WER against reference 0: 12.5hz-with-a-long-name: SLM TTS" in text


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        self.text += data


def test_report_is_escaped_and_self_contained(results: Results, tmp_path: Path) -> None:
    html = write_report(results, tmp_path).read_text()
    page = Page(html)
    names = [tag for tag, _ in page.tags]
    assert not {"script", "img", "b", "i", "link", "iframe"} & set(names)
    assert "&lt;script&gt;" in html and "<script>alert(1)</script>" in page.text and "A & B <compared>" in page.text
    audio = [attributes for tag, attributes in page.tags if tag == "audio"]
    assert len(audio) == 1 and audio[0]["src"].startswith("data:audio/flac;base64,")
    assert names.count("svg") >= 4  # bars for two tables, WER against the rate, use of the books
    outside = [
        value
        for _, attributes in page.tags
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href")
    ]
    assert all(value.startswith(("data:", "#")) for value in outside)
    assert not re.search(r"url\((?!#)", html) and "@import" not in html
    assert "By frame rate" in page.text and "failed: lay green" in page.text


def test_report_needs_its_clips(results: Results, tmp_path: Path) -> None:
    Path(results.samples[0].clips[0].audio).unlink()
    with pytest.raises(FileNotFoundError, match=r"u1\.flac"):
        write_report(results, tmp_path)


def test_merge_keeps_the_shared_row_once(results: Results) -> None:
    other = dataclasses.replace(results, rows=[row("ground_truth", TEXTS), row("tts", TEXTS, 25.0, model="slm-25")])
    merged = merge_results([results, other], "all")
    assert [r.name for r in merged.rows].count("ground truth") == 1
    assert len(merged.rows) == len(results.rows) + 1
    assert len(merged.codes) == 2 and len(merged.samples[0].clips) == 1
