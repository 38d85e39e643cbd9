"""From codes to text and from text to codes: batched, kept to legal ids, truncation counted and never repaired.

Shapes: B prompts of a batch, padded on the left to P; V ids; codes (n, F) of the n codebooks the model uses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from slm.modeling import load_llm
from slm.tasks import Task, get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import make_prompt, prompt_size
from slm.vocabulary import SpeechVocabulary, VocabularyError

UNKNOWN_SECONDS_PER_CHARACTER = 0.25  # allowed where a model does not tell its training's rate: about four times it
TOKENS_PER_TOKEN = 2  # of text allowed for each text token of a prompt
SECONDS_PER_SECOND = 2.0  # of speech allowed for each second of speech in a prompt


class GenerationError(ValueError):
    """Settings or inputs that nothing can be generated from; the message says which."""


@dataclass
class TranscribeSettings:
    """How text is decoded: greedily, or with a beam."""

    batch_size: int = field(default=32, metadata={"help": "utterances decoded together, at most"})
    batch_seconds: float = field(
        default=480.0, metadata={"help": "seconds of speech decoded together, padding included, at most"}
    )
    num_beams: int = field(default=1, metadata={"help": "beams; 1 is greedy"})
    tokens_per_s: float = field(
        default=25.0,
        metadata={
            "help": f"text tokens allowed per second of a prompt's speech; {TOKENS_PER_TOKEN} per text token there"
        },
    )
    min_tokens: int = field(default=24, metadata={"help": "text tokens allowed to however short a prompt"})

    def __post_init__(self) -> None:
        settings = (self.batch_size, self.batch_seconds, self.num_beams, self.tokens_per_s, self.min_tokens)
        if min(settings) <= 0:
            raise GenerationError(
                "transcribing: batch_size, batch_seconds, num_beams, tokens_per_s and min_tokens must be positive"
            )


@dataclass
class SynthesizeSettings:
    """How speech tokens are drawn. Each text has a random stream of its own, from the seed and its key."""

    batch_size: int = field(default=32, metadata={"help": "texts decoded together"})
    temperature: float = field(default=0.8, metadata={"help": "0 is greedy"})
    top_k: int = field(default=50, metadata={"help": "draw from the k likeliest codes; 0: all"})
    top_p: float = field(default=1.0, metadata={"help": "draw from the likeliest codes that make up this share"})
    seed: int = field(default=0, metadata={"help": "seed of the draws"})
    seconds_per_character: float | None = field(
        default=None,
        metadata={
            "help": "speech allowed per character of text; null: twice what the slowest of the training's speech took, "
            f"or {UNKNOWN_SECONDS_PER_CHARACTER} where the model does not tell"
        },
    )
    min_seconds: float = field(
        default=4.0,
        metadata={
            "help": "speech allowed to however short a prompt; speech in a prompt allows "
            f"{SECONDS_PER_SECOND:g} times its length beside"
        },
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise GenerationError(
                "synthesising: batch_size >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1 are needed"
            )
        if (self.seconds_per_character or 0) < 0 or self.min_seconds <= 0:
            raise GenerationError("synthesising: seconds_per_character >= 0 and min_seconds > 0 are needed")


@dataclass(frozen=True)
class TranscribeOutput:
    """A transcript; `truncated` says that the model did not end it within its budget of tokens."""

    text: str
    truncated: bool
    n_tokens: int


@dataclass(frozen=True)
class SynthesizeOutput:
    """(n, F) codes, F >= 1; `truncated` says that the model did not end them within the budget."""

    codes: np.ndarray
    truncated: bool


@dataclass
class SpeechLM:
    """A fine-tuned model with its tokenizer and speech vocabulary, ready to generate."""

    model: PreTrainedModel
    text_tokenizer: PreTrainedTokenizerBase
    vocabulary: SpeechVocabulary

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", dtype: str = "fp32") -> SpeechLM:
        """Loads the folder that `slm finetune` wrote.

        Raises:
            VocabularyError: The folder is no speech language model.
            ModelError: It is no model at all.
        """
        model, text_tokenizer, vocabulary = load_llm(str(folder), dtype)
        if vocabulary is None:
            raise VocabularyError(
                f"{folder}: a text LM without speech_vocabulary.json; make a speech one with `slm finetune`"
            )
        return cls(model.to(device).eval(), text_tokenizer, vocabulary)


class LegalIds(LogitsProcessor):
    """Forbids every id but the legal ones of the place.

    Args:
        legal: One (V,) bool mask per place in a frame; a transcript has one place.
        end_id: Legal at the first place of a frame, after at least `min_new` ids.
        prompt_length: P.
        min_new: Ids before the end may come.
    """

    def __init__(self, legal: Sequence[torch.Tensor], end_id: int, prompt_length: int, min_new: int = 0) -> None:
        self.end_id, self.prompt_length, self.min_new = end_id, prompt_length, min_new
        self._masks: dict[tuple[int, bool], torch.Tensor] = {}
        self._columns: dict[tuple[int, bool], torch.Tensor] = {}
        for place, mask in enumerate(legal):
            for with_end in (False, True):
                allowed = mask.clone()
                allowed[end_id] = with_end
                self._masks[place, with_end], self._columns[place, with_end] = ~allowed, allowed.nonzero()[:, 0]
        self._n_places = len(legal)

    def _place(self, input_ids: torch.Tensor) -> tuple[int, bool]:
        done = input_ids.shape[1] - self.prompt_length
        place = done % self._n_places
        return place, place == 0 and done >= self.min_new

    def columns(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The legal ids (C,) after the tokens so far, in order."""
        return self._columns[self._place(input_ids)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.float().masked_fill(self._masks[self._place(input_ids)], -math.inf)


class SeededSampling(LogitsProcessor):
    """Turns greedy search into sampling among the legal ids, with one random stream per row.

    The likeliest id of scores plus Gumbel noise is a draw from their softmax; each row's noise comes from its own
    generator, so the other rows of a batch do not change what is drawn (their padding moves scores by rounding alone).
    Drawn on the CPU, and for legal ids alone: the same on every device, and no cost that grows with the vocabulary.

    Args:
        legal: Which ids there are to draw from.
        seeds: One per row.
        settings: Temperature, top k, top p.
    """

    def __init__(self, legal: LegalIds, seeds: Sequence[int], settings: SynthesizeSettings) -> None:
        self.legal = legal
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.warpers = [TemperatureLogitsWarper(settings.temperature)]
        if settings.top_k:
            self.warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self.warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        columns = self.legal.columns(input_ids)
        own = scores[:, columns].float()
        for warper in self.warpers:
            own = warper(input_ids, own)
        uniform = torch.stack([torch.rand(own.shape[1], generator=generator) for generator in self.generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        drawn = columns[(own + gumbel.to(own)).argmax(-1)]
        return torch.full_like(scores, -math.inf).scatter_(1, drawn[:, None], 0.0)


def transcribe_codes(
    speech_lm: SpeechLM, codes: Sequence[np.ndarray], settings: TranscribeSettings | None = None
) -> list[TranscribeOutput]:
    """Writes the text of each utterance: the task `asr`.

    Args:
        speech_lm: The model.
        codes: One (K, F) array per utterance, without padding, K at least the codebooks the model uses.
        settings: Decoding.

    Returns:
        One output per utterance, in order.
    """
    return generate_text(speech_lm, get_task("asr"), [UtteranceTokens(codes=item) for item in codes], settings)


def synthesize_codes(
    speech_lm: SpeechLM,
    texts: Sequence[str],
    settings: SynthesizeSettings | None = None,
    keys: Sequence[str] | None = None,
) -> list[SynthesizeOutput]:
    """Draws the speech tokens of each text: the task `tts`.

    Args:
        speech_lm: The model.
        texts: What to say.
        settings: Decoding.
        keys: What, beside the seed, decides each text's random stream: utterance ids; the texts themselves by default.

    Returns:
        One output per text, in order.

    Raises:
        GenerationError: A text is empty.
    """
    settings = settings or SynthesizeSettings()
    vocabulary = speech_lm.vocabulary
    for i, text in enumerate(texts):
        if not text.strip():
            raise GenerationError(f"text {i + 1} of {len(texts)} is empty: there is nothing to say")
    utterances = [UtteranceTokens(text=vocabulary.encode_text(speech_lm.text_tokenizer, text)) for text in texts]
    seconds = [seconds_allowed(vocabulary, text, settings) for text in texts]
    return generate_speech(speech_lm, get_task("tts"), utterances, seconds, settings, texts if keys is None else keys)


def generate_text(
    speech_lm: SpeechLM, task: Task, utterances: Sequence[UtteranceTokens], settings: TranscribeSettings | None = None
) -> list[TranscribeOutput]:
    """Writes the answers of a task that answers in text.

    Args:
        speech_lm: The model.
        task: Whose prompts.
        utterances: What the prompts are made of. An answer's budget of tokens follows from the speech and text that
            its prompt holds.
        settings: Decoding.

    Returns:
        One output per utterance, in order.

    Raises:
        GenerationError: The task answers in speech.
        TaskError: An utterance lacks a part of the prompt.
    """
    _check_modality(task, "text")
    settings = settings or TranscribeSettings()
    vocabulary, model = speech_lm.vocabulary, speech_lm.model
    prompts = [make_prompt(vocabulary, task, item) for item in utterances]
    budgets = [tokens_allowed(vocabulary, task, item, settings) for item in utterances]
    legal = _mask(model, vocabulary.text_ids(speech_lm.text_tokenizer))
    outputs: list[TranscribeOutput | None] = [None] * len(prompts)
    most = settings.batch_seconds * vocabulary.frame_rate * vocabulary.n_codebooks
    for batch in _buckets(prompts, settings.batch_size, most):
        length = max(len(prompts[i]) for i in batch)
        guard = LegalIds([legal], vocabulary.end_id, length)
        rows = _generate(
            speech_lm,
            [prompts[i] for i in batch],
            max(budgets[i] for i in batch) + 1,  # room for the end behind a full budget, as in every shorter row
            vocabulary.end_id,
            [guard],
            settings.num_beams,
        )
        for i, row in zip(batch, rows, strict=True):
            ids, ended = _cut(row, vocabulary.end_id, budgets[i])
            text = speech_lm.text_tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            outputs[i] = TranscribeOutput(text.strip(), not ended, len(ids))
    return outputs


def generate_speech(
    speech_lm: SpeechLM,
    task: Task,
    utterances: Sequence[UtteranceTokens],
    seconds: Sequence[float],
    settings: SynthesizeSettings | None = None,
    keys: Sequence[str] | None = None,
) -> list[SynthesizeOutput]:
    """Draws the answers of a task that answers in speech.

    Args:
        speech_lm: The model.
        task: Whose prompts.
        utterances: What the prompts are made of.
        seconds: Speech allowed to each.
        settings: Decoding.
        keys: What, beside the seed, decides each answer's random stream; their numbers by default.

    Returns:
        One output per utterance, in order.

    Raises:
        GenerationError: The task answers in text.
        TaskError: An utterance lacks a part of the prompt.
    """
    _check_modality(task, "speech")
    settings = settings or SynthesizeSettings()
    vocabulary, model = speech_lm.vocabulary, speech_lm.model
    keys = [str(number) for number in range(len(utterances))] if keys is None else keys
    prompts = [make_prompt(vocabulary, task, item) for item in utterances]
    n = vocabulary.n_codebooks
    budgets = [math.ceil(item * vocabulary.frame_rate) * n for item in seconds]
    legal = [_mask(model, ids) for ids in vocabulary.speech_ids()]
    outputs: list[SynthesizeOutput | None] = [None] * len(prompts)
    for batch in _buckets(prompts, settings.batch_size):
        length = max(len(prompts[i]) for i in batch)
        guard = LegalIds(legal, vocabulary.speech_end_id, length, min_new=n)
        processors: list[LogitsProcessor] = [guard]
        if settings.temperature > 0:
            processors = [SeededSampling(guard, [_seed(settings.seed, keys[i]) for i in batch], settings)]
        budget = max(budgets[i] for i in batch) + 1
        for i, row in zip(
            batch,
            _generate(speech_lm, [prompts[i] for i in batch], budget, vocabulary.speech_end_id, processors),
            strict=True,
        ):
            ids, ended = _cut(row, vocabulary.speech_end_id, budgets[i])
            outputs[i] = SynthesizeOutput(vocabulary.codes_from_ids(ids), not ended)
    return outputs


def _check_modality(task: Task, modality: str) -> None:
    if task.answers != modality:
        other = "generate_speech" if task.answers == "speech" else "generate_text"
        raise GenerationError(f"task {task.name} answers in {task.answers}: call {other}")


def tokens_allowed(
    vocabulary: SpeechVocabulary, task: Task, utterance: UtteranceTokens, settings: TranscribeSettings
) -> int:
    """The most text tokens that may come of a prompt before the answer counts as cut off.

    Raises:
        TaskError: The utterance lacks a part of the prompt.
    """
    frames, tokens = prompt_size(task, utterance)
    seconds = frames / vocabulary.frame_rate
    return settings.min_tokens + math.ceil(seconds * settings.tokens_per_s) + TOKENS_PER_TOKEN * tokens


def seconds_allowed(
    vocabulary: SpeechVocabulary, text: str, settings: SynthesizeSettings, speech_s: float = 0.0
) -> float:
    """The most seconds of speech that may come of a prompt before the answer counts as cut off.

    Args:
        vocabulary: Of the model.
        text: The text in the prompt.
        settings: Decoding.
        speech_s: Seconds of speech in the prompt.
    """
    per_character = settings.seconds_per_character
    if per_character is None:
        known = vocabulary.trained_on
        per_character = 2 / known.characters_per_s[0] if known else UNKNOWN_SECONDS_PER_CHARACTER
    return settings.min_seconds + per_character * len(text) + SECONDS_PER_SECOND * speech_s


@torch.inference_mode()
def _generate(
    speech_lm: SpeechLM,
    prompts: Sequence[np.ndarray],
    max_new: int,
    end_id: int,
    processors: list[LogitsProcessor],
    num_beams: int = 1,
) -> list[list[int]]:
    """Pads on the left, generates, and gives each row's new ids, whatever follows the end included."""
    model, length = speech_lm.model, max(len(prompt) for prompt in prompts)
    pad = model.generation_config.pad_token_id
    ids = torch.full((len(prompts), length), end_id if pad is None else pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, length - len(prompt) :] = 1
    generated = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new,
        do_sample=False,
        num_beams=num_beams,
        eos_token_id=end_id,
        logits_processor=LogitsProcessorList(processors),
    )
    return generated[:, length:].tolist()


def _cut(row: Sequence[int], end_id: int, budget: int) -> tuple[list[int], bool]:
    """The ids before the end, at most `budget`, and whether the end came within it."""
    stop = row.index(end_id) if end_id in row else len(row)
    return list(row[: min(stop, budget)]), end_id in row and stop <= budget


def _buckets(prompts: Sequence[np.ndarray], batch_size: int, most: float = math.inf) -> Iterator[list[int]]:
    """Indices in batches of like prompt lengths: none is longer than twice another, or it would pad all the others.

    Args:
        prompts: token ids.
        batch_size: prompts of a batch, at most.
        most: ids of a batch with its padding, at most; a prompt longer than that is alone.
    """
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        length = len(prompts[i])
        full = len(batch) == batch_size or (len(batch) + 1) * length > most
        if batch and (full or length > 2 * len(prompts[batch[0]])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _mask(model: PreTrainedModel, ids: np.ndarray) -> torch.Tensor:
    rows = model.get_output_embeddings().weight.shape[0]
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.from_numpy(ids)] = True
    return mask.to(model.device)


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:7], "big")
