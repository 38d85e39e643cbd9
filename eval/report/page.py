"""Results as one self-contained HTML page with plots and players."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from eval.codes import most_frames
from eval.report.answer import answers
from eval.report.columns import columns_of, number_text, per_cent, wer_text
from eval.report.contrasts import COLUMNS, EXPLANATION, blocks
from eval.report.errors import error_tables, worst_utterances
from eval.report.groups import Group, caption_of, groups_of, intervals_of, label_of, lengths_of, skips_in
from eval.report.overview import overview_table
from eval.report.plots import book_use_figure, contrast_figure, rate_figure, svg_of, wer_figure
from eval.report.shared import summaries_once
from eval.report.tables import measure_tables
from eval.report.trainings import DARK, LIGHT, curve_figures, differences_table, trainings_table
from eval.schema import Clip, Results, Row
from eval.systems import system_name, systems_of
from eval.text.normalisers import get_normaliser
from eval.text.wer import aligned_words

__all__ = ["REPORT_FILE", "write_report"]

REPORT_FILE = "report.html"
_MEDIA_TYPES = {".flac": "audio/flac", ".wav": "audio/wav", ".ogg": "audio/ogg", ".mp3": "audio/mpeg"}
RATE_TITLE = "Word error rate against speech tokens per second; the figures stand in the table by frame rate"
CONTRAST_TITLE = "Differences in word error rate with their intervals; the figures stand in the tables below"
_WORST = 10  # utterances listed for each row


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
            (number_text(rate), method, [_pooled(cells[rate, method].get(system, [])) for system in systems])
            for rate, method in sorted(cells, key=lambda key: (-key[0], methods.index(key[1])))
        ],
    }


def _pooled(rows: Sequence[Row]) -> str:
    """The WER of one row with its interval, or of several seeds their mean and each of them."""
    if len(rows) < 2:
        return "".join(map(wer_text, rows))
    if None in (row.wer for row in rows) or len({row.seed for row in rows} - {None}) < len(rows):
        return "; ".join(f"{row.label} {wer_text(row)}" for row in rows)  # not known to differ in seed alone
    each = ", ".join(per_cent(row.wer) for row in sorted(rows, key=lambda row: row.seed))
    return f"{per_cent(sum(row.wer for row in rows) / len(rows))} (seeds: {each})"


def _players(results: Results, folder: Path) -> list[dict[str, Any]]:
    """A line for each system, with its clip of each sample or None; a sound that several cells share once."""
    sides = {cell: side for contrast in results.contrasts[:1] for side in "ab" for cell in getattr(contrast, side)}
    normalisers = _normalisers(results.rows)
    lines: dict[str, dict[str, Any]] = {}
    for place, sample in enumerate(results.samples):
        uris = {id(clip): _audio_uri(folder / clip.audio) for clip in sample.clips}  # an absolute path stays what it is
        same: dict[tuple[str, str], list[Clip]] = {}
        for clip in sample.clips:
            same.setdefault((clip.label, uris[id(clip)]), []).append(clip)
        for (_, uri), some in same.items():
            label, side = _clip_label(some), {sides.get(clip.cell, "") for clip in some}
            empty = {"label": label, "side": side.pop().upper() if len(side) == 1 else ""}
            line = lines.setdefault(label, empty | {"clips": [None] * len(results.samples)})
            heard = {judge: _marked(sample.text, text, normalisers.get(judge)) for judge, text in some[0].heard.items()}
            line["clips"][place] = {"uri": uri, "heard": heard, "text": sample.text or sample.id}
    return list(lines.values())


def _normalisers(rows: Sequence[Row]) -> dict[str, str]:
    """The normaliser that what a judge, or a row of its own text, is called by was scored under."""
    return {str(row.protocol.judge.get("name") or row.label): row.protocol.normaliser for row in rows}


def _marked(reference: str, heard: str, normaliser: str | None) -> list[tuple[str, bool]]:
    """Words of what was heard, (said->heard) where it is wrong, with whether it is; as it came where nothing tells."""
    try:
        rules = get_normaliser(normaliser or "")
    except ValueError:  # of no row, or one that there is no more
        rules = None
    if rules is None or not rules(reference):
        return [(heard, False)] if heard else []
    return aligned_words(rules(reference), rules(heard)) if heard else []


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
        samples=results.samples,
        players=_players(results, folder),
        sides=next(iter(results.contrasts), None),
        made_by=_made_by(results),
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


def _made_by(results: Results) -> list[str]:
    """Commit, machine and training seeds, as far as they are known."""
    found = [f"{name} {results.versions[name]}" for name in ("commit", "machine") if name in results.versions]
    seeds = sorted({row.seed for row in results.rows} - {None})
    return found + ([f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"] if seeds else [])


def _protocol_details(group: Group) -> dict[str, Any]:
    details = {"judge": "none: the system's own transcript"} | group.protocol.record()
    details["interval"] = "; ".join(intervals_of(group))
    generation = {label_of(row, group.rows): row.generation for row in group.rows if row.generation}
    return details | ({"generation": generation} if generation else {})


def _safe(svg: str | None) -> Markup | None:
    """matplotlib escapes the texts inside its SVG; the page must not do so again."""
    return None if svg is None else Markup(svg)
