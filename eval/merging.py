"""Several evaluations as one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Sequence
from typing import Any

from eval.schema import Contrast, Results, Row, Sample

__all__ = ["merge_results"]


def merge_results(parts: Sequence[Results], title: str) -> Results:
    """Several evaluations as one, for a comparison: rows, codes and clips side by side.

    What two parts share (the ground truth under one protocol, say) is kept once. What has one name and differs (rows
    with other scores, a judge's other reading of a clip, versions, contrasts) is kept from each part, with the part's
    title. Parts whose protocols differ stay in tables of their own.
    """
    merged = Results(title=title, rows=_merged_rows(parts), created=max((p.created for p in parts), default=""))
    samples: dict[tuple[str, str, str], Sample] = {}
    contrasts: dict[str, list[Contrast]] = {}
    for part in parts:
        merged.codes += [c for c in part.codes if c not in merged.codes]
        merged.quality += [q for q in part.quality if q not in merged.quality]
        merged.notes += [note for note in part.notes if note not in merged.notes]
        merged.curves += [curve for curve in part.curves if curve not in merged.curves]
        merged.without |= part.without
        merged.text_lengths += [one for one in part.text_lengths if one not in merged.text_lengths]
        merged.costs += [cost for cost in part.costs if cost not in merged.costs]
        merged.budgets += [budget for budget in part.budgets if budget not in merged.budgets]
        merged.configurations += [one for one in part.configurations if one not in merged.configurations]
        for name in dict.fromkeys(c.name for c in part.contrasts):
            _keep_both(contrasts, name, [c for c in part.contrasts if c.name == name], part.title)
        for name, version in part.versions.items():
            _keep_both(merged.versions, name, version, part.title)
        for sample in part.samples:
            key = (sample.test_set, sample.id, sample.text)
            into = samples.setdefault(key, Sample(sample.id, sample.text, test_set=sample.test_set))
            known = {(clip.cell, clip.label): clip for clip in into.clips}
            for clip in sample.clips:
                if (clip.cell, clip.label) not in known:
                    into.clips.append(dataclasses.replace(clip, heard=dict(clip.heard)))
                    continue
                for judge, heard in clip.heard.items():
                    _keep_both(known[clip.cell, clip.label].heard, judge, heard, part.title)
    merged.contrasts = [dataclasses.replace(c, name=name) for name, found in contrasts.items() for c in found]
    merged.samples = list(samples.values())
    return merged


def _free_name(name: str, taken: Container[str], title: str) -> str:
    """The name, with its part's title where another one has it."""
    numbered = (f"{name} ({title}, {number})" for number in itertools.count(2))
    return next(one for one in itertools.chain((name, f"{name} ({title})"), numbered) if one not in taken)


def _keep_both(into: dict[str, Any], name: str, value: Any, title: str) -> None:
    """Add ``name: value``; where another value has that name, under one that says whose it is."""
    if not any(known == value for own, known in into.items() if own == name or own.startswith(f"{name} (")):
        into[_free_name(name, into, title)] = value


def _merged_rows(parts: Sequence[Results]) -> list[Row]:
    """Rows of one identity once where they have the same texts, else each of them under a name of its own."""
    kept: dict[tuple[object, ...], dict[str, Row]] = {}
    for part in parts:
        copies: list[Row] = []
        here: dict[tuple[str, str], str] = {}  # (protocol, label in the part) -> label now
        for row in part.rows:
            same = kept.setdefault(row.identity(), {})
            found = next((other for other in same.values() if _same_texts(row, other)), None)
            if found is None:
                found = dataclasses.replace(row, name=_free_name(row.name, same, part.title))
                same[found.name] = found
                copies.append(found)
            here[row.protocol.key(), row.label] = found.label
        for row in copies:
            if row.difference is not None:
                against = here.get((row.protocol.key(), row.difference.against), row.difference.against)
                row.difference = dataclasses.replace(row.difference, against=against)
    return [row for same in kept.values() for row in same.values()]


def _same_texts(a: Row, b: Row) -> bool:
    one, other = ({(u.id, u.reference, u.hypothesis) for u in row.utterances} for row in (a, b))
    return one == other and a.wer == b.wer
