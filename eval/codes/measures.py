"""All that was measured of one tokenizer's codes, as its file has it, and what could not be measured with the reason.

Shapes: K books, N code frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from eval.codes.information import Information, mutual_information
from eval.codes.ngrams import held_out_bits
from eval.codes.probe import ProbeOutcome
from eval.codes.statistics import CodeStatistics
from eval.stats import bootstrap_interval
from eval.text.normalisers import get_normaliser
from eval.text.wer import score_pairs

__all__ = [
    "FORMAT",
    "MEASURES",
    "NO_SNMI",
    "CodeMeasures",
    "code_use",
    "code_characters",
    "code_predictability",
    "probe_scores",
]

FORMAT = "lmspt-code-measures/1"
MEASURES = {
    "use": "bitrates, entries used, entropy",
    "language_model": "perplexity under n-grams on utterances they have not seen",
    "characters": "mutual information with the characters of an aligned text",
    "probe": "error rates of a small recogniser that reads the codes",
    "robustness": "frames whose code outlives a small change of the recording",
}
# Appendix B of arXiv 2506.16738v1. Its words are known here at second hand only, so it is said and not imitated.
NO_SNMI = (
    "the LM-SPT paper's sequence-normalised mutual information hashes the code sequences of sentences that many "
    "speakers repeat; the settings of the hash are not known here. `characters` is another measure of the like"
)


@dataclass
class CodeMeasures:
    """The measures of one tokenizer's codes.

    Each is the mapping that a function of this file, or `agreement`, returned; None or empty where it was not asked for
    or could not be had. `gaps`: name of a measure -> why there is none.
    """

    tokenizer: str
    fingerprint: str
    frame_rate_hz: float
    codebook_sizes: list[int]
    use: dict[str, Any] | None = None
    language_model: dict[str, Any] | None = None
    characters: dict[str, Any] | None = None
    probe: dict[str, Any] | None = None
    robustness: dict[str, Any] | None = None
    gaps: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"format": FORMAT, **asdict(self)}


def code_use(statistics: CodeStatistics) -> dict[str, Any]:
    """Bitrates and use of each book, and the bitrates of all of them.

    A book's entropy is that of how often its entries occur; a code sent with that many bits on average costs
    `entropy_bps`. It is estimated from `n_frames` frames, and too low where these are few for the book's size.
    """
    rate = statistics.frame_rate_hz
    books = [
        asdict(book)
        | {"nominal_bps": rate * float(np.log2(book.size)), "entropy_bps": rate * book.entropy_bits, "book": number}
        for number, book in enumerate(statistics.books)
    ]
    return {
        "data": statistics.data,
        "n_scored": statistics.n_scored,
        "n_frames": statistics.n_frames,
        "nominal_bps": statistics.bitrate_bps,
        "entropy_bps": sum(book["entropy_bps"] for book in books),
        "books": books,
    }


def code_predictability(
    train: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    codebook_sizes: Sequence[int],
    frame_rate_hz: float,
    orders: Sequence[int],
) -> dict[str, Any]:
    """Held-out perplexity of each book under n-grams of its own codes; the other books are not looked at.

    Args:
        train: codes (K, F) of the utterances that are counted.
        held_out: codes (K, F) of the utterances that are predicted.
        codebook_sizes: entries of each book.
        frame_rate_hz: frames a second.
        orders: lengths of n-grams.

    Raises:
        ValueError: nothing to learn from or to predict.
    """
    books = []
    for number, size in enumerate(codebook_sizes):
        bits = held_out_bits([codes[number] for codes in train], [codes[number] for codes in held_out], size, orders)
        perplexity = {str(order): 2**value for order, value in bits.items()}
        books.append({"book": number, "perplexity": perplexity, "bps": frame_rate_hz * min(bits.values())})
    frames = [sum(codes.shape[1] for codes in part) for part in (train, held_out)]
    return {"books": books, "n_train_frames": frames[0], "n_held_out_frames": frames[1]}


def code_characters(codes: np.ndarray, labels: np.ndarray, source: str) -> dict[str, Any]:
    """What each book tells of the character that is being said.

    Args:
        codes: (K, N) of all frames.
        labels: (N,) the characters' labels (`frame_labels`).
        source: what was aligned, `characters` or `words`.

    Returns:
        For each book I(code; character) and its shares; `acoustic_to_semantic` is the mean adjusted share of the books
        above 0 over that of book 0: near 0 where book 0 alone speaks of the text. None with one book, or where book 0
        tells no more than chance.
    """
    found: list[Information] = [mutual_information(book, labels) for book in codes]
    books = [
        asdict(item) | {"book": number, "share": item.share_of_y, "adjusted_share": item.adjusted_share_of_y}
        for number, item in enumerate(found)
    ]
    first, *others = [book["adjusted_share"] for book in books]
    ratio = None
    if others and first is not None and first > 0 and None not in others:
        ratio = float(np.mean(others)) / first
    return {"aligned": source, "n_frames": len(labels), "books": books, "acoustic_to_semantic": ratio}


def probe_scores(
    outcome: ProbeOutcome, references: Sequence[str], ids: Sequence[str], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Error rates of the chosen probe on the test utterances, with intervals over utterances, and how it was chosen.

    Args:
        outcome: what it read.
        references: the normalised texts.
        ids: of the utterances.
        facts: further entries, such as the number of books that it reads.
    """
    rates = score_pairs(references, outcome.hypotheses, get_normaliser("none"), ids)
    words = [item.n_words for item in rates.utterances]
    errors = [item.substitutions + item.deletions + item.insertions for item in rates.utterances]
    return {
        **facts,
        "cer": rates.cer,
        "wer": rates.wer,
        "wer_interval": bootstrap_interval(errors, words),
        "n_scored": rates.n_scored,
        "n_parameters": outcome.n_parameters,
        "answers_per_frame": outcome.answers_per_frame,
        "n_too_short_to_learn": outcome.n_too_short,
        "chosen": asdict(outcome.chosen),
        "trials": [asdict(trial) for trial in outcome.trials],
    }
