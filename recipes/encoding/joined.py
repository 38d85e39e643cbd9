"""Two coded corpora of the same recordings as one: codes that are given, and those of the tokenizer that makes sound.

Shapes: n books that are given (one is read), K of the decoder's tokenizer, F frames that both have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from recipes.config import ConfigError
from recipes.runs.logs import log
from slm.acoustic.configuration import DecoderFacts
from slm.corpus import CodedCorpus, CodedRow, CorpusMetadata


class Config(Protocol):
    """The keys that name them."""

    corpus: str
    decoder_corpus: str


def decoder_metadata(config: Config, corpus: CodedCorpus) -> CorpusMetadata | None:
    """What `decoder_corpus` says of itself; None where there is none.

    Raises:
        ConfigError: Its frame rate is another one, or the tokenizer is the same.
        CorpusError: It is no coded corpus.
    """
    if not config.decoder_corpus:
        return None
    given, decoder = corpus.metadata, CodedCorpus.open(config.decoder_corpus).metadata
    if given.frame_rate != decoder.frame_rate:
        raise ConfigError(
            f"decoder_corpus: {decoder.tokenizer} has {decoder.frame_rate:g} frames a second and {given.tokenizer}, "
            f"whose codes are given, {given.frame_rate:g}: encode with tokenizers of one rate"
        )
    if given.fingerprint == decoder.fingerprint:
        raise ConfigError("decoder_corpus: its codes are of the same tokenizer as those of corpus; leave it out")
    return decoder


def given_sizes(given: CorpusMetadata, decoder: CorpusMetadata) -> list[int]:
    """Entries of the book that is given and of the decoder's."""
    return [given.codebook_sizes[0], *decoder.codebook_sizes]


def decoder_facts(decoder: CorpusMetadata) -> dict[str, str]:
    """What a stage keeps of the tokenizer that makes sound."""
    return dataclasses.asdict(DecoderFacts(decoder.tokenizer, decoder.fingerprint, decoder.precision))


def joined_rows(config: Config, corpus: CodedCorpus, split: str) -> Iterator[CodedRow]:
    """The split's rows; with `decoder_corpus` with codes (1 + K, F), and without recordings that one of both lacks.

    Raises:
        ConfigError: The corpora have no recording in common.
    """
    if not config.decoder_corpus:
        yield from corpus.rows(split)
        return
    other = CodedCorpus.open(config.decoder_corpus)
    codes = {row["id"]: row["audio_codes"] for row in (other.rows(split) if split in other.splits else ())}
    n_rows = n_lacking = 0
    for row in corpus.rows(split):
        n_rows += 1
        if row["id"] not in codes:
            n_lacking += 1
            continue
        yield row | {"audio_codes": joined_codes(row["audio_codes"], codes[row["id"]])}
    if n_lacking == n_rows:
        raise ConfigError(
            f"decoder_corpus: {other.folder} has none of the {split} recordings of {corpus.folder}; encode the same "
            "data"
        )
    if n_lacking:
        log.warning("decoder_corpus: %d of %d %s recordings are not there: left out", n_lacking, n_rows, split)


def joined_codes(given: np.ndarray, decoder: np.ndarray) -> np.ndarray:
    """Book 0 of codes (n, F) over codes (K, F') of the same recording: (1 + K, the smaller of both), int64."""
    n_frames = min(given.shape[1], decoder.shape[1])
    return np.concatenate([given[:1, :n_frames], decoder[:, :n_frames]]).astype(np.int64)
