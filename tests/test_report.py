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
from eval.differences import compare_rows
from eval.merging import merge_results
from eval.protocol import Protocol, TestSet, test_set_sha256
from eval.report.groups import groups_of
from eval.report.markdown import results_markdown
from eval.report.page import write_report
from eval.report.plots import rate_figure
from eval.report.terminal import format_table
from eval.results_file import load_results, save_results
from eval.schema import Clip, Difference, Results, Row, Sample, make_row
from eval.speech.quality import QualitySummary
from eval.systems import system_name, systems_of
from eval.text.normalisers import get_normaliser
from eval.text.wer import score_pairs

TEXTS = ["bin blue at f two now", "set <script>alert(1)</script> by g", "lay green with a nine soon"]
IDS = ["u1", "u2", "u<3>"]
JUDGE = {"name": "small-recogniser", "kind": "seq2seq", "weights_sha256": "ab" * 32, "decoding": "attention"}
VALUES = {"mel_distance_db": 4.2, "stoi": 0.8, "pesq": None, "level_difference_db": -1.0}
MEASURED = {"mel_distance_db": 3, "stoi": 2, "pesq": 0, "level_difference_db": 3}


def protocol(task: str = "speech", judge: dict | None = None, **changes) -> Protocol:
    digest = test_set_sha256(list(zip(IDS, TEXTS, strict=True)))
    judge = (JUDGE if judge is None else judge) if task == "speech" else {}
    return Protocol(task, judge, "basic", "1", TestSet("grid-s1 test", digest, 3), bootstrap_samples=200, **changes)


def row(system: str, heard: list[str | None], rate: float | None = None, **changes) -> Row:
    rates = score_pairs(TEXTS, heard, get_normaliser("basic"), IDS)
    name = changes.pop("name", None) or system_name(system)
    task = system if system in ("asr", "slm-st") else "speech"
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
        quality=[QualitySummary("reconstruction", "codec-12", 3, VALUES, MEASURED, ["PESQ: no extra"])],
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
    with pytest.raises(ValueError, match="schema version 99, this code reads versions 1 to 2"):
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
    hub = {"name": "a", "source": "openai/whisper-base", "revision": "e3" * 20, "kind": "seq2seq"}
    for changed, what in (
        (
            protocol(judge=JUDGE | {"weights_sha256": "cd" * 32}),
            "judge.weights_sha256 (abababababab... and cdcdcdcdcdcd...)",
        ),
        (protocol(judge=JUDGE | {"decoding": "ctc"}), "judge.decoding (attention and ctc)"),
        (protocol(judge=hub), "judge.decoding (attention and none), judge.weights_sha256 (abababababab... and none)"),
        (dataclasses.replace(protocol(), normaliser="none"), "normaliser (basic and none)"),
        (dataclasses.replace(protocol(), normaliser_version="2"), "normaliser version (1 and 2)"),
        (dataclasses.replace(protocol(), test_set=TestSet("grid-s1 test", "0", 3)), "test set ("),
        (dataclasses.replace(protocol(), dtype="bf16"), "dtype (fp32 and bf16)"),
        (dataclasses.replace(protocol(), reference="judge"), "reference (text and judge)"),
        (protocol("asr"), "task (speech and asr), judge.decoding"),
    ):
        with pytest.raises(ValueError, match=re.escape("protocols differ in ") + f".*{re.escape(what)}"):
            compare_rows(tts, row("ground_truth", TEXTS, protocol=changed))


def test_hub_judges_are_compared_by_commit_and_not_by_label() -> None:
    commit = "e37978b90ca9030d5170a5c07aadb050351a65bb"
    hub = {"name": "whisper", "kind": "seq2seq", "source": "openai/whisper-base", "revision": commit}
    one = row("tts", TEXTS, protocol=protocol(judge=hub))
    mirror = hub | {"name": "ours", "source": "mirror/whisper-base"}
    assert compare_rows(one, row("tts", TEXTS, protocol=protocol(judge=mirror))).difference == 0
    older = {key: value for key, value in hub.items() if key != "source"}  # results written before it was recorded
    assert compare_rows(one, row("tts", TEXTS, protocol=protocol(judge=older))).difference == 0
    with pytest.raises(ValueError, match=r"differ in judge.revision \(e37978b90ca9... and 0000"):
        compare_rows(one, row("tts", TEXTS, protocol=protocol(judge=hub | {"revision": "0" * 40})))
    # A tag may move and two models may have tags of one name: there the hub's name counts, still not the label.
    tagged = hub | {"revision": "main"}
    two = row("tts", TEXTS, protocol=protocol(judge=tagged))
    assert compare_rows(two, row("tts", TEXTS, protocol=protocol(judge=tagged | {"name": "x"}))).difference == 0
    with pytest.raises(ValueError, match=r"differ in judge.source"):
        compare_rows(two, row("tts", TEXTS, protocol=protocol(judge=tagged | {"source": "mirror/whisper-base"})))


