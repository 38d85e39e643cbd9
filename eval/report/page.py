"""Results for people: a table for the terminal, and one self-contained HTML page with plots and players."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.codes import most_frames
from eval.protocol import Protocol
from eval.report.answer import answers
from eval.report.contrasts import COLUMNS, EXPLANATION, blocks, p_text
from eval.report.errors import error_tables, worst_utterances
from eval.report.lengths import length_table
from eval.report.overview import overview_table
from eval.report.plots import book_use_figure, contrast_figure, rate_figure, svg_of, wer_figure
from eval.report.shared import rows_once, shared_notes, summaries_once
from eval.report.skips import skip_table
from eval.report.tables import MeasureTable, fitting, measure_tables
from eval.report.trainings import DARK, LIGHT, curve_figures, differences_table, trainings_table
from eval.schema import Clip, Results, Row, Sample, is_task, system_name, systems_of
from eval.stats import FEW
from eval.text.wer import OFFICIAL

__all__ = [
    "DIFFERENCE",
    "NARROW_COLUMNS",
    "REPORT_FILE",
    "Group",
    "caption_of",
    "columns_of",
    "format_measures",
    "format_table",
    "groups_of",
    "label_of",
    "lengths_of",
    "skips_in",
    "write_report",
]

REPORT_FILE = "report.html"
_MEDIA_TYPES = {".flac": "audio/flac", ".wav": "audio/wav", ".ogg": "audio/ogg", ".mp3": "audio/mpeg"}
DIFFERENCE = "\u0394 WER"
CER = "CER % [95 %]"
OFFICIAL_WER = "official WER %"
RATE_TITLE = "Word error rate against speech tokens per second; the figures stand in the table by frame rate"
CONTRAST_TITLE = "Differences in word error rate with their intervals; the figures stand in the tables below"
_WORST = 10  # utterances listed for each row


@dataclass
class Group:
    """Rows of one protocol; ``beside`` are rows of another protocol on the same test set, shown for orientation.

    ``rows`` hold what a tokenizer makes once where several cells have it, as ``notes`` say; ``each`` are every cell's.
    """

    protocol: Protocol
    rows: list[Row]
    beside: list[Row] = field(default_factory=list)
    each: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def heading(self) -> str:
        if self.protocol.task == "asr":
            ours = all(is_task(row.system) for row in self.rows)
            return "Speech recognition by the SLM" if ours else "Transcripts"
        if self.protocol.task != "speech":
            return f"What {system_name(self.protocol.task)} writes"
        return f"Speech as judge {self.protocol.judge.get('name', '?')} reads it"


def _ordered(rows: Sequence[Row]) -> list[Row]:
    systems = systems_of(row.system for row in rows)

    def place(row: Row) -> tuple[Any, ...]:
        rate = row.system != "ground_truth" and -(row.frame_rate_hz or 0)
        return (systems.index(row.system), rate, row.label, row.model)

    return sorted(rows, key=place)


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """One group for each protocol, judges before the SLM's own texts, those by task, in order of first appearance."""
    by_key: dict[str, Group] = {}
    for row in rows:
        by_key.setdefault(row.protocol.key(), Group(row.protocol, [])).rows.append(row)
    tasks = ["speech", *systems_of({group.protocol.task for group in by_key.values()} - {"speech"})]
    groups = sorted(by_key.values(), key=lambda group: tasks.index(group.protocol.task))
    for group in groups:
        group.each = _ordered(group.rows)
        group.rows, group.notes = _ordered(rows_once(group.each)), shared_notes(group.each)
        if group.protocol.task != "speech":
            # What a judge hears in the recordings and in the codes is where the SLM's own loss begins.
            same = [g for g in groups if g.protocol.task == "speech" and _same_test(g.protocol, group.protocol)]
            group.beside = [row for row in same[0].rows if not is_task(row.system)] if same else []
    return groups


def _same_test(a: Protocol, b: Protocol) -> bool:
    one, other = a.comparable_by(), b.comparable_by()
    return all(one[key] == other[key] for key in ("normaliser", "normaliser version", "aggregation", "test set"))


