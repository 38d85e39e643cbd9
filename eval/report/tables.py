"""Tables of what is no error rate: translations, the codes' cost and use, and the audio against the recordings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from eval.codes import CodeStatistics, most_frames
from eval.report.shared import summaries_once
from eval.schema import Results, Row
from eval.speech.measures.registry import Column, columns_of, explanation_of
from eval.speech.quality import QualitySummary
from eval.systems import SYSTEMS
from eval.trainings import Budget, Cost

__all__ = [
    "MeasureTable",
    "budget_table",
    "code_table",
    "cost_table",
    "fitting",
    "measure_tables",
    "quality_table",
    "translation_table",
]


@dataclass(frozen=True)
class MeasureTable:
    """One table as text: ``lines`` have one cell for each of ``headings``; the first ``names`` columns are words.

    ``narrow`` are the columns that a terminal shows, ``below`` lines that it shows beneath, in place of the rest.
    """

    title: str
    note: str
    headings: list[str]
    lines: list[list[str]]
    names: int
    narrow: list[int]
    below: list[str] = field(default_factory=list)


_CODES: list[tuple[str, Callable[[CodeStatistics], str], bool]] = [
    ("tokenizer", lambda c: c.label, True),
    ("codes of", lambda c: c.data, True),
    ("Hz", lambda c: f"{c.frame_rate_hz:g}", True),
    ("bit/s, book 0", lambda c: f"{c.bitrate_semantic_bps:.0f}", False),
    ("bit/s, all books", lambda c: f"{c.bitrate_bps:.0f}", True),
    ("books", lambda c: str(len(c.books)), False),
    ("scored", lambda c: str(c.n_scored), False),
    ("failed", lambda c: str(c.n_failed), False),
    ("frames", lambda c: str(c.n_frames), True),
    ("book 0: entries used", lambda c: f"{c.books[0].used} of {c.books[0].size}", False),
    ("book 0: used %", lambda c: f"{100 * c.books[0].use:.1f}", True),
    ("entropy, bits", lambda c: f"{c.books[0].entropy_bits:.2f}", False),
    ("perplexity", lambda c: f"{c.books[0].perplexity:.0f}", True),
]

_AGAINST_RECORDINGS = (
    "",
    "reconstruction",
    "semantic_reconstruction",
    "acoustic_stage",
    "resynthesis",
)  # "": of older results


def fitting(widths: Sequence[int], width: int) -> list[list[int]]:
    """Positions of columns in groups that fit a terminal, for a table each; a column that is too wide is alone.

    Args:
        widths: of each column's text, to which a table adds three characters.
        width: characters that there are, without those for the columns that stand in every table.
    """
    groups: list[list[int]] = [[]]
    for position, needed in enumerate(widths):
        if groups[-1] and 1 + sum(widths[i] + 3 for i in groups[-1]) + needed + 3 > width:
            groups.append([])
        groups[-1].append(position)
    return groups


def code_table(codes: Sequence[CodeStatistics]) -> MeasureTable:
    """Cost and use of each tokenizer's codes."""
    shown = [column for column in _CODES if column[0] != "codes of" or any(item.data for item in codes)]
    return MeasureTable(
        title="Speech codes",
        note="Nominal bitrate: frame rate times log2 of the book sizes. Use and perplexity are bounded by the number "
        "of frames.",
        headings=[heading for heading, _, _ in shown],
        lines=[[text(item) for _, text, _ in shown] for item in codes],
        names=sum(heading in ("tokenizer", "codes of") for heading, _, _ in shown),
        narrow=[i for i, (_, _, narrow) in enumerate(shown) if narrow],
    )


def quality_table(quality: Sequence[QualitySummary]) -> MeasureTable:
    """The audio's measures, each mean with its interval; a column for every measure that one of the systems has."""
    placed = any(item.test_set for item in quality)
    columns = columns_of(key for item in quality for key in item.values)
    headings = ["system", "model", *(["recordings"] if placed else []), "scored", "failed"]
    first = headings.index("scored")
    lines = []
    places = list(dict.fromkeys(item.test_set for item in quality))
    for item in sorted(quality, key=lambda item: (places.index(item.test_set), _place(item))):
        words = [item.label, item.model, *([item.test_set] if placed else [])]
        values = [_measure(item, column) for column in columns]
        lines.append([*words, str(item.n_scored), str(item.n_failed), *values, "; ".join(item.notes)])
    alone = any(item.system not in _AGAINST_RECORDINGS for item in quality)
    explained = explanation_of(column.key for column in columns)
    judging = [first + 2 + i for i, column in enumerate(columns) if column.better != "none"]
    return MeasureTable(
        title="Audio quality" if alone else "Audio against the recordings",
        note=f"Means over the clips scored [95 %]; failed: no audio to compare, in no mean. {explained}",
        headings=[*headings, *(column.heading for column in columns), "remarks"],
        lines=lines,
        names=first,
        narrow=[0, *([2] if placed else []), first + 1, *judging],
        below=list(dict.fromkeys(note for item in quality for note in item.notes)),
    )