def test_recordings_that_differ_are_refused_where_both_are_known() -> None:
    def of(audio: str | None) -> Row:
        test_set = dataclasses.replace(protocol().test_set, audio_sha256=audio)
        return row("tts", TEXTS, protocol=dataclasses.replace(protocol(), test_set=test_set))

    assert compare_rows(of("aa"), of(None)).difference == compare_rows(of("aa"), of("aa")).difference == 0
    with pytest.raises(ValueError, match="audio of the test set .aa and bb."):
        compare_rows(of("aa"), of("bb"))


def test_table_for_the_terminal(results: Results) -> None:
    text = format_table(results)
    assert "Speech as judge small-recogniser reads it" in text and "Speech recognition by the SLM" in text
    lines = text.splitlines()
    assert all(len(line) <= 110 for line in lines)
    truth = next(line for line in lines if line.strip().startswith("ground truth"))
    assert "0.0 [0.0, 16.8]" in truth and "0/3" in truth and "widened to Wilson's over words" in " ".join(text.split())
    assert "\u0394 WER against ground truth" in lines
    tts = next(line for line in lines if line.strip().startswith("SLM TTS, slm-12"))
    difference = results.rows[0].difference
    assert f"{100 * difference.wer:+.1f} [{100 * difference.interval[0]:+.1f}, " in tts
    asr = lines[lines.index(next(line for line in lines if line.startswith("Speech recognition"))) :]
    assert "\u0394" not in asr[2] and any(line.strip().startswith("small-recogniser on ground") for line in asr)
    rates = [line.strip().split("  ")[0] for line in lines if "SLM TTS" in line]
    assert rates == ["SLM TTS, slm-12", "SLM TTS, slm-6"] * 2  # the second time of what went wrong


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


def test_a_further_task_stands_behind_the_known_ones_with_a_name_a_table_and_a_colour(tmp_path: Path) -> None:
    kinds = ["slm-st", "slm-echo", "asr", "tts", "ground_truth"]
    rows = [row(kind, TEXTS, rate, name=system_name(kind)) for kind in kinds for rate in (12.5, 6.25)]
    assert systems_of(one.system for one in rows) == ["ground_truth", "tts", "asr", "slm-echo", "slm-st"]
    speech, asr, st = groups_of(rows)
    assert [one.name for one in speech.rows[::2]] == ["ground truth", "SLM TTS", "SLM echo"]
    assert (asr.heading, st.heading) == ("Speech recognition by the SLM", "What SLM st writes")
    assert [one.system for one in st.beside] == ["ground_truth"] * 2  # the same texts, as a judge reads the recordings
    (save_results(Results("Tasks", rows), tmp_path), write_report(load_results(tmp_path), tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    assert "SLM st" in page.text and "What SLM st writes" in format_table(load_results(tmp_path))
    texts = [text.get_text() for text in rate_figure(speech.rows).legends[0].texts][:-1]  # the last is the front
    assert texts == ["ground truth", "SLM TTS", "SLM echo"]
    assert set(lines_of(rate_figure(speech.rows))) == set(texts)  # by colour: no two share one
    with pytest.raises(ValueError, match="'st' is unknown: choose one of ground_truth.*or slm-TASK"):
        row("st", TEXTS)


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


def test_what_has_one_name_and_differs_is_kept_from_each_part(results: Results) -> None:
    """Another reading of the recordings, other versions, another test set with the same utterance ids."""
    results.title, results.rows = "first", results.rows[:3]
    clip = Clip("recording", "b.flac", {"small-recogniser": "another reading", "second": "<i>bin</i>"})
    other = Results(
        "second",
        [
            row("ground_truth", [TEXTS[0], TEXTS[1], "lay"]),
            row("semantic_reconstruction", TEXTS, 25.0, model="codec-25"),
        ],
        samples=[
            dataclasses.replace(results.samples[0], clips=[clip]),
            Sample("u1", "a text of other words", [Clip("recording", "c.flac", {"small-recogniser": "heard"})], "ab"),
        ],
        versions={"torch": "3", "numpy": "1"},
    )
    found = compare_rows(other.rows[1], other.rows[0])
    other.rows[1].difference = Difference("ground truth", found.difference, found.interval, found.p_value)
    merged = merge_results([results, other, other], "all")
    truths = {r.name: r for r in merged.rows if r.system == "ground_truth"}
    assert {name: one.wer for name, one in truths.items()} == {
        "ground truth": 0.0,
        "ground truth (second)": other.rows[0].wer,
    }
    against = {r.model: r.difference.against for r in merged.rows if r.difference}
    assert against == {"slm-12": "ground truth", "codec-25": "ground truth (second)"}
    assert merged.versions == {"torch": "2", "torch (second)": "3", "numpy": "1"}
    assert [(s.text, len(s.clips)) for s in merged.samples] == [(TEXTS[1], 1), ("a text of other words", 1)]
    heard = merged.samples[0].clips[0].heard
    assert heard == {
        "small-recogniser": "<i>bin</i>",
        "small-recogniser (second)": "another reading",
        "second": "<i>bin</i>",
    }
    assert results.samples[0].clips[0].heard == {"small-recogniser": "<i>bin</i>"}  # the parts stay as they are


def test_the_character_error_rate_has_an_interval_in_every_writer(results: Results, tmp_path: Path) -> None:
    one = results.rows[3]
    low, high = one.cer_interval
    assert low < one.cer < high and (low, high) != one.interval
    shown = f"{100 * one.cer:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    for text in (format_table(results, 160), results_markdown(results), write_report(results, tmp_path).read_text()):
        assert shown in text


def test_measures_stand_in_the_file_under_their_own_keys(results: Results, tmp_path: Path) -> None:
    """As files had them when each measure was a field: scripts that read those keys find them, and old files load."""
    item = json.loads(save_results(results, tmp_path).read_text())["quality"][0]
    assert {key: item[key] for key in VALUES} == VALUES and "values" not in item
    old = {
        "name": "reconstruction",
        "model": "codec",
        "n_scored": 2,
        "mel_distance_db": 2.2,
        "stoi": 0.8,
        "pesq": None,
        "level_difference_db": -1.5,
        "n_measured": {"mel_distance_db": 2, "stoi": 1, "pesq": 0, "level_difference_db": 2},
        "notes": ["PESQ: too little speech in the clip (2 clips)"],
        "intervals": {"mel_distance_db": [2.0, 2.4]},
        "test_set": "grid test",
        "n_failed": 0,
        "system": "reconstruction",
        "cell": "",
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"schema_version": 2, "title": "T", "rows": [], "quality": [old]}))
    (found,) = load_results(path).quality
    assert found.values == {"mel_distance_db": 2.2, "stoi": 0.8, "pesq": None, "level_difference_db": -1.5}
    assert found.intervals == {"mel_distance_db": (2.0, 2.4)} and found.n_measured == old["n_measured"]
    again = json.loads(save_results(load_results(path), tmp_path).read_text())["quality"][0]
    assert again == old