def _per_cent(value: float | None, digits: int = 1) -> str:
    return "n/a" if value is None else f"{100 * value:.{digits}f}"


def _with_interval(rate: float | None, interval: tuple[float, float] | None) -> str:
    between = "" if interval is None else f" [{_per_cent(interval[0])}, {_per_cent(interval[1])}]"
    return _per_cent(rate) + between


def wer_text(row: Row) -> str:
    return _with_interval(row.wer, row.interval)


def cer_text(row: Row) -> str:
    return _with_interval(row.cer, row.cer_interval)


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"


def difference_text(row: Row) -> str:
    if row.difference is None:
        return ""
    low, high = (f"{100 * edge:+.1f}" for edge in row.difference.interval)
    return f"{100 * row.difference.wer:+.1f} [{low}, {high}]"


def mapsswe_text(row: Row) -> str:
    return "" if row.difference is None else p_text(row.difference.mapsswe_p)


def _if_known(value: float | None) -> str:
    return "" if value is None else _per_cent(value)


def _speed(row: Row, digits: int) -> str:
    """The real-time factor; one without the tokenizer's part says so."""
    if row.real_time_factor is None:
        return ""
    return f"{row.real_time_factor:.{digits}g}" + (f" ({row.timed})" if row.timed.endswith(" only") else "")


def _part(seconds: float | None, row: Row) -> str:
    """One part of the real-time factor."""
    return "" if seconds is None or not row.audio_s else f"{seconds / row.audio_s:.3g}"


# Heading, text of a row, whether it is a number. A column that is empty in every row is left out.
_COLUMNS: list[tuple[str, Callable[[Row], str], bool]] = [
    ("WER % [95 %]", wer_text, True),
    (DIFFERENCE, difference_text, True),
    ("p, MAPSSWE", mapsswe_text, True),
    (OFFICIAL_WER, lambda row: _if_known(row.official_wer), True),
    ("mean of utterances %", lambda row: _if_known(row.mean_wer), True),
    ("above 50 %", lambda row: _if_known(row.above_half), True),
    (CER, cer_text, True),
    ("S", lambda row: str(row.substitutions), True),
    ("D", lambda row: str(row.deletions), True),
    ("I", lambda row: str(row.insertions), True),
    ("N", lambda row: str(row.n_words), True),
    ("model", lambda row: row.model, False),
    ("scored", lambda row: str(row.n_scored), True),
    ("failed", lambda row: str(row.n_failed), True),
    ("cut off", lambda row: "" if row.n_truncated is None else str(row.n_truncated), True),
    ("tokens/s", lambda row: _number(row.tokens_per_second), True),
    ("bit/s", lambda row: _number(row.bitrate_bps, 0), True),
    ("RTF", lambda row: _speed(row, 3), True),
    ("encode", lambda row: _part(row.encode_s, row), True),
    ("generate", lambda row: _part(row.generate_s, row), True),
    ("decode", lambda row: _part(row.decode_s, row), True),
]
# A terminal is narrow: the counts in one column, names folded, and what still does not fit is in the report alone.
NARROW_COLUMNS: list[tuple[str, Callable[[Row], str], bool]] = [
    ("WER % [95 %]", wer_text, True),
    (DIFFERENCE, difference_text, True),
    (OFFICIAL_WER, lambda row: _if_known(row.official_wer), True),
    (CER, cer_text, True),
    ("S+D+I/N", lambda row: f"{row.substitutions}+{row.deletions}+{row.insertions}/{row.n_words}", True),
    ("failed", lambda row: f"{row.n_failed}/{row.n_scored + row.n_failed}", True),
    ("cut off", lambda row: "" if row.n_truncated is None else str(row.n_truncated), True),
    ("tokens/s", lambda row: _number(row.tokens_per_second), True),
    ("RTF", lambda row: _speed(row, 2), True),
]
_LEFT_OUT_FIRST = ("RTF", "S+D+I/N", CER, "tokens/s")
_NAME_WIDTH = 24  # a longer name is folded before a column is left out


