"""Coded corpora -> the sequences of a fine-tuning."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from recipes.config import ConfigError
from recipes.finetuning.config import Config
from recipes.finetuning.corpora import Corpora, used_tasks
from recipes.finetuning.replay import replayed_text
from recipes.finetuning.utterances import Split, UtteranceReader
from recipes.runs.logs import log
from slm.tasks.styles import PromptStyles, wording_ids
from slm.trained_on import TrainedOn
from slm.training.samples import MixedSamples, Samples, SpeechSamples, TextSamples
from slm.vocabulary import SpeechVocabulary


@dataclass
class Data:
    """The training and valid sequences, and what they are made of."""

    vocabulary: SpeechVocabulary
    train: SpeechSamples
    valid: SpeechSamples | None
    text: TextSamples | None = None
    valid_text: TextSamples | None = None

    @property
    def all_train(self) -> Samples:
        """Speech and text."""
        return self.train if self.text is None else MixedSamples([self.train, self.text])

    @property
    def all_valid(self) -> Samples | None:
        """What losses are measured on."""
        parts = [part for part in (self.valid, self.valid_text) if part is not None]
        return MixedSamples(parts) if len(parts) > 1 else next(iter(parts), None)


def make_data(
    config: Config, corpora: Corpora, tokenizer: PreTrainedTokenizerBase, vocabulary: SpeechVocabulary, longest: int
) -> Data:
    """The sequences of the train and valid splits, and the vocabulary that tells what those with a text are like.

    Utterances whose text, or a column that a task reads, normalises to nothing are left out, and told; unless no task
    holds any text. Those that are not aligned are left out of tasks by word, those not measured of tasks with prosody.

    Raises:
        ConfigError: Nothing of the train split is left, or a column or the replayed text cannot be read.
    """
    reader = UtteranceReader(config, corpora, tokenizer, vocabulary)
    wordings = {
        task: [wording_ids(vocabulary, tokenizer, wording) for wording in found]
        for task, found in config.prompts.wordings.items()
    }

    def samples(name: str, split: Split, vocabulary: SpeechVocabulary) -> SpeechSamples | None:
        if not split.written:
            return None
        repeats = split.weights if set(split.weights) != {1.0} and name == "train" else None
        styles = PromptStyles(wordings, split.languages, config.prompts.share)
        weights, noise = config.task_weights, config.noise
        tasks = split.tasks if any(some is not None for some in split.tasks) else None
        made = SpeechSamples(vocabulary, split.written, weights, noise, longest, split.prompts, repeats, styles, tasks)
        if made.n_too_long:
            log.warning("%s: %d utterances longer than %d tokens are left out", name, made.n_too_long, longest)
        return made

    split = reader.split("train")
    training = samples("train", split, vocabulary)
    if training is None:
        named = " and ".join(["a text", *reader.columns, *(f"{name} that says it" for name in reader.word_columns)])
        raise ConfigError(f"corpus {corpora.names}: none of the train split's utterances has {named}")
    trained_on = _trained_on(config, training, split, vocabulary)
    if trained_on is not None:
        vocabulary = dataclasses.replace(vocabulary, trained_on=trained_on.after(vocabulary.trained_on))
    elif config.prompts.wordings or config.prompts.languages:
        log.warning(
            "no utterance has a transcript, without which the model keeps nothing of its training: ask it with "
            "wording=... and language=..."
        )
    valid = samples("valid", reader.split("valid"), vocabulary)
    return Data(vocabulary, training, valid, *replayed_text(config, tokenizer, vocabulary, longest))


def _trained_on(
    config: Config, training: SpeechSamples, split: Split, vocabulary: SpeechVocabulary
) -> TrainedOn | None:
    """What the training's utterances are like; None where none has a transcript, and nothing is known of them."""
    members = [i for i in np.unique(training.members) if split.spoken[i][0]]
    if not members:
        return None
    texts, seconds = zip(*(split.spoken[i] for i in members), strict=True)
    codes, text_ids = zip(*((u.codes, u.text) for u in (training.utterances[i] for i in members)), strict=True)
    codes = [one[: vocabulary.ids_per_frame] for one in codes]  # a loop is told by the books whose codes are ids
    return dataclasses.replace(
        TrainedOn.of(texts, seconds, codes, text_ids, vocabulary.frame_rate),
        tasks=tuple(task.name for task in used_tasks(config)),
        bare_prompts=config.noise.drop_prompt,
        wordings=tuple(config.prompts.wordings.items()),
        languages=tuple(config.prompts.languages.items()),
    )


def longest_sequence(config: Config, model_config: Any) -> int:
    """The longest sequence that is kept. Raises ConfigError where the model cannot take that many."""
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if config.max_length and limit and config.max_length > limit:
        raise ConfigError(f"max_length: {config.max_length} is more than the model's {limit} positions")
    return config.max_length or limit or 2**31