def _place(item: QualitySummary) -> int:
    """Where a kind of system stands among the others; at the end where it is not known."""
    return SYSTEMS.index(item.system) if item.system in SYSTEMS else len(SYSTEMS)


def _measure(item: QualitySummary, column: Column) -> str:
    """A mean, with its interval where the measure judges, and of how many clips it is where not of all."""
    value = item.values.get(column.key)
    if value is None:
        return "n/a"
    text = f"{value:.{column.digits}f}"
    if column.better != "none" and column.key in item.intervals:
        low, high = item.intervals[column.key]
        text += f" [{low:.{column.digits}f}, {high:.{column.digits}f}]"
    measured = item.n_measured.get(column.key, item.n_scored)
    return text if measured == item.n_scored else f"{text} ({measured} clips)"


def translation_table(rows: Sequence[Row]) -> MeasureTable:
    """BLEU and chrF of the rows that have them, each with its interval."""
    lines, signatures = [], []
    for row in rows:
        scores = row.translation
        values = [
            f"{value:.1f} [{low:.1f}, {high:.1f}]"
            for value, (low, high) in ((scores.bleu, scores.bleu_interval), (scores.chrf, scores.chrf_interval))
        ]
        counts = [str(row.n_scored), str(row.n_failed)]
        lines.append([row.label, row.model, row.protocol.test_set.name, row.protocol.normaliser, *counts, *values])
        signatures += [f"BLEU {scores.bleu_signature}", f"chrF {scores.chrf_signature}"]
    return MeasureTable(
        title="Translations",
        note="Over the corpus [95 %], higher is better; texts as the normaliser leaves them, a failed utterance as an "
        f"empty one. By sacrebleu: {'; '.join(dict.fromkeys(signatures))}.",
        headings=["system", "model", "test set", "normaliser", "scored", "failed", "BLEU", "chrF"],
        lines=lines,
        names=4,
        narrow=[0, 5, 6, 7],
    )


_QUANTITIES = {"steps": "steps", "tokens": "tokens", "audio_seconds": "seconds of speech", "flops": "model FLOPs"}


def budget_table(budgets: Sequence[Budget]) -> MeasureTable:
    """What each cell's fine-tuning saw, and how much that is of the reference's: one quantity is equal, others follow.

    Of a cell whose reference is not among ``budgets`` the amounts alone.
    """
    by_cell = {budget.cell: budget for budget in budgets}
    lines = []
    for budget in budgets:
        against = by_cell.get(budget.reference)
        line = [budget.cell]
        for key in _QUANTITIES:
            value = getattr(budget, key)
            text = f"{value:.3g}" if key == "flops" else f"{value:,.0f}"
            share = f" ({value / getattr(against, key):.2f}x)" if against and against != budget else ""
            line.append(text + share if getattr(against, key, 1) else text)
        rate = f"{budget.tokens / budget.audio_seconds:.1f}" if budget.audio_seconds else ""
        lines.append([*line, rate, f"{budget.epochs:.2f}"])
    one = budgets[0]
    return MeasureTable(
        title="Training budgets",
        note=f"The number of steps is chosen so that each cell's fine-tuning sees as many {_QUANTITIES[one.equal]} as "
        f"that of {one.reference} does (fairness: {one.equal}), as near as whole steps come; in brackets the share of "
        "the reference's. Tokens are of text and speech; seconds count a recording each time and in each task; model "
        "FLOPs are 6 a parameter and token, 4 where it is frozen, and attention's.",
        headings=["cell", *_QUANTITIES.values(), "tokens a second", "epochs"],
        lines=lines,
        names=1,
        narrow=[0, 1, 2, 3, 4],
    )


def cost_table(costs: Sequence[Cost]) -> MeasureTable:
    """What each fine-tuning computed and how long it took, and the memory that its speech takes of an LLM that runs."""
    return MeasureTable(
        title="What it cost",
        note="Fine-tuning: model FLOPs (6 a parameter and token, 4 where it is frozen, and attention's) and wall time, "
        "which holds for the machine and what ran beside it. KV cache: keys and values of a second of speech, two "
        "bytes a number.",
        headings=["cell", "stage", "steps", "model FLOPs", "wall time, s", "KV cache, KiB a second"],
        lines=[
            [
                *(cost.cell, cost.stage, f"{cost.steps:,}", f"{cost.flops:.3g}"),
                "" if cost.wall_s is None else f"{cost.wall_s:,.0f}",
                f"{cost.cache_bytes_per_s / 1024:,.1f}",
            ]
            for cost in costs
        ],
        names=2,
        narrow=list(range(6)),
    )


def measure_tables(results: Results, briefly: bool = False) -> list[MeasureTable]:
    """Those of the tables that have a line; ``briefly`` with each tokenizer's largest set of codes alone."""
    translated = [row for row in results.rows if row.translation is not None]
    tables = [translation_table(translated)] if translated else []
    codes = summaries_once(results.codes)
    tables += [code_table(most_frames(codes) if briefly else codes)] if codes else []
    tables += [quality_table(summaries_once(results.quality))] if results.quality else []
    tables += [budget_table(results.budgets)] if results.budgets else []
    return tables + ([cost_table(results.costs)] if results.costs else [])
