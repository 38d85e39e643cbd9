"""The speech vocabulary of a fine-tuning, and the codebook vectors that its rows begin with."""

from __future__ import annotations

import dataclasses

import torch
from transformers import PreTrainedTokenizerBase

from recipes.config import ConfigError
from recipes.encoding.books import tokenizer_of_corpus
from recipes.finetuning.config import Config
from recipes.finetuning.corpora import Corpora, columns_of, language_marks, used_tasks
from recipes.finetuning.prosody import PROSODY, bins_of
from slm.patterns import resolve_pattern
from slm.vocabulary import SpeechVocabulary, add_marks, add_prosody, add_speech


def make_vocabulary(
    config: Config, corpora: Corpora, tokenizer: PreTrainedTokenizerBase, own: SpeechVocabulary | None
) -> SpeechVocabulary:
    """The model's own speech vocabulary, or a new one added to the text tokenizer.

    Raises:
        VocabularyError: the model already speaks another tokenizer's codes.
        ConfigError: it was made with another number of codebooks, or a row's language is none.
    """
    facts = corpora.metadata
    marks = [mark for task in used_tasks(config) for mark in task.marks] + language_marks(config, corpora)
    if own is not None:
        own.check_fingerprint(facts.fingerprint, f"the corpus {corpora.names}")
        if own.n_codebooks != config.n_codebooks:
            raise ConfigError(
                f"n_codebooks: the model {config.model} was made with {own.n_codebooks}, not {config.n_codebooks}"
            )
        if own.pattern != resolve_pattern(config.pattern, config.n_codebooks):
            raise ConfigError(
                f"pattern: the model {config.model} was made with {own.pattern.name}, not {config.pattern}"
            )
        normalisers = {"normaliser": config.normaliser, "prompt_normaliser": config.prompt_normaliser}
        vocabulary = dataclasses.replace(add_marks(tokenizer, own, marks), **normalisers)
        return _with_prosody(config, corpora, tokenizer, vocabulary)
    vocabulary = add_speech(
        tokenizer,
        facts.codebook_sizes,
        n_codebooks=config.n_codebooks,
        fingerprint=facts.fingerprint,
        frame_rate=facts.frame_rate,
        tokenizer=facts.tokenizer,
        precision=facts.precision,
        normaliser=config.normaliser,
        prompt_normaliser=config.prompt_normaliser,
        marks=marks,
        pattern=config.pattern,
    )
    return _with_prosody(config, corpora, tokenizer, vocabulary)


def _with_prosody(
    config: Config, corpora: Corpora, tokenizer: PreTrainedTokenizerBase, vocabulary: SpeechVocabulary
) -> SpeechVocabulary:
    """The same with tokens of prosody, where a task needs them; a model that has some keeps its bins.

    Raises:
        ConfigError: the model has another number of bins, or a corpus has no prosody.
    """
    if not any(task.answer_holds_prosody for task in used_tasks(config)):
        return vocabulary
    columns_of(config, corpora)  # raises where the column is not there
    if vocabulary.prosody is None:
        holders = [corpus for corpus in corpora.opened if PROSODY in corpus.metadata.columns]
        columns = sorted(set().union(*(corpus.values("train", PROSODY) for corpus in holders)))
        bins = bins_of(columns, config.prosody_bins, f"corpus {corpora.names}")
        return add_prosody(tokenizer, vocabulary, bins)
    if vocabulary.prosody.n != config.prosody_bins:
        raise ConfigError(
            f"prosody_bins: the model {config.model} was made with {vocabulary.prosody.n}, not {config.prosody_bins}"
        )
    return vocabulary


def codebooks(config: Config, corpora: Corpora) -> list[torch.Tensor] | None:
    """The vectors of the codebooks used, (size, D) each; None where speech tokens start from noise.

    Raises:
        ConfigError: the corpus's tokenizer has no such books, or is another by now.
    """
    if config.speech_rows == "noise":
        return None
    tokenizer = tokenizer_of_corpus(corpora.metadata, corpora.names, "speech_rows", "or take speech_rows=noise")
    return tokenizer.quantizer.entries(config.n_codebooks)
