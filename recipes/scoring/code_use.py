"""How the codes of a whole corpus use a tokenizer's books, from what `slm encode` wrote."""

from __future__ import annotations

from eval.codes import CodeStatistics, code_statistics
from recipes.config import ConfigError
from recipes.encoding.copies import plain_rows
from slm.corpus import CodedCorpus


def corpus_code_statistics(folder: str, split: str, label: str, fingerprint: str | None) -> CodeStatistics:
    """Statistics of the recordings of a coded corpus's split, as they are: varied copies do not count.

    Args:
        folder: the coded corpus.
        split: which split.
        label: the tokenizer's name in tables.
        fingerprint: of the tokenizer whose rows stand beside it, which has to be the corpus's own; None: any.

    Raises:
        CorpusError: the corpus is missing, unfinished, or of another tokenizer.
        ConfigError: it has no such split.
    """
    corpus = CodedCorpus.open(folder)
    if fingerprint is not None:
        corpus.check_fingerprint(fingerprint)
    if not corpus.count(split):
        raise ConfigError(f"codes: {folder} has no split {split!r} (codes_split); it has {', '.join(corpus.splits)}")

    facts = corpus.metadata
    plain = (row["audio_codes"] for row in plain_rows(corpus, split))
    return code_statistics(plain, facts.codebook_sizes, facts.frame_rate, label, f"{split} split")