def test_a_terminal_too_narrow_for_all_measures_gets_them_in_several_tables(results: Results) -> None:
    values = {
        "mel_distance_db": 1.0,
        "stoi": 0.5,
        "pesq": 2.0,
        "similarity": 0.75,
        "dnsmos_sig": 3.25,
        "dnsmos_bak": 4.5,
    }
    intervals = {key: (value / 2, 2 * value) for key, value in values.items()}
    summary = QualitySummary("reconstruction", "m", 2, values, dict.fromkeys(values, 2), [], intervals, "a test set")
    table = format_table(Results("T", [], quality=[summary]), 80)
    assert max(map(len, table.splitlines()[1:])) <= 80 and "…" not in table
    assert all(cell in table for cell in ("1.00 [0.50, 2.00]", "0.750 [0.375, 1.500]", "4.50 [2.25, 9.00]"))
    assert sum(line.strip().startswith("reconstruction") for line in table.splitlines()) > 1


def test_results_of_version_1_are_read(results: Results, tmp_path: Path) -> None:
    """As that version wrote them: cells before names, none of the later fields."""
    path = save_results(results, tmp_path)
    content = json.loads(path.read_text()) | {"schema_version": 1}
    for one in content["rows"]:
        for key in ("cer_interval", "cell", "method", "seed"):
            del one[key]
        for utterance in one["utterances"]:
            del utterance["speaker"]
        if one["system"] != "ground_truth":
            one["name"] = f"12.5hz: pooled: {one['name']}"
    for one, old in ((content["quality"][0], "n_clips"), *((codes, "n_utterances") for codes in content["codes"])):
        one[old] = one.pop("n_scored")
        for key in ("n_failed", "cell", "system"):
            one.pop(key, None)
        one["name"] = f"12.5hz: {one['name']}"
    path.write_text(json.dumps(content))
    found = load_results(path)
    assert [one.label for one in found.rows if one.system == "tts"] == ["12.5hz: pooled: SLM TTS"] * 2
    assert {(one.cell, one.name) for one in found.rows if one.system == "asr"} == {("12.5hz: pooled", "SLM ASR")}
    assert (found.quality[0].cell, found.quality[0].system, found.quality[0].n_scored) == (
        "12.5hz",
        "reconstruction",
        3,
    )
    assert [(c.cell, c.name, c.n_scored) for c in found.codes] == [
        ("12.5hz", "codec-12.5", 1),
        ("12.5hz", "codec-6.25", 1),
    ]
    assert "WER" in format_table(found) and write_report(found, tmp_path).is_file()


