"""What `slm measure-codes` measures of a coded corpus, one function a measure; each returns what its file keeps.

A measure that cannot be had raises `Gap` with the reason: the others stand, and the reason stands in its place.

Shapes: K books, F frames of an utterance, N of all; codes (K, F).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.codes import code_statistics
from eval.codes.characters import character_spans, frame_labels
from eval.codes.measures import code_characters, code_predictability, code_use, probe_scores
from eval.codes.probe import CodedText, ProbeConfig, train_probe
from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError
from recipes.encoding.copies import plain_rows
from recipes.runs.files import text_lines
from recipes.runs.progress import Progress
from slm.corpus import CodedCorpus
from tokenizer.data.utterances import DataSource

TRAIN, VALID, TEST = "train", "valid", "test"


class Gap(ValueError):
    """A measure cannot be had of these inputs; the message says what it needs."""


def use_of(corpus: CodedCorpus, split: str, label: str) -> dict[str, Any]:
    """Bitrates and use of the books in one split."""
    facts = corpus.metadata
    plain = (row["audio_codes"] for row in plain_rows(corpus, split))
    return code_use(code_statistics(plain, facts.codebook_sizes, facts.frame_rate, label, f"{split} split"))


def predictability_of(corpus: CodedCorpus, orders: Sequence[int]) -> dict[str, Any]:
    """n-grams of the train split, measured on the valid split. Raises Gap where one of them is not there."""
    _need(corpus, "n-grams", TRAIN, VALID)
    parts = [[row["audio_codes"] for row in plain_rows(corpus, split)] for split in (TRAIN, VALID)]
    return code_predictability(*parts, corpus.metadata.codebook_sizes, corpus.metadata.frame_rate, orders)


def characters_of(corpus: CodedCorpus, split: str, sources: Sequence[DataSource]) -> dict[str, Any]:
    """Mutual information of the codes with the characters that the manifests of `sources` align.

    Raises:
        Gap: no line of a manifest is aligned, or none that is in the split.
        ConfigError: an alignment is damaged.
    """
    lines = {f"{source.id_prefix}{line['id']}": line for source in sources for line in _manifest(source)}
    codes, labels, columns = [], [], set()
    for row in plain_rows(corpus, split):
        line = lines.get(row["id"], {})
        try:
            spans = character_spans(line)
        except ValueError as error:
            raise ConfigError(f"data: {row['id']}: {error}") from error
        if spans:
            columns.add("characters" if isinstance(line.get("characters"), list) else "words")
            codes.append(row["audio_codes"])
            labels.append(frame_labels(spans, row["audio_codes"].shape[1], corpus.metadata.frame_rate))
    if not codes:
        raise Gap(
            f"needs an aligned manifest in data=: lines of the {split} split with "
            "characters [{character, start, end}] or words [{word, start, end}]"
        )
    aligned = " and ".join(sorted(columns))
    return {"n_scored": len(codes)} | code_characters(np.concatenate(codes, axis=1), np.concatenate(labels), aligned)


def probe_of(corpus: CodedCorpus, config: ProbeConfig, normaliser: str, seed: int, device: str) -> dict[str, Any]:
    """Error rates of a small recogniser on the test split. Raises Gap where a split or its texts are not there."""
    _need(corpus, "the probe", TRAIN, VALID, TEST)
    normalise, parts, ids = get_normaliser(normaliser), {}, {}
    for split in (TRAIN, VALID, TEST):
        items = [
            (row["id"], CodedText(row["audio_codes"], normalise(row["text"]))) for row in plain_rows(corpus, split)
        ]
        items = [item for item in items if item[1].text]
        if not items:
            raise Gap(f"the probe needs texts, and the {split} split has none")
        ids[split], parts[split] = [name for name, _ in items], [text for _, text in items]
    facts = corpus.metadata
    shown = Progress("probe", config.steps * len(config.learning_rates))
    try:
        outcome = train_probe(
            *parts.values(), facts.codebook_sizes, facts.frame_rate, config, seed, device, shown.update
        )
    finally:
        shown.close()
    about = {"books": config.books or facts.n_codebooks, "normaliser": normaliser, "seed": seed}
    about |= {f"n_{split}": len(parts[split]) for split in (TRAIN, VALID)}
    return probe_scores(outcome, [item.text for item in parts[TEST]], ids[TEST], about)


def _need(corpus: CodedCorpus, what: str, *splits: str) -> None:
    if missing := [split for split in splits if not corpus.count(split)]:
        raise Gap(f"{what} needs the splits {', '.join(splits)}; the corpus has no {', '.join(missing)}")


def _manifest(source: DataSource) -> list[dict[str, Any]]:
    """The lines of a manifest; none of a source that is no manifest."""
    path = Path(source.path).expanduser()
    path = path / "manifest.jsonl" if path.is_dir() else path
    if path.suffix != ".jsonl" or not path.is_file():
        return []
    return [line for text in text_lines(path) if text.strip() and "id" in (line := json.loads(text))]
