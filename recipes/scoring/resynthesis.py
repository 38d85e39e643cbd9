"""What ``slm resynthesize`` scores and shows: measures, transcripts, tables in the terminal, a page with players."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import soundfile
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.judges.judge import Judge
from eval.report.listening import PageClip, PageRecording, audio_uri, listening_page
from eval.report.tables import fitting
from eval.speech.measures.registry import Measure, columns_of, explanation_of
from eval.speech.quality import compare_audio, summarise_quality
from eval.text.normalisers import get_normaliser
from eval.text.wer import score_pairs
from recipes.config import ConfigError
from recipes.runs.embedded import RECOGNISERS
from recipes.runs.files import atomic_write_text, read_json
from recipes.runs.own_folders import some_of

PIECE_S, MOST_PIECES = 30.0, 20  # a long recording is scored in such pieces, spread over it


def pieces(duration_s: float) -> list[tuple[float, float]]:
    """(start, length) in seconds of the equal pieces that are scored, spread evenly where there are too many."""
    n = max(1, math.ceil(duration_s / PIECE_S))
    chosen = dict.fromkeys(np.linspace(0, n - 1, min(n, MOST_PIECES)).round().astype(int).tolist())
    return [(index * duration_s / n, duration_s / n) for index in chosen]


def scores(reference: Path, audio: Path, label: str, measures: Sequence[Measure] | None = None) -> dict[str, Any]:
    """The measures of a clip against the recording, as fields of a row; None: the default measures."""
    compared, scored_s = [], 0.0
    with soundfile.SoundFile(reference) as one, soundfile.SoundFile(audio) as other:
        rates = one.samplerate, other.samplerate
        for start_s, length_s in pieces(one.frames / one.samplerate):
            pair = []
            for file in (one, other):
                file.seek(min(round(start_s * file.samplerate), file.frames))
                pair.append(file.read(max(1, round(length_s * file.samplerate)), dtype="float32"))
            if all(len(part) for part in pair):  # published lengths may fall a few samples short
                compared.append(compare_audio(*pair, *rates, measures))
                scored_s += length_s
    found = summarise_quality(audio.name, label, compared, measures=measures)
    notes = list(dict.fromkeys(note for piece in compared for note in piece.notes))
    return found.values | {"n_measured": found.n_measured, "scored_s": scored_s, "notes": notes}


def transcribe_excerpt(judge: Judge | None, path: Path, excerpt_s: float) -> str | None:
    """The judge's transcript of the excerpt; None where there is no judge."""
    if judge is None:
        return None
    with soundfile.SoundFile(path) as file:
        return judge.transcribe([file.read(round(excerpt_s * file.samplerate), dtype="float32")], file.samplerate)[0]


def cer_to_recording(in_recording: str | None, transcript: str | None) -> float | None:
    """CER of what the judge hears against what it hears in the recording; None where it hears no word there."""
    if not in_recording or transcript is None:
        return None
    return score_pairs([in_recording], [transcript], get_normaliser("basic")).cer


RESULTS_FILE, PAGE_FILE = "resynthesis.json", "index.html"
NAME_WIDTH = 25  # of "  semantic reconstruction"
MOST_INSIDE_S = 1800.0  # of audio inside the page: about 50 MB at 16 kHz


def refuse_foreign_files(folder: Path, outputs: Iterable[Path]) -> None:
    """Raises ConfigError where a file would be written over that `slm resynthesize` did not write.

    Args:
        folder: where results and page go.
        outputs: what else would be written there.
    """
    if "recordings" in read_json(folder / RESULTS_FILE):
        return
    if names := some_of(p.name for p in (folder / RESULTS_FILE, folder / PAGE_FILE, *outputs) if p.exists()):
        raise ConfigError(
            f"output (-o): {folder} holds {names}, which would be written over, and no {RESULTS_FILE} of an earlier "
            "start: choose another -o"
        )