def method_rows(*points: tuple[str, float, int | None, int]) -> list[Row]:
    """TTS rows of (method, rate, seed, words wrong in the first utterance)."""
    return [
        row(
            "tts", [" ".join(["x"] * wrong + TEXTS[0].split()[wrong:]), *TEXTS[1:]], rate, method=method, seed=seed,
            cell=f"{rate}-{method}-{seed}",
        )
        for method, rate, seed, wrong in points
    ]  # fmt: skip


def lines_of(figure) -> dict[str, list[tuple[float, float]]]:
    """Legend's name -> the points that the line of its colour joins, over all panels."""
    (legend,) = figure.legends
    colours = {
        line.get_color(): text.get_text() for line, text in zip(legend.legend_handles, legend.texts, strict=True)
    }
    joined = [
        line
        for axes in figure.axes
        for line in axes.lines
        if line.get_linestyle() == "-" and len(set(line.get_xdata())) > 1
    ]
    return {colours[line.get_color()]: list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in joined}


def test_the_rate_plot_has_one_named_line_for_each_method_with_its_seeds_pooled() -> None:
    rows = method_rows(
        ("resynthesis", 12.5, 0, 1), ("resynthesis", 12.5, 1, 3), ("resynthesis", 6.25, 0, 4), ("pooled", 12.5, 0, 3),
        ("pooled", 6.25, 0, 5), ("none", 12.5, 0, 6), ("none", 6.25, 0, 6),
    )  # fmt: skip
    words = rows[0].n_words
    figure = rate_figure(rows)
    assert lines_of(figure) == {
        "resynthesis": [(6.25, pytest.approx(400 / words)), (12.5, pytest.approx(200 / words))],
        "pooled": [(6.25, pytest.approx(500 / words)), (12.5, pytest.approx(300 / words))],
        "none": [(6.25, pytest.approx(600 / words)), (12.5, pytest.approx(600 / words))],
    }
    # Every mark stands at its rate, and the seeds' spread is shown.
    assert {x for axes in figure.axes for line in axes.lines for x in line.get_xdata()} == {6.25, 12.5}
    ticks = [line.get_ydata() for axes in figure.axes for line in axes.lines if line.get_marker() == "_"]
    assert [list(values) for values in ticks] == [[pytest.approx(100 / words), pytest.approx(300 / words)]]


def test_a_ring_marks_what_no_other_point_beats() -> None:
    rows = method_rows(("a", 25.0, 0, 1), ("a", 12.5, 0, 3), ("b", 25.0, 0, 2), ("b", 12.5, 0, 3), ("b", 6.25, 0, 3))
    figure = rate_figure(rows)
    rings = [line for axes in figure.axes for line in axes.lines if line.get_markersize() == 13]
    wers = {(row.method, row.tokens_per_second): 100 * row.wer for row in rows}
    # Three of as many errors: the one of fewest tokens; and the better of two at 25.
    assert {(float(r.get_xdata()[0]), float(r.get_ydata()[0])) for r in rings} == {
        (25.0, wers["a", 25.0]),
        (6.25, wers["b", 6.25]),
    }
    assert any("front" in text.get_text() for text in figure.legends[0].texts)


def test_rows_that_do_not_say_in_what_they_differ_are_not_joined() -> None:
    rows = method_rows(("", 12.5, None, 1), ("", 12.5, None, 3), ("", 6.25, None, 4))
    rows[1].cell = "another"
    figure = rate_figure(rows)
    assert lines_of(figure) == {} and len(figure.legends[0].texts) == 3 + 1  # and the front
    apart = method_rows(("", 12.5, 0, 1), ("", 6.25, 0, 4))
    assert list(lines_of(rate_figure(apart))) == ["SLM TTS"]


def test_the_table_by_frame_rate_names_methods_and_pools_seeds(tmp_path: Path) -> None:
    rows = method_rows(("pooled", 12.5, 0, 1), ("pooled", 12.5, 1, 3), ("pooled", 6.25, 0, 4), ("none", 6.25, 0, 6))
    text = Page(write_report(Results("T", rows), tmp_path).read_text()).text
    first, last = (f"{100 * rows[i].wer:.1f}" for i in (0, 1))
    assert f"{50 * (rows[0].wer + rows[1].wer):.1f} (seeds: {first}, {last})" in text and "method" in text
