"""What is to be said: read from where it stands, cut into parts, and looked through for what cannot be said."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError
from recipes.inference.long_texts import Part, cut_text
from recipes.inference.prosody import check_emphasis
from recipes.inference.scripts import SINGLE, Script, joined
from recipes.inference.setup import corpus_rows, source_utterances
from recipes.inference.speech_checks import unsayable
from recipes.inference.synthesis_config import UNKNOWN_LONGEST_TEXT, Config
from recipes.inference.tasks import reference_of
from recipes.runs.logs import the_first
from slm.tasks import Task
from slm.tasks.continuation import split_codes
from slm.vocabulary import SpeechVocabulary
from tokenizer.data.utterances import Utterance

LANGUAGE = "en"  # whose abbreviations end no sentence, where the normaliser names no language


def read_inputs(config: Config, task: Task, vocabulary: SpeechVocabulary) -> Iterator[Script]:
    """Everything to say, not cut yet, and its recording not encoded."""
    if config.corpus:
        for row in corpus_rows(config, vocabulary):
            reference = reference_of(task, row["text"], row["columns"])
            script = Script(row["id"], row["text"], reference, row["columns"])
            if task.prompt_holds_speech:
                hear(script, row["audio_codes"], config, task, vocabulary)
            yield script
    elif config.data:
        for utterance in source_utterances(config):
            reference = reference_of(task, utterance.text, utterance.columns)
            recording = utterance if task.prompt_holds_speech else None
            yield Script(utterance.id, utterance.text, reference, utterance.columns, recording=recording)
    elif config.files:
        for path in config.files:
            yield Script(path, "", "", recording=Utterance(path, path))
    else:
        yield Script(SINGLE, config.text, reference_of(task, config.text, {}))


def hear(script: Script, codes: np.ndarray, config: Config, task: Task, vocabulary: SpeechVocabulary) -> None:
    """Puts the speech of its prompt (K, F) into a script: all of it, or what is to be continued."""
    script.codes = codes
    if task.continues and not config.files:
        script.codes, rest = split_codes(codes, config.prompt_share)
        script.expected_s = rest.shape[1] / vocabulary.frame_rate


def longest_text(config: Config, vocabulary: SpeechVocabulary) -> int:
    """Characters that are said in one go."""
    if config.max_characters is not None:
        return config.max_characters
    if config.join > 1:
        return sys.maxsize
    return vocabulary.trained_on.longest_text if vocabulary.trained_on else UNKNOWN_LONGEST_TEXT


def longest_piece(config: Config, vocabulary: SpeechVocabulary) -> int | None:
    """Characters of the pieces of a sentence that is longer than that; None: as many as in one go."""
    follows = config.max_characters is None and vocabulary.trained_on is not None
    return vocabulary.trained_on.longest_piece if follows else None


def may_be_cut(task: Task) -> bool:
    """Whether a long text may be asked part by part: it is all that the prompt holds."""
    return task.prompt_holds_text and not task.prompt_holds_speech and not task.columns


def read_scripts(
    config: Config, task: Task, vocabulary: SpeechVocabulary, text_tokenizer: PreTrainedTokenizerBase
) -> list[Script]:
    """Everything to say, cut into parts where it may be, with what the model cannot say of it.

    Raises:
        ConfigError: `strict`, and there is such a thing; or the only text holds nothing to say.
    """
    normalise, longest = get_normaliser(vocabulary.normaliser_of_prompts), longest_text(config, vocabulary)
    language = vocabulary.normaliser_of_prompts.partition(":")[2]
    language = LANGUAGE if language in ("", "any") else language
    piece = longest_piece(config, vocabulary)
    scripts: list[Script] = []
    found = read_inputs(config, task, vocabulary)
    for script in joined(found, config.join) if config.join > 1 else found:
        if may_be_cut(task):
            script.parts = cut_text(script.text, normalise, longest, language, piece)
        else:
            script.parts = [Part(script.reference, normalise(script.reference))]
        if not script.parts:
            holds = f"{script.text!r} holds no word after the normaliser {vocabulary.normaliser_of_prompts!r}"
            script.error = f"nothing to say: {holds}"
        if task.prompt_holds_text:
            script.unsayable = unsayable(script.text, normalise, vocabulary, text_tokenizer)
        scripts.append(script)
    if not scripts:
        raise ConfigError(f"join: there are fewer than {config.join} texts; lower it")
    if config.text and scripts[0].error:
        raise ConfigError(f"text: {scripts[0].error}")
    check_emphasis(config.prosody, scripts, normalise)
    if config.strict and (warnings := the_first(f"{s.place}{line}" for s in scripts for line in s.unsayable)):
        head = "the model cannot say all of the text as it is written (without strict it speaks all the same):"
        raise ConfigError("\n  - ".join([head, *warnings]))
    return scripts
