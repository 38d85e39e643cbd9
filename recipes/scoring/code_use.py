"""How the codes of a whole corpus use a tokenizer's books, from what `slm encode` wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pyarrow.parquet as pq

from eval.codes import CodeStatistics, code_statistics
from recipes.config import ConfigError
from slm.corpus import CodedCorpus, CodedRow

_COPY = re.compile(r"(.+)#([1-9]\d*)", re.DOTALL)  # the id of a varied copy, such as "s1-bbaf2n#3"


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


def plain_rows(corpus: CodedCorpus, split: str) -> Iterator[CodedRow]:
    """A split's recordings as they are, without the varied copies of them."""
    varied = varied_copies(corpus, split)
    return (row for row in corpus.rows(split) if row["id"] not in varied)


def varied_copies(corpus: CodedCorpus, split: str) -> set[str]:
    """Ids of the varied copies that `slm encode` made of the train split; a recording's own id may end in #1 too."""
    copies = corpus.metadata.plan.get("copies", 1) if split == "train" else 1
    if copies == 1:
        return set()
    shards = [corpus.folder / shard["name"] for shard in corpus.index["splits"][split]["shards"]]
    ids = {name for shard in shards for name in pq.read_table(shard, columns=["id"])["id"].to_pylist()}
    found = ((name, _COPY.fullmatch(name)) for name in ids)
    # A copy's plain one stands beside it, so this never leaves a split empty.
    return {name for name, parts in found if parts and parts[1] in ids and int(parts[2]) < copies}
