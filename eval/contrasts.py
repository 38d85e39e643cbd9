"""Contrasts: two groups of cells, such as the seeds of two methods, compared row by row.

Shapes: T trainings (cells of a group), U utterances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eval.differences import compare_segments, refuse_other_protocol
from eval.schema import Contrast, Row, speakers_of
from eval.stats import pooled_bootstrap, smallest_detectable_difference
from eval.systems import is_task, says_texts, systems_of

__all__ = ["make_contrasts", "seeds_of_one_method"]


Key = tuple[str, str, str]  # system, judge, test set


def make_contrasts(name: str, a: Mapping[str, Sequence[Row]], b: Mapping[str, Sequence[Row]]) -> list[Contrast]:
    """Every kind of row, by every judge and on every test set, that all cells of both groups have; ground truth apart.

    Where the cells say texts by different tasks (``tts`` and ``tts-aligned``), their speech is compared as TTS. What
    one tokenizer makes for both sides is no contrast.

    Args:
        name: what is compared, for the heading; where the cells share several test sets, each has its own heading.
        a: cell -> its rows.
        b: the other group's.

    Raises:
        ValueError: a group is empty, a cell is in both, a cell has two rows of one kind, judge and test set, or the
            cells were scored under different protocols or on other utterances.
    """
    if not a or not b or set(a) & set(b):
        raise ValueError(f"contrast {name!r}: give two groups of cells, none empty, no cell in both")
    tables = {cell: _by_kind(cell, rows) for cell, rows in [*a.items(), *b.items()]}
    tables = _with_one_tts(tables)
    shared = [key for key in next(iter(tables.values())) if all(key in table for table in tables.values())]
    test_sets = list(dict.fromkeys(test_set for _, _, test_set in shared))
    systems = systems_of(system for system, _, _ in shared)
    found = []
    for key in sorted(shared, key=lambda key: (test_sets.index(key[2]), systems.index(key[0]))):
        system, judge, test_set = key
        rows_a, rows_b = ([tables[cell][key] for cell in group] for group in (a, b))
        if _in_common([*rows_a, *rows_b]):
            continue
        ids, words = _utterances(rows_a[0])
        errors_a, errors_b = ([_errors(row, rows_a[0], ids, words) for row in rows] for rows in (rows_a, rows_b))
        protocol, of_methods = rows_a[0].protocol, seeds_of_one_method(rows_a) and seeds_of_one_method(rows_b)
        speakers = speakers_of(protocol, rows_a[0].utterances)
        difference = pooled_bootstrap(
            errors_a,
            errors_b,
            words,
            of_methods=of_methods,
            speakers=speakers,
            samples=protocol.bootstrap_samples,
            seed=protocol.seed,
        )
        found.append(
            Contrast(
                name=f"{name}, {test_set}" if len(test_sets) > 1 else name,
                system=system,
                judge=judge,
                a=list(a),
                b=list(b),
                wers_a=difference.rates_a,
                wers_b=difference.rates_b,
                difference=difference.difference,
                interval=difference.interval,
                p_value=difference.p_value,
                smallest_detectable=smallest_detectable_difference(errors_a, errors_b, words, speakers=speakers),
                n_utterances=len(ids),
                n_words=sum(words),
                bootstrap_samples=protocol.bootstrap_samples,
                seed=protocol.seed,
                of_methods=of_methods,
                resampled=protocol.resampled,
                mapsswe_p=compare_segments(rows_a[0], rows_b[0]).p_value if len(a) == len(b) == 1 else None,
            )
        )
    return found


def seeds_of_one_method(rows: Sequence[Row]) -> bool:
    """Whether rows differ in their seed alone, and there are two or more: they tell how much a seed matters."""
    seeds = [row.seed for row in rows]
    one = len({(row.method, row.frame_rate_hz) for row in rows}) == 1
    return one and None not in seeds and len(set(seeds)) == len(seeds) >= 2


def _by_kind(cell: str, rows: Sequence[Row]) -> dict[Key, Row]:
    table: dict[Key, Row] = {}
    for row in rows:
        if row.system == "ground_truth":
            continue
        key = (row.system, str(row.protocol.judge.get("name", "")), row.protocol.test_set.name)
        if key in table:
            raise ValueError(
                f"cell {cell} has two rows of kind {row.system} ({table[key].name!r}, {row.name!r}) by one judge on "
                f"{key[2]}: a contrast needs one; evaluate one tokenizer and one SLM in each cell, and give test sets "
                "names of their own"
            )
        table[key] = row
    return table


def _with_one_tts(tables: dict[str, dict[Key, Row]]) -> dict[str, dict[Key, Row]]:
    """The tables, each cell's only task that says texts called ``tts`` where it has another name in another cell."""
    tasks = {cell: {key[0] for key in table if says_texts(key[0])} for cell, table in tables.items()}
    if any(len(names) != 1 for names in tasks.values()) or len(set().union(*tasks.values())) == 1:
        return tables
    return {
        cell: {("tts" if says_texts(key[0]) else key[0], *key[1:]): row for key, row in table.items()}
        for cell, table in tables.items()
    }


def _in_common(rows: Sequence[Row]) -> bool:
    """Whether all rows are what one tokenizer makes of the same recordings."""
    if is_task(rows[0].system) or not rows[0].model:
        return False
    return len({(row.model, row.frame_rate_hz, tuple(u.hypothesis for u in row.utterances)) for row in rows}) == 1


def _utterances(row: Row) -> tuple[list[str], list[int]]:
    return [u.id for u in row.utterances], [u.n_words for u in row.utterances]


def _errors(row: Row, first: Row, ids: Sequence[str], words: Sequence[int]) -> list[int]:
    """Word errors (U,) in the order of ``ids``. Raises ValueError where the row was scored on something else."""
    refuse_other_protocol(row, first)
    by_id = {u.id: u for u in row.utterances}
    if set(by_id) != set(ids) or [by_id[i].n_words for i in ids] != list(words):
        raise ValueError(f"rows {row.label!r} and {first.label!r} were not scored on the same utterances")
    return [by_id[i].errors for i in ids]
