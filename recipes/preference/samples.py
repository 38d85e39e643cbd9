"""Answers that a model draws for texts: spoken, heard by a judge, and what each is worth.

Shapes: n books that the SLM speaks, F frames; codes (n, F), waveforms (S,).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from eval.judges.judge import Judge
from eval.text.normalisers import Normaliser
from eval.text.wer import ErrorRates, score_pairs
from recipes.inference.speech_checks import is_silent
from recipes.inference.speech_files import decoded
from recipes.preference.config import RewardSettings
from recipes.preference.texts import Text
from slm.decoding.row_rules import FinishReason
from slm.generation import SaidWord, SpeechLM, generate_speech
from slm.settings import SpeechLimits, SynthesizeSettings, speech_limits, word_limits
from slm.tasks import Task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import IGNORE, Example, answer, make_example, make_prompt
from slm.tasks.styles import trained_wording
from slm.tasks.tts_aligned import word_ids
from slm.training.trainer import bare_model
from slm.vocabulary import SpeechVocabulary

LEAST_RATIO = 0.05  # of durations, that counts: 0 has no logarithm


@dataclass(frozen=True)
class Spoken:
    """One answer as sound: its codes, why they ended, and the waveform, None where there are no finite samples.

    Of a task by word also the words that were said.
    """

    codes: np.ndarray
    finish_reason: FinishReason
    waveform: np.ndarray | None
    words: tuple[SaidWord, ...] = ()

    @property
    def silent(self) -> bool:
        """Whether nothing is to be heard."""
        return self.waveform is None or is_silent(self.waveform)

    @property
    def failed(self) -> bool:
        """Whether it did not end as speech does: cut off, a loop, silent, not finite."""
        return self.finish_reason != "stop" or self.silent


@dataclass(frozen=True)
class Sample:
    """What became of one answer: its codes, why they ended, what was heard of them, and what that is worth."""

    codes: np.ndarray
    finish_reason: FinishReason
    silent: bool
    heard: str
    cer: float
    length_ratio: float | None  # to the expected duration; None where the model does not tell its rate of speech
    reward: float
    words: tuple[SaidWord, ...] = ()

    @property
    def failed(self) -> bool:
        """As of `Spoken`."""
        return self.finish_reason != "stop" or self.silent

    def as_dict(self) -> dict[str, Any]:
        """Its JSON."""
        words = [(word.n_frames, word.finish_reason) for word in self.words]
        return vars(self) | {"codes": self.codes.tolist(), "words": words}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Sample:
        """From its JSON."""
        words = tuple(SaidWord(*word) for word in values.get("words", ()))
        return cls(**values | {"codes": np.array(values["codes"], dtype=np.int64), "words": words})


class Speaker:
    """A model's answers to texts, as codes and as sound.

    Args:
        text_tokenizer: Of the model.
        vocabulary: Of the model.
        tokenizer: The speech tokenizer that decodes its codes.
        device: Where that is.
        task: How it is asked: one whose prompt or answer holds the text and nothing else.
    """

    def __init__(
        self,
        text_tokenizer: PreTrainedTokenizerBase,
        vocabulary: SpeechVocabulary,
        tokenizer: Any,
        device: str,
        task: Task,
    ) -> None:
        self.text_tokenizer, self.vocabulary = text_tokenizer, vocabulary
        self.tokenizer, self.device, self.task = tokenizer, device, task
        self.wording = trained_wording(vocabulary, text_tokenizer, self.task)

    @property
    def sampling_rate(self) -> int:
        """Hz of the waveforms."""
        return self.tokenizer.config.sampling_rate

    def utterance(self, text: Text) -> UtteranceTokens:
        """What a text's prompt is made of."""
        encode = functools.partial(self.vocabulary.encode_text, self.text_tokenizer)
        words = word_ids(encode, text.said) if self.task.by_word else None
        return UtteranceTokens(text=encode(text.said), wording=self.wording, words=words)

    def prompt(self, text: Text) -> np.ndarray:
        """(P,) the ids behind which the model answers."""
        return make_prompt(self.vocabulary, self.task, self.utterance(text))

    def example(self, text: Text, said: Spoken | Sample) -> Example:
        """Prompt and answer, with labels on the ids that the model has drawn: not on an end that it did not reach."""
        if said.words:
            return self._example_by_word(text, said)
        ids = [int(i) for i in self.vocabulary.ids_from_codes(said.codes)] if said.codes.size else []
        end = [self.vocabulary.speech_end_id] if said.finish_reason == "stop" else []
        return answer(self.prompt(text), np.array([*ids, *end], dtype=np.int64))

    def _example_by_word(self, text: Text, said: Spoken | Sample) -> Example:
        utterance, words = self.utterance(text), [word for word in said.words if word.n_frames]
        if not words:
            return answer(self.prompt(text), np.zeros(0, dtype=np.int64))
        frames = [word.n_frames for word in words]
        spoken = dataclasses.replace(
            utterance, codes=said.codes, words=utterance.words[: len(words)], word_frames=frames
        )
        example = make_example(self.vocabulary, self.task, spoken)
        ends = np.flatnonzero(example.input_ids == self.vocabulary.speech_end_id)
        for end, word in zip(ends, words, strict=True):
            if word.finish_reason != "stop":  # given, so that the next word can come
                example.labels[end] = IGNORE
        return example

    def tokens_beside_codes(self, text: Text) -> int:
        """Tokens of an answer that are no codes: its end; of a task by word each word's end, and what is given."""
        if not self.task.by_word:
            return 1
        words = self.utterance(text).words
        # The first word and the mark behind it stand in the prompt.
        return len(words) + sum(len(word) + 1 for word in words[1:]) + 1

    def limits(self, text: Text, settings: SynthesizeSettings) -> SpeechLimits:
        """How long an answer may be and must be; of a task by word each of its words."""
        if self.task.by_word:
            return word_limits(self.vocabulary, settings)
        return speech_limits(self.vocabulary, text.said, settings)

    def expected_s(self, text: Text) -> float | None:
        """Seconds that a text takes at the rate of speech of the model's training; None where it does not tell."""
        known = self.vocabulary.trained_on
        return None if known is None else len(text.said) / known.characters_per_s[1]

    def speak(
        self, model: nn.Module, texts: Sequence[Text], settings: SynthesizeSettings, keys: Sequence[str]
    ) -> list[Spoken]:
        """One answer to each text, by nothing but the model, the settings' seed and the text's key."""
        speech_lm = SpeechLM(bare_model(model), self.text_tokenizer, self.vocabulary)
        limits = [self.limits(text, settings) for text in texts]
        outputs = generate_speech(
            speech_lm, self.task, [self.utterance(text) for text in texts], limits, settings, keys
        )
        sound = decoded(self.tokenizer, (one.codes for one in outputs if one.codes.size), self.device)
        found = []
        for output in outputs:
            waveform = next(sound) if output.codes.size else None
            if waveform is not None and not (waveform.size and np.isfinite(waveform).all()):
                waveform = None
            found.append(Spoken(output.codes, output.finish_reason, waveform, output.words))
        return found


