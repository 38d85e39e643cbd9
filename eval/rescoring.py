"""Scores from texts that results hold already: under another normaliser, or under a changed one of the same name."""

from __future__ import annotations

from dataclasses import fields, replace

from eval.differences import difference_of
from eval.schema import Results, Row, make_row, speakers_of
from eval.text.normalisers import Normaliser, get_normaliser
from eval.text.translation import can_score_translations, score_translations
from eval.text.wer import ErrorRates, score_pairs

__all__ = ["outdated", "rescored", "up_to_date"]

# What `make_row` finds anew; every other field of a row stays.
_FOUND = {"wer", "cer", "interval", "cer_interval", "substitutions", "deletions", "insertions", "n_words", "n_scored"}
_FOUND |= {"n_failed", "utterances", "mean_wer", "above_half", "official_wer", "interval_by", "difference"}
_FOUND |= {"translation", "skips"}
_GIVEN = {"name", "system", "model", "protocol"}


def rescored(results: Results, normaliser: Normaliser) -> Results:
    """The same answers scored under another normaliser; no audio is read.

    Rows' differences are drawn anew. Contrasts are left out, since they are made from the cells of a comparison; a note
    says so.

    Raises:
        ValueError: an older version wrote the results, and kept the normalised texts alone.
    """
    rows = [_rescored_row(row, normaliser) for row in results.rows]
    for before, row in zip(results.rows, rows, strict=True):
        if before.difference is not None:
            key, against = before.protocol.key(), before.difference.against
            same = [i for i, other in enumerate(results.rows) if other.protocol.key() == key]
            place = next((i for i in same if against in (results.rows[i].label, results.rows[i].name)), None)
            if place is not None:
                row.difference = replace(difference_of(row, rows[place]), against=against)
    # What a protocol's note says of its normaliser holds no more for rows that have lost its name.
    gone = {before.protocol.name for before, row in zip(results.rows, rows, strict=True) if not row.protocol.name} - {
        ""
    }
    notes = [note for note in results.notes if not any(note.startswith(f"protocol {name}:") for name in gone)]
    found = replace(results, rows=rows, notes=notes)
    if results.contrasts:
        found.contrasts = []
        found.notes.append("contrasts are not drawn anew from stored texts: run `slm compare` again for them")
    return found


def _rescored_row(row: Row, normaliser: Normaliser) -> Row:
    if any(u.reference_text is None for u in row.utterances):
        raise ValueError(
            f"row {row.label!r} keeps its texts as they were normalised by {row.protocol.normaliser} "
            f"{row.protocol.normaliser_version}, as versions before this one wrote them: run `slm evaluate` again "
            "(--restart); what its judges heard is kept, so no audio is read twice"
        )
    rates: ErrorRates = score_pairs(
        [u.reference_text or "" for u in row.utterances],
        [u.hypothesis_text for u in row.utterances],
        normaliser,
        [u.id for u in row.utterances],
        [u.speaker for u in row.utterances],
        [u.duration for u in row.utterances],
        row.protocol.alignment,
    )
    protocol = replace(row.protocol, normaliser=normaliser.name, normaliser_version=normaliser.version)
    if normaliser.name != row.protocol.normaliser:
        protocol = replace(protocol, name="", official="")  # a protocol by name has its own normaliser
    facts = {f.name: getattr(row, f.name) for f in fields(Row) if f.name not in _FOUND | _GIVEN}
    if row.translation is not None and can_score_translations():
        drawn = (speakers_of(protocol, rates.utterances), protocol.bootstrap_samples, protocol.seed)
        facts["translation"] = score_translations(rates.utterances, *drawn)
    return make_row(row.name, row.system, row.model, protocol, rates, **facts)


def outdated(results: Results) -> list[str]:
    """Normalisers whose rules have changed since, as ``basic 2, now 3``."""
    found = dict.fromkeys((row.protocol.normaliser, row.protocol.normaliser_version) for row in results.rows)
    now = {name: _version(name) for name, _ in found}
    return [f"{name} {version}, now {now[name]}" for name, version in found if now[name] not in (version, None)]


def _version(name: str) -> str | None:
    """None for a normaliser that there is no more."""
    try:
        return get_normaliser(name).version
    except ValueError:
        return None


def up_to_date(results: Results) -> Results:
    """The results, scored again from the stored texts where their normaliser has changed since; else as they are.

    Raises:
        ValueError: they are outdated and cannot be scored again (:func:`rescored`).
    """
    if not outdated(results):
        return results
    by_name: dict[str, Results] = {}
    for name in dict.fromkeys(row.protocol.normaliser for row in results.rows):
        own = replace(results, rows=[row for row in results.rows if row.protocol.normaliser == name])
        by_name[name] = rescored(own, get_normaliser(name)) if outdated(own) else own
    notes = list(dict.fromkeys(note for part in by_name.values() for note in part.notes))
    rows = [by_name[row.protocol.normaliser].rows.pop(0) for row in results.rows]
    return replace(results, rows=rows, notes=notes, contrasts=[])