def columns_of(
    group: Group, columns: Sequence[tuple[str, Callable[[Row], str], bool]] = tuple(_COLUMNS)
) -> list[tuple[str, Callable[[Row], str], bool]]:
    rows = {heading: [*group.rows, *group.beside] for heading, _, _ in columns}
    for heading in (DIFFERENCE, "p, MAPSSWE"):
        rows[heading] = group.rows  # the others' differences belong to their own table
    return [(heading, text, number) for heading, text, number in columns if any(map(text, rows[heading]))]


def format_table(results: Results, width: int = 110) -> str:
    """The tables as plain text for a terminal of ``width`` columns: one for each task and judge."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    for group in groups_of(results.rows):
        console.print(Text(caption_of(group)))  # as a table's title it would be folded to the table's width
        truth = [row for row in group.beside if row.system == "ground_truth"]
        shown = Group(group.protocol, group.rows, truth)
        # The others' differences belong to their own table.
        lines = [(label_of(row, group.rows), row, True) for row in group.rows]
        lines += [(f"{row.protocol.judge.get('name', '?')} on {row.label}", row, False) for row in truth]
        columns = {
            heading: [text(row) if own or heading != DIFFERENCE else "" for _, row, own in lines]
            for heading, text, _ in columns_of(shown, NARROW_COLUMNS)
        }
        names = [label for label, _, _ in lines]
        for heading in _LEFT_OUT_FIRST:
            if _natural_width(names, columns) > width:
                columns.pop(heading, None)
        table = Table(box=SIMPLE_HEAD)
        table.add_column("system", overflow="fold")
        for heading in columns:
            table.add_column(heading, justify="right", no_wrap=True)
        for number, name in enumerate(names):
            cells = (Text(texts[number]) for texts in columns.values())
            table.add_row(Text(name), *cells, end_section=number == len(group.rows) - 1)
        console.print(table)
        for note in group.notes:
            console.print(Text(note))
        against: dict[str, list[str]] = {}
        for name, row, own in lines:
            if own and row.difference:
                against.setdefault(row.difference.against, []).append(name)
        for other, of in against.items():
            console.print(Text(f"{DIFFERENCE} against {other}" + (f": {', '.join(of)}" if len(against) > 1 else "")))
        if against:
            console.print()
        for more in (lengths_of(group, results), skips_in(group)):
            if more is not None:
                _print_table(console, more, width)
    overview = overview_table(results)
    for measures in [*measure_tables(results, briefly=True), *([overview] if overview else [])]:
        _print_table(console, measures, width)
    for block in blocks(results.contrasts, each=False):
        console.print(Text(f"{block['name']} (a: {block['a']}; b: {block['b']}): {block['scope']}"))
        table = Table(box=SIMPLE_HEAD)
        narrow = ("p", "p, MAPSSWE", "smallest detectable")  # left out: a terminal has no room for them
        shown = [i for i, heading in enumerate(COLUMNS) if heading not in narrow]
        for heading in (COLUMNS[i] for i in shown):
            narrowest = {"row": 14}.get(heading)
            whole = "points" in heading or heading == "reading"
            table.add_column(heading, min_width=narrowest, no_wrap=whole, overflow="fold")
        for line in block["lines"]:
            table.add_row(*(Text(line[i]) for i in shown))
        console.print(table)
    for answer in answers(results):
        console.print(Text(answer))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def format_measures(tables: Sequence[MeasureTable], width: int = 110) -> str:
    """Tables of measures as plain text for a terminal of ``width`` columns."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    for table in tables:
        _print_table(console, table, width)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _print_table(console: Console, measures: MeasureTable, width: int) -> None:
    """One table for a terminal, in as many parts as its width asks for."""
    console.print(Text(f"{measures.title}. {measures.note}"))
    for columns in _fitting(measures, width):
        table = Table(box=SIMPLE_HEAD)
        for i in columns:
            words = i < measures.names
            table.add_column(
                measures.headings[i], justify="left" if words else "right", overflow="fold", no_wrap=not words
            )
        for line in measures.lines:
            table.add_row(*(Text(line[i]) for i in columns))
        console.print(table)