def hear(
    judge: Judge, speaker: Speaker, spoken: Sequence[Spoken], texts: Sequence[Text], normalise: Normaliser
) -> ErrorRates:
    """What a judge hears, against the texts that were to be said; nothing where there is nothing to hear."""
    audible = [number for number, one in enumerate(spoken) if one.waveform is not None]
    heard = [""] * len(spoken)
    if audible:
        answers = judge.transcribe([spoken[number].waveform for number in audible], speaker.sampling_rate)
        for number, text in zip(audible, answers, strict=True):
            heard[number] = text
    return score_pairs([text.written for text in texts], heard, normalise)


def length_ratio(speaker: Speaker, text: Text, codes: np.ndarray) -> float | None:
    """Duration to expected duration; None where the model does not tell its rate of speech."""
    expected_s = speaker.expected_s(text)
    return None if expected_s is None else codes.shape[1] / speaker.vocabulary.frame_rate / expected_s


def reward_of(settings: RewardSettings, cer: float, ratio: float | None, failed: bool) -> float:
    """What an answer is worth, 0 at best.

    Args:
        settings: The weights.
        cer: Character error rate, 1 being nothing right; more than that counts as 1.
        ratio: Duration to expected duration, None where nobody knows it.
        failed: Whether it did not end as speech does.
    """
    reward = -min(cer, 1.0)
    if ratio is not None:
        excess = abs(math.log(max(ratio, LEAST_RATIO))) - math.log1p(settings.length_tolerance)
        reward -= settings.length_weight * max(0.0, excess)
    return reward - settings.stop_penalty * failed


def judged(
    settings: RewardSettings, speaker: Speaker, spoken: Sequence[Spoken], texts: Sequence[Text], rates: ErrorRates
) -> list[Sample]:
    """The answers, each with what was heard of it (`hear`) and what that is worth."""
    found = []
    for one, text, errors in zip(spoken, texts, rates.utterances, strict=True):
        ratio, cer = length_ratio(speaker, text, one.codes), errors.character_errors / max(1, errors.n_characters)
        reward = reward_of(settings, cer, ratio, one.failed)
        heard = errors.hypothesis or ""
        found.append(Sample(one.codes, one.finish_reason, one.silent, heard, cer, ratio, reward, one.words))
    return found