def _fixed(key: str, digits: int, factor: float = 1.0) -> Callable[[dict[str, Any]], str]:
    """A measure as text; of a mean, over how many recordings where some have none."""

    def text(row: dict[str, Any]) -> str:
        if row[key] is None:
            return "n/a"
        n = row.get("n_with", {}).get(key, row.get("n"))
        return f"{factor * row[key]:.{digits}f}" + ("" if n == row.get("n") else f" ({n} of {row['n']})")

    return text


def _columns(rows: list[dict[str, Any]]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """Heading and text of each column, without those of measures that stand nowhere."""
    judging = [column for column in columns_of(_measured(rows)) if column.better != "none"]
    measured = [(column.key, column.heading, _fixed(column.key, column.digits)) for column in judging]
    measured.append(("heard_cer", "CER %", _fixed("heard_cer", 0, 100)))
    return [
        ("Hz", lambda row: f"{row['frame_rate_hz']:.4g}"),
        ("books", lambda row: str(row["n_books"])),
        ("bit/s", _fixed("bitrate_bps", 0)),
        ("RTF", lambda row: f"{row['real_time_factor']:.2g}"),
        *((heading, text) for key, heading, text in measured if any(row[key] is not None for row in rows)),
    ]


def _measured(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Keys of the measures in these rows."""
    return list(dict.fromkeys(key for row in rows for key in row["n_measured"]))


def _cer_explained(results: dict[str, Any]) -> str:
    """What the CER is; of a judge that knows few words, that too."""
    text = "CER: how far what the judge hears is from what it hears in the recording itself; no transcript is needed."
    if (judge := results["config"]["judge"]) in RECOGNISERS:
        text += (
            f" {judge} knows commands and digits; for other speech give a judge that reads it: judge=NAME_OR_FOLDER."
        )
    return text


def _all_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for recording in results["recordings"] for row in recording["rows"]]


def means(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each tokenizer and output, its measures averaged over the recordings that have them."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in _all_rows(results):
        groups.setdefault((row["tokenizer"], row["way"]), []).append(row)
    found = []
    for rows in groups.values():
        keys = ("real_time_factor", *_measured(rows), "heard_cer")
        values = {key: [row[key] for row in rows if row[key] is not None] for key in keys}
        facts = {key: rows[0][key] for key in ("tokenizer", "way", "frame_rate_hz", "n_books", "bitrate_bps")}
        mean = {key: sum(v) / len(v) if v else None for key, v in values.items()}
        found.append(facts | mean | {"n": len(rows), "n_with": {key: len(v) for key, v in values.items()}})
    return found


def _facts(entry: dict[str, Any]) -> str:
    """A line about a recording: what file it is, and what was measured of it alone, for comparison."""
    measured = entry.get("measured", {"n_measured": {}})
    columns = [c for c in columns_of(_measured([measured])) if measured[c.key] is not None]
    values = (f"{column.heading} {measured[column.key]:.{column.digits}f}" for column in columns)
    return "; ".join([entry["facts"], *values])


def remarks(results: dict[str, Any]) -> list[str]:
    """What the measures could not do: said once where it holds for all, else with the recording's name."""
    everywhere = [set(row["notes"]) for row in _all_rows(results)]
    common = set.intersection(*everywhere) if everywhere else set()
    own = [
        f"{recording['file']}: {note}"
        for recording in results["recordings"]
        for note in dict.fromkeys(note for row in recording["rows"] for note in row["notes"])
        if note not in common
    ]
    return [*sorted(common), *own]


def print_tables(results: dict[str, Any]) -> None:
    """A table for each recording and, of several, one of their means; what the judge heard below each."""
    console = Console(soft_wrap=True)  # a path folded by us could not be copied
    # The frame rate stands beside the tokenizer's name: a terminal is narrow.
    columns = [column for column in _columns(_all_rows(results)) if column[0] not in ("Hz", "books")]
    recordings = results["recordings"]
    blocks = [(f"{r['file']} ({_facts(r)})", r["rows"], r["heard"]) for r in recordings]
    if len(recordings) > 1:
        blocks.append((f"means over {len(recordings)} recordings", results["means"], None))
    for title, rows, transcript in blocks:
        console.print(Text(title))
        widths = [max(map(len, [heading, *map(text, rows)])) for heading, text in columns]
        for group in fitting(widths, console.width - NAME_WIDTH - 3):
            _print_table(console, rows, [columns[i] for i in group])
        if transcript is not None:
            judge = results["protocol"]["judge"]["name"]
            console.print(Text(f"{judge} hears in the recording: {transcript or '(nothing)'}"))
            for row in rows:
                way = row["way"].replace("_", " ")
                console.print(Text(f"  {row['tokenizer']}, {way}: {row['heard'] or '(nothing)'}"))
            console.print()
    if results["protocol"]["judge"]:
        console.print(Text(_cer_explained(results)))
    for remark in remarks(results):
        console.print(Text(remark))


def _print_table(
    console: Console, rows: list[dict[str, Any]], columns: list[tuple[str, Callable[[dict[str, Any]], str]]]
) -> None:
    """A line for each output of each tokenizer, below its tokenizer's name."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("tokenizer, output", overflow="fold", min_width=NAME_WIDTH)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        if number == 0 or rows[number - 1]["tokenizer"] != row["tokenizer"]:
            table.add_section()
            table.add_row(Text(f"{row['tokenizer']}, {row['frame_rate_hz']:.4g} Hz", style="bold"))
        cells = (f"  {row['way'].replace('_', ' ')}", *(text(row) for _, text in columns))
        table.add_row(*map(Text, cells))
    console.print(table)


def write_page(results: dict[str, Any], folder: Path) -> Path:
    """Write the page, with the excerpts inside unless they are too many; returns its path."""
    excerpt_s, judge = results["protocol"]["excerpt_s"], results["protocol"]["judge"]
    columns = _columns(_all_rows(results))
    played_s = [min(r["duration_s"], excerpt_s) * (1 + len(r["rows"])) for r in results["recordings"]]
    inside = sum(played_s) <= MOST_INSIDE_S

    def uri(name: str) -> str:
        if not inside:
            return quote(name)
        with soundfile.SoundFile(folder / name) as file:
            return audio_uri(file.read(round(excerpt_s * file.samplerate), dtype="float32"), file.samplerate)

    recordings = [
        PageRecording(
            Path(entry["file"]).name,
            _facts(entry),
            uri(entry["audio"]),
            entry["heard"],
            [
                PageClip(
                    row["tokenizer"],
                    row["way"].replace("_", " "),
                    uri(row["audio"]),
                    [text(row) for _, text in columns],
                    row["heard"],
                )
                for row in entry["rows"]
            ],
        )
        for entry in results["recordings"]
    ]
    about = [
        "; ".join(f"{tokenizer['label']}: {tokenizer['name']}" for tokenizer in results["tokenizers"]),
        "Reconstruction: main decoder, all books. Semantic reconstruction: main decoder, book 0 alone. Resynthesis: "
        "auxiliary decoder, book 0 alone (what the distillation hears).",
        f"bit/s is nominal, without entropy coding. RTF: seconds of encoding and decoding for a second of audio, on "
        f"{results['protocol']['device']}, threads: {results['protocol']['threads']}. "
        + explanation_of(_measured(_all_rows(results))),
    ]
    if not inside:
        about.append("There is too much audio for one page: it plays the WAV files beside it, so keep them together.")
    elif any(recording["duration_s"] > excerpt_s for recording in results["recordings"]):
        about.append(f"The players hold the first {excerpt_s:g} s; the whole lies in the WAV files beside this page.")
    if judge:
        about.append(_cer_explained(results))
    notes = [error["error"] for error in results["errors"]] + remarks(results)
    page = listening_page(
        "Resynthesis",
        recordings,
        [heading for heading, _ in columns],
        about,
        notes,
        judge["name"] if judge else "",
        results["run"]["started"],
    )
    atomic_write_text(folder / PAGE_FILE, page)
    return folder / PAGE_FILE