def _fitting(table: MeasureTable, width: int) -> list[list[int]]:
    """The columns that a terminal shows, in as many tables as its width asks for, each with the columns of words."""
    words = [i for i in table.narrow if i < table.names]
    numbers = [i for i in table.narrow if i >= table.names]
    needs = {i: max(len(line[i]) for line in [table.headings, *table.lines]) for i in table.narrow}
    taken = sum(min(_NAME_WIDTH, needs[i]) + 3 for i in words)  # a longer name is folded
    return [[*words, *(numbers[i] for i in group)] for group in fitting([needs[i] for i in numbers], width - taken)]


def _natural_width(names: Sequence[str], columns: dict[str, list[str]]) -> int:
    """Characters that a terminal table needs: two beside each column's text, one between columns and at either end."""
    widths = [max(map(len, [heading, *texts])) for heading, texts in columns.items()]
    return 1 + sum(width + 3 for width in [min(_NAME_WIDTH, max(map(len, names))), *widths])


def caption_of(group: Group) -> str:
    protocol = group.protocol
    names = dict.fromkeys(row.protocol.name for row in group.rows if row.protocol.name)
    named = f"protocol {' or '.join(names)}, " if names else ""
    against = ", against the judge's own transcript of the recordings" if protocol.reference == "judge" else ""
    official = f"; official: {OFFICIAL[protocol.official]}" if protocol.official in OFFICIAL else ""
    return (
        f"{group.heading} ({named}{protocol.test_set.name}, {protocol.test_set.n} utterances{against}, "
        f"normaliser {protocol.normaliser} {protocol.normaliser_version}; {' or '.join(_intervals(group))}{official})"
    )


def _intervals(group: Group) -> list[str]:
    """How the rows' intervals came about: rows may be compared whose intervals were drawn in other ways."""
    found = list(dict.fromkeys(row.protocol.interval_text() for row in group.rows))
    few = any(row.interval_by == "wilson" for row in group.rows)
    widened = f", widened to Wilson's over words where fewer than {FEW} utterances have errors or all words are wrong"
    return [text + widened * few for text in found]


def _frame_rate_table(group: Group) -> dict[str, Any] | None:
    """WER of each system at each frame rate and by each method, where there are several rates."""
    cells: dict[tuple[float, str], dict[str, list[Row]]] = {}
    for row in group.each:
        if row.frame_rate_hz is not None:
            at = cells.setdefault((row.frame_rate_hz, row.method), {})
            at.setdefault(row.system, []).append(row)
    if len({rate for rate, _ in cells}) < 2:
        return None
    systems = systems_of(system for by_system in cells.values() for system in by_system)
    methods = list(dict.fromkeys(method for _, method in cells))
    return {
        "systems": [system_name(system) for system in systems],
        "methods": methods != [""],
        "lines": [
            (_number(rate), method, [_pooled(cells[rate, method].get(system, [])) for system in systems])
            for rate, method in sorted(cells, key=lambda key: (-key[0], methods.index(key[1])))
        ],
    }


def _pooled(rows: Sequence[Row]) -> str:
    """The WER of one row with its interval, or of several seeds their mean and each of them."""
    if len(rows) < 2:
        return "".join(map(wer_text, rows))
    if None in (row.wer for row in rows) or len({row.seed for row in rows} - {None}) < len(rows):
        return "; ".join(f"{row.label} {wer_text(row)}" for row in rows)  # not known to differ in seed alone
    each = ", ".join(_per_cent(row.wer) for row in sorted(rows, key=lambda row: row.seed))
    return f"{_per_cent(sum(row.wer for row in rows) / len(rows))} (seeds: {each})"


def label_of(row: Row, rows: Sequence[Row]) -> str:
    """A row's label, with its model where another row has the same label."""
    return f"{row.label}, {row.model}" if sum(other.label == row.label for other in rows) > 1 else row.label


def lengths_of(group: Group, results: Results) -> MeasureTable | None:
    """A group's error rates by length of text, where the results name lengths."""
    return length_table(group.rows, [label_of(row, group.rows) for row in group.rows], results.text_lengths)


def skips_in(group: Group) -> MeasureTable | None:
    """What went wrong in a group's speech, where something was spoken from text."""
    return skip_table(group.rows, [label_of(row, group.rows) for row in group.rows])


