"""A comparison at a glance: a line for each method, with the scores of all its tasks, and why one is missing."""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence

from eval.report.tables import MeasureTable
from eval.schema import Results, Row
from eval.systems import TASK_PREFIX, is_task, says_texts, system_name
from eval.trainings import group_names

__all__ = ["overview_table"]

DASH = "\u2013"
NOT_ASKED = "it was not asked"


def overview_table(results: Results) -> MeasureTable | None:
    """Each method's scores, of several seeds the mean and each; None where there are no two methods or no SLM.

    Columns are the tasks that a model writes the answer of, what each judge hears of the speech of tasks that say a
    text, and of semantic reconstruction. A dash has its reason in the note.
    """
    cells: dict[str, list[Row]] = {}
    for row in results.rows:
        if row.cell:
            cells.setdefault(row.cell, []).append(row)
    groups: dict[str, list[str]] = {}
    for cell, name in _names(cells).items():
        groups.setdefault(name, []).append(cell)
    columns = _columns([row for rows in cells.values() for row in rows])
    if len(groups) < 2 or not any(is_task(row.system) for rows in cells.values() for row in rows):
        return None
    letters = itertools.chain(string.ascii_lowercase, map(str, itertools.count(1)))
    reasons: dict[str, str] = {}  # reason -> its letter
    lines = []
    for name, members in groups.items():
        line = [name]
        for key in columns:
            rows = [row for cell in members for row in cells[cell] if _key(row) == key]
            if rows:
                line.append(_scores(rows))
                continue
            reason = next((r for c in members if (r := results.without.get(c, {}).get(_kind(key[0])))), NOT_ASKED)
            if reason not in reasons:
                reasons[reason] = next(letters)
            line.append(f"{DASH} ({reasons[reason]})")
        lines.append(line)
    why = "; ".join(f"({letter}) {reason}" for reason, letter in reasons.items())
    return MeasureTable(
        title="Overview",
        note="WER %, lower is better, except BLEU, higher is better; of several seeds the mean and each, of one its "
        "95 % interval. The tables below say more. What is no contrast is no verdict."
        + (f" {DASH} no score: {why}." if why else ""),
        headings=["system", *(_heading(key, columns) for key in columns)],
        lines=lines,
        names=1,
        narrow=list(range(1 + len(columns))),
    )


def _names(cells: dict[str, list[Row]]) -> dict[str, str]:
    """Cell -> name of its method."""
    about = []
    for cell, rows in cells.items():
        rates = {row.frame_rate_hz for row in rows} - {None}
        about.append((cell, rows[0].method, rates.pop() if len(rates) == 1 else None, rows[0].seed))
    return group_names(about)


Key = tuple[str, str, str]  # kind of system, judge, test set


def _key(row: Row) -> Key | None:
    """The column of a row; None of what has none, such as reconstruction from all books."""
    judge = str(row.protocol.judge.get("name", ""))
    if not is_task(row.system) and row.system != "semantic_reconstruction":
        return None
    return ("tts" if says_texts(row.system) else row.system, judge, row.protocol.test_set.name)


def _kind(system: str) -> str:
    """A kind of system as `without` calls it: a task by its name."""
    return system.removeprefix(TASK_PREFIX)


def _columns(rows: Sequence[Row]) -> list[Key]:
    """ASR, TTS by each judge, semantic reconstruction by each judge, further tasks."""
    keys = dict.fromkeys(key for row in rows if (key := _key(row)) is not None)
    order = ("asr", "tts", "semantic_reconstruction")
    return sorted(keys, key=lambda key: order.index(key[0]) if key[0] in order else len(order))


def _heading(key: Key, columns: Sequence[Key]) -> str:
    """The test set stands there where one column would have the name of another."""
    system, judge, test_set = key
    name = {"asr": "ASR", "tts": "TTS"}.get(system) or system_name(system)
    several = sum(other[:2] == key[:2] for other in columns) > 1
    return ", ".join([name, *([judge] if judge else []), *([test_set] if several else [])])


def _scores(rows: Sequence[Row]) -> str:
    """One score with its interval, or the mean of several with each."""
    values = [_score(row) for row in rows]
    known = [value for value in values if value is not None]
    unit = "BLEU " if all(row.translation is not None for row in rows) else ""
    if len(known) < len(values):
        return "n/a"
    if len(known) > 1:
        each = ", ".join(f"{value:.1f}" for value in known)
        return f"{unit}{sum(known) / len(known):.1f} ({each})"
    interval = rows[0].translation.bleu_interval if unit else _per_cent(rows[0].interval)
    between = "" if interval is None else f" [{interval[0]:.1f}, {interval[1]:.1f}]"
    return f"{unit}{known[0]:.1f}{between}"


def _score(row: Row) -> float | None:
    """BLEU of a translation, else WER in per cent."""
    if row.translation is not None:
        return row.translation.bleu
    return None if row.wer is None else 100 * row.wer


def _per_cent(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if interval is None else (100 * interval[0], 100 * interval[1])
