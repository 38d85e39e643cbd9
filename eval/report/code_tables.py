"""Tables of what was measured of codes."""

from __future__ import annotations

from typing import Any

from eval.codes.measures import CodeMeasures
from eval.report.tables import MeasureTable

__all__ = ["code_measure_tables"]


def code_measure_tables(measures: CodeMeasures) -> list[MeasureTable]:
    """A table of the books, of the changes and of the probe, as far as each was measured."""
    tables = [_books(measures)] if any((measures.use, measures.language_model, measures.characters)) else []
    tables += [_robustness(measures.robustness)] if measures.robustness else []
    return tables + ([_probe(measures.probe)] if measures.probe else [])


def _books(measures: CodeMeasures) -> MeasureTable:
    columns: dict[str, list[str]] = {"book": [str(number) for number in range(len(measures.codebook_sizes))]}
    columns["entries"] = [str(size) for size in measures.codebook_sizes]
    notes = [f"{measures.tokenizer}, {measures.frame_rate_hz:g} Hz."]
    if use := measures.use:
        books = use["books"]
        columns["used %"] = [f"{100 * book['use']:.1f}" for book in books]
        columns["entropy, bits"] = [f"{book['entropy_bits']:.2f}" for book in books]
        columns["perplexity"] = [f"{book['perplexity']:.0f}" for book in books]
        columns["bit/s"] = [f"{book['nominal_bps']:.0f}" for book in books]
        columns["bit/s by entropy"] = [f"{book['entropy_bps']:.0f}" for book in books]
        notes.append(
            f"Use and entropy: {use['data']}, {use['n_frames']} frames; all books {use['nominal_bps']:.0f} bit/s, by "
            f"entropy {use['entropy_bps']:.0f}."
        )
    if model := measures.language_model:
        for order in model["books"][0]["perplexity"]:
            columns[f"{order}-gram ppl"] = [_number(book["perplexity"].get(order), 1) for book in model["books"]]
        notes.append(
            f"n-gram perplexity: {model['n_held_out_frames']} frames that the model of {model['n_train_frames']} has "
            "not seen."
        )
    if characters := measures.characters:
        columns["MI, bits"] = [f"{book['mutual_bits']:.3f}" for book in characters["books"]]
        columns["by chance"] = [f"{book['chance_bits']:.3f}" for book in characters["books"]]
        columns["share, adjusted"] = [_number(book["adjusted_share"], 3) for book in characters["books"]]
        notes.append(
            f"MI with the character of a frame ({characters['n_frames']} frames, aligned {characters['aligned']}); "
            "share of the characters' entropy, adjusted for chance."
        )
        if (ratio := characters["acoustic_to_semantic"]) is not None:
            notes.append(f"Acoustic-to-semantic ratio of the shares: {ratio:.3f}.")
    return _table("Codes by book", " ".join(notes), columns)


def _robustness(found: dict[str, Any]) -> MeasureTable:
    changes = found["changes"]
    columns: dict[str, list[str]] = {"what was changed": [item["change"] for item in changes]}
    for book in range(len(changes[0]["by_book"])):
        columns[f"book {book}"] = [f"{100 * item['by_book'][book]:.1f}" for item in changes]
    note = f"% of frames with the same code; {found['n_scored']} recordings, {changes[0]['n_frames']} frames."
    return _table("Codes after a change", note, columns)


def _probe(found: dict[str, Any]) -> MeasureTable:
    interval = found["wer_interval"]
    between = "" if interval is None else " [{:.1f}, {:.1f}]".format(*(100 * edge for edge in interval))
    columns = {
        "books read": [str(found["books"])],
        "CER %": [_number(found["cer"], 1, 100)],
        "WER % [95 %]": [_number(found["wer"], 1, 100) + between],
        "valid CER %": [_number(found["chosen"]["valid_cer"], 1, 100)],
        "learning rate": [f"{found['chosen']['learning_rate']:g}"],
        "step": [str(found["chosen"]["step"])],
        "parameters": [f"{found['n_parameters']:,}"],
        "scored": [str(found["n_scored"])],
    }
    note = (
        f"A small recogniser on codes, learnt from {found['n_train']} utterances, chosen on {found['n_valid']} valid "
        f"ones, read the test split once (seed {found['seed']}; one seed is one draw)."
    )
    return _table("Probe", note, columns)


def _number(value: float | None, digits: int, times: float = 1.0) -> str:
    return "n/a" if value is None else f"{times * value:.{digits}f}"


def _table(title: str, note: str, columns: dict[str, list[str]]) -> MeasureTable:
    lines = [list(line) for line in zip(*columns.values(), strict=True)]
    return MeasureTable(title, note, list(columns), lines, names=1, narrow=list(range(len(columns))))
