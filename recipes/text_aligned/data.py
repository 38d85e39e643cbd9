"""A coded corpus's utterances as a text-aligned model reads them.

Shapes: F frames, W words.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from recipes.config import ConfigError
from recipes.encoding.copies import copies_have_own_times, varied_copies
from recipes.finetuning.words import WORDS, words_of
from recipes.runs.logs import log
from slm.corpus import CodedCorpus, CodedRow
from slm.text_aligned.modeling import TextAlignedModel, load_text_aligned_model
from slm.text_aligned.samples import Item, make_item


def model_of(folder: str, device: str) -> TextAlignedModel:
    """The model of a folder. Raises ConfigError where none is named, TextAlignedError where it is none."""
    if not folder:
        raise ConfigError("model: not set; give RUN_DIR/model of `slm train-text-aligned`")
    return load_text_aligned_model(folder, device)


def read_items(
    corpus: CodedCorpus,
    split: str,
    normalise: Callable[[str], str],
    most_frames: int,
    most_bytes: int | None = None,
    limit: int | None = None,
) -> dict[str, Item]:
    """A split's utterances by id; those without words, or that are too long, are left out and counted in a warning.

    Args:
        corpus: With texts; with the column `words` each word's frames are known too, but of varied copies whose times
            are not their own.
        split: Which.
        normalise: What texts go through.
        most_frames: Frames of an utterance at most.
        most_bytes: Bytes of its text at most; None: any number.
        limit: Only the first so many.

    Raises:
        CorpusError: The corpus has no such split.
        ConfigError: The column `words` holds something else.
    """
    untimed = set() if copies_have_own_times(corpus.metadata) else varied_copies(corpus, split)
    found: dict[str, Item] = {}
    left_out = 0
    for row in corpus.rows(split):
        text = normalise(row["text"])
        too_long = row["audio_codes"].shape[1] > most_frames or len(text.encode()) > (most_bytes or math.inf)
        if not text or too_long:
            left_out += 1
        elif limit is None or len(found) < limit:
            frames = None if row["id"] in untimed else _word_frames(corpus, row, text, normalise)
            found[row["id"]] = make_item(row["audio_codes"][0], text, frames)
    if left_out:
        log.warning(
            "%s: %d utterances without a text, of more than %.1f s or with a longer text than the model knows are left "
            "out",
            split,
            left_out,
            most_frames / corpus.metadata.frame_rate,
        )
    return found


def _word_frames(corpus: CodedCorpus, row: CodedRow, text: str, normalise: Callable[[str], str]) -> list[int] | None:
    """How many frames are each word's; None where that is not known."""
    n_frames, place = row["audio_codes"].shape[1], f"corpus {corpus.folder}: {row['id']}"
    words = row["columns"].get(WORDS, "")
    return words_of(words, text, n_frames, corpus.metadata.frame_rate, normalise, place)