def _players(samples: Sequence[Sample], folder: Path) -> list[dict[str, Any]]:
    """Samples with their audio inlined as data URIs; a sound that several cells have in common once."""
    shown = []
    for sample in samples:
        uris = {id(clip): _audio_uri(folder / clip.audio) for clip in sample.clips}  # an absolute path stays what it is
        same: dict[tuple[str, str], list[Clip]] = {}
        for clip in sample.clips:
            same.setdefault((clip.label, uris[id(clip)]), []).append(clip)
        clips = [{"label": _clip_label(some), "heard": some[0].heard, "uri": uri} for (_, uri), some in same.items()]
        shown.append({"id": sample.id, "text": sample.text, "clips": clips})
    return shown


def _audio_uri(path: Path) -> str:
    media_type = _MEDIA_TYPES.get(path.suffix.lower())
    if media_type is None:
        raise ValueError(f"{path}: browsers play {', '.join(_MEDIA_TYPES)}; write the clip as one of these")
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _clip_label(clips: Sequence[Clip]) -> str:
    """``CELL: label``; of several cells the first, and how many more."""
    first, more = clips[0], len(clips) - 1
    cell = f"{first.cell} and {more} more" if more else first.cell
    return f"{cell}: {first.label}" if first.cell else first.label


def _lines(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as dotted key and value, for the protocol's details."""
    if isinstance(value, dict):
        return [
            line for key, inner in value.items() for line in _lines(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, str(value))]


def write_report(results: Results, folder: Path | str) -> Path:
    """Write ``report.html``: one file with everything in it, no outside resource, all text escaped.

    Args:
        results: what to show; relative clip paths are looked up in ``folder``.
        folder: where the page goes.

    Raises:
        FileNotFoundError: a sample's audio file is missing.
        ValueError: a sample's audio is of a kind that browsers do not play.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups = []
    for number, group in enumerate(groups_of(results.rows)):
        labels = [label_of(row, group.rows) for row in group.rows]
        columns = columns_of(group)
        groups.append(
            {
                "group": group,
                "columns": columns,
                "caption": caption_of(group),
                "frame_rates": _frame_rate_table(group),
                "lengths": lengths_of(group, results),
                "skips": skips_in(group),
                "bars": _safe(wer_figure(group.rows, labels, f"wer{number}")),
                "curve": _safe(svg_of(rate_figure(group.each), f"rate{number}", RATE_TITLE)),
                "worst": [
                    (label, worst_utterances(row.utterances, _WORST), error_tables(row))
                    for label, row in zip(labels, group.rows, strict=True)
                ],
                "protocol": _lines(_protocol_details(group)),
            }
        )
    page = environment.get_template("report.html.j2").render(
        results=results,
        groups=groups,
        test_sets=list({group["group"].protocol.test_set: None for group in groups}),
        judges=list(dict.fromkeys(g["group"].protocol.judge["name"] for g in groups if g["group"].protocol.judge)),
        book_use=_safe(book_use_figure(most_frames(summaries_once(results.codes)), "books")),
        answers=answers(results),
        overview=overview_table(results),
        contrasts=blocks(results.contrasts),
        contrast_columns=COLUMNS,
        contrast_note=EXPLANATION,
        contrast_plot=_safe(svg_of(contrast_figure(results.contrasts), "contrasts", CONTRAST_TITLE)),
        samples=_players(results.samples, folder),
        measures=measure_tables(results),
        curves=[(caption, _safe(svg)) for caption, svg in curve_figures(results.curves)],
        curve_colours={"light": LIGHT, "dark": DARK},
        trainings=trainings_table(results.curves),
        differences=differences_table(results.configurations),
    )
    target = folder / REPORT_FILE
    temporary = target.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, target)
    return target


def _protocol_details(group: Group) -> dict[str, Any]:
    details = {"judge": "none: the system's own transcript"} | group.protocol.record()
    details["interval"] = "; ".join(_intervals(group))
    generation = {label_of(row, group.rows): row.generation for row in group.rows if row.generation}
    return details | ({"generation": generation} if generation else {})


def _safe(svg: str | None) -> Markup | None:
    """matplotlib escapes the texts inside its SVG; the page must not do so again."""
    return None if svg is None else Markup(svg)
