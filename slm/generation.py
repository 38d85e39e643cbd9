"""From codes to text and from text to codes: batched, kept to legal ids, what did not end told and never repaired.

Shapes: B prompts of a batch; V ids; codes (n, F) of the n codebooks the model uses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slm.decoding.batching import buckets
from slm.decoding.decode import decode, decode_beams, decode_stream
from slm.decoding.multi_token import decode_multi_token
from slm.decoding.row_rules import Answer, FinishReason, Grammar, RowLimits
from slm.modeling import load_llm
from slm.settings import (
    GenerationError,
    SpeechLimits,
    SynthesizeSettings,
    TranscribeSettings,
    speech_limits,
    speech_loop_limit,
    text_loop_limit,
    tokens_allowed,
)
from slm.tasks import Task, TaskError, get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import make_prompt
from slm.tasks.styles import trained_wording
from slm.vocabulary import SpeechVocabulary, VocabularyError

# Why an answer of several stretches counts as ended: the worst of their reasons, which stand here from the best.
_WORST: tuple[FinishReason, ...] = ("stop", "length", "loop", "non_finite")


@dataclass(frozen=True)
class TranscribeOutput:
    """A transcript, why it ended, and how many tokens it is; `n_best`: the likeliest texts where several were asked."""

    text: str
    finish_reason: FinishReason
    n_tokens: int
    n_best: tuple[str, ...] = ()

    @property
    def truncated(self) -> bool:
        """Whether the model did not end it."""
        return self.finish_reason != "stop"


@dataclass(frozen=True)
class SynthesizeOutput:
    """(n, F) codes, F >= 1 unless the scores were not finite; why they ended, and in which attempt they were drawn.

    `n_passes` are the model's forward passes where one may give several tokens (`decoding.multi_token`); else 0.
    """

    codes: np.ndarray
    finish_reason: FinishReason
    attempts: int = 1
    n_passes: int = 0

    @property
    def truncated(self) -> bool:
        """Whether the model did not end them."""
        return self.finish_reason != "stop"


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


def transcribe_codes(
    speech_lm: SpeechLM, codes: Sequence[np.ndarray], settings: TranscribeSettings | None = None
) -> list[TranscribeOutput]:
    """Writes the text of each utterance: the task `asr`, asked in its first wording, if it was trained with some.

    Args:
        speech_lm: The model.
        codes: One (K, F) array per utterance, without padding, K at least the codebooks the model uses.
        settings: Decoding.

    Returns:
        One output per utterance, in order.
    """
    task = get_task("asr")
    wording = trained_wording(speech_lm.vocabulary, speech_lm.text_tokenizer, task)
    return generate_text(speech_lm, task, [UtteranceTokens(codes=item, wording=wording) for item in codes], settings)


def synthesize_codes(
    speech_lm: SpeechLM,
    texts: Sequence[str],
    settings: SynthesizeSettings | None = None,
    keys: Sequence[str] | None = None,
) -> list[SynthesizeOutput]:
    """Draws the speech tokens of each text: the task `tts`, asked in its first wording, if it was trained with some.

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
    task, text_tokenizer = get_task("tts"), speech_lm.text_tokenizer
    wording = trained_wording(vocabulary, text_tokenizer, task)
    utterances = [UtteranceTokens(text=vocabulary.encode_text(text_tokenizer, text), wording=wording) for text in texts]
    limits = [speech_limits(vocabulary, text, settings) for text in texts]
    return generate_speech(speech_lm, task, utterances, limits, settings, texts if keys is None else keys)


def generate_text(
    speech_lm: SpeechLM,
    task: Task,
    utterances: Sequence[UtteranceTokens],
    settings: TranscribeSettings | None = None,
    keys: Sequence[str] | None = None,
) -> list[TranscribeOutput]:
    """Writes the answers of a task that answers in text.

    Args:
        speech_lm: The model.
        task: Whose prompts.
        utterances: What the prompts are made of. An answer's budget of tokens follows from the speech and text that
            its prompt holds.
        settings: Decoding.
        keys: What, beside the seed, decides each answer's random stream; their numbers by default.

    Returns:
        One output per utterance, in order.

    Raises:
        GenerationError: The task answers in speech.
        TaskError: An utterance lacks a part of the prompt.
    """
    _check_modality(task, "text")
    settings = settings or TranscribeSettings()
    vocabulary, model, text_tokenizer = speech_lm.vocabulary, speech_lm.model, speech_lm.text_tokenizer
    keys = _numbers(utterances) if keys is None else keys
    prompts = [make_prompt(vocabulary, task, item) for item in utterances]
    limits = [RowLimits(tokens_allowed(vocabulary, task, item, settings)) for item in utterances]
    legal = [_mask(model, vocabulary.text_ids(text_tokenizer))]
    grammar = Grammar(legal, vocabulary.end_id, loop_limit=text_loop_limit(vocabulary, settings))
    most = settings.batch_seconds * vocabulary.frame_rate * vocabulary.ids_per_frame
    asked = (model, prompts, grammar, limits)
    if settings.num_beams > 1:
        found = _beams(*asked, settings, most)
    else:
        drawn = _sampling(settings, settings.seed, keys)
        found = [[answer] for answer in decode(*asked, batch_size=settings.batch_size, most=most, **drawn)]
    outputs = []
    for answers in found:
        texts = tuple(_text(text_tokenizer, answer) for answer in answers)
        n_best = texts if settings.n_best > 1 else ()
        outputs.append(TranscribeOutput(texts[0], answers[0].finish_reason, len(answers[0].ids), n_best))
    return outputs


def generate_speech(
    speech_lm: SpeechLM,
    task: Task,
    utterances: Sequence[UtteranceTokens],
    limits: Sequence[SpeechLimits],
    settings: SynthesizeSettings | None = None,
    keys: Sequence[str] | None = None,
) -> list[SynthesizeOutput]:
    """Draws the answers of a task that answers in speech.

    Args:
        speech_lm: The model.
        task: Whose prompts.
        utterances: What the prompts are made of. Of a task with prosody that which an utterance has is taken; where it
            has none, it is drawn (:func:`draw_prosody`).
        limits: How long each answer may be and must be; of a task by word each of its words.
        settings: Decoding. With `retries` an answer that the model did not end is drawn again with the next seed, and
            the last attempt counts.
        keys: What, beside the seed, decides each answer's random stream; their numbers by default.

    Returns:
        One output per utterance, in order.

    Raises:
        GenerationError: The task answers in text, or is by word or with prosody and guidance is set.
        TaskError: An utterance lacks a part of the prompt.
    """
    _check_modality(task, "speech")
    settings = settings or SynthesizeSettings()
    if task.by_word and settings.guidance > 1:
        raise GenerationError(f"synthesising: guidance: {task.name} gives its words in the answer; set it to 1")
    if task.answer_holds_prosody and settings.guidance > 1:
        raise GenerationError(f"synthesising: guidance: {task.name} begins with prosody, not speech; set it to 1")
    draw = _draw_words if task.by_word else _draw_speech
    keys = _numbers(utterances) if keys is None else keys
    prompts = _speech_prompts(speech_lm, task, utterances, settings, keys)
    guided = settings.guidance > 1
    bare = [make_prompt(speech_lm.vocabulary, task, item, bare=True) for item in utterances] if guided else []
    unsaid = SynthesizeOutput(np.zeros((speech_lm.vocabulary.n_codebooks, 0), dtype=np.int64), "non_finite")
    outputs = [unsaid if prompt is None else None for prompt in prompts]
    todo = [i for i, prompt in enumerate(prompts) if prompt is not None]
    for attempt in range(1 + settings.retries):
        arguments = (
            speech_lm,
            [prompts[i] for i in todo],
            [bare[i] for i in todo] if guided else None,
            [limits[i] for i in todo],
            settings,
            settings.seed + attempt,
            [keys[i] for i in todo],
        )
        answers = draw(*arguments, [utterances[i].words for i in todo]) if task.by_word else draw(*arguments)
        for i, answer in zip(todo, answers, strict=True):
            codes = speech_lm.vocabulary.codes_from_ids(answer.ids, answer.further)
            outputs[i] = SynthesizeOutput(codes, answer.finish_reason, attempt + 1, answer.n_passes)
        todo = [i for i in todo if outputs[i].truncated]
    return outputs


def draw_prosody(
    speech_lm: SpeechLM,
    task: Task,
    utterances: Sequence[UtteranceTokens],
    settings: SynthesizeSettings | None = None,
    keys: Sequence[str] | None = None,
) -> list[np.ndarray | None]:
    """Draws the prosody with which a task's answers begin: of each word a token of each feature, in their order.

    Args:
        speech_lm: The model.
        task: One whose answers begin with prosody.
        utterances: What the prompts are made of, with the `words` of their texts.
        settings: Decoding.
        keys: As of :func:`generate_speech`.

    Returns:
        (W, 3) bins of each utterance, in order; None where the model's scores were not finite.

    Raises:
        TaskError: An utterance lacks a part of the prompt, or its words.
    """
    settings, vocabulary, model = settings or SynthesizeSettings(), speech_lm.vocabulary, speech_lm.model
    keys = _numbers(utterances) if keys is None else keys
    if any(not one.words for one in utterances):
        raise TaskError(f"task {task.name}: an utterance without words, each of which has its prosody")
    prompts = [make_prompt(vocabulary, task, one) for one in utterances]
    grammar = Grammar([_mask(model, ids) for ids in vocabulary.prosody_ids()], vocabulary.speech_id)
    n_ids = [len(one.words) * len(grammar.legal) for one in utterances]
    # Not to end before its budget is spent: the mark that opens the speech is given.
    limits = [RowLimits(n, least=n + 1) for n in n_ids]
    drawn = _sampling(settings, settings.seed, [f"{key} prosody" for key in keys])
    found = decode(model, prompts, grammar, limits, batch_size=settings.batch_size, **drawn)
    return [None if one.finish_reason == "non_finite" else vocabulary.prosody_from_ids(one.ids) for one in found]


def stream_speech(
    speech_lm: SpeechLM,
    task: Task,
    utterance: UtteranceTokens,
    limits: SpeechLimits,
    settings: SynthesizeSettings | None = None,
    key: str = "0",
    chunk_s: float = 0.5,
) -> Iterator[SynthesizeOutput]:
    """Draws one answer and gives its codes while it does; without retries the same codes as :func:`generate_speech`.

    Args:
        speech_lm: The model.
        task: Whose prompt.
        utterance: What the prompt is made of.
        limits: How long the answer may be and must be.
        settings: Decoding.
        key: What, beside the seed, decides the random stream.
        chunk_s: Seconds of speech that are waited for.

    Yields:
        The codes that are new, (n, f), f >= 0; `finish_reason` is `going` but for the last.

    Raises:
        GenerationError: The task answers in text, is by word or with prosody, or `retries` are set: what was given
            cannot be taken back.
        TaskError: The utterance lacks a part of the prompt.
    """
    _check_modality(task, "speech")
    settings, vocabulary = settings or SynthesizeSettings(), speech_lm.vocabulary
    if task.by_word or task.answer_holds_prosody:
        raise GenerationError(f"synthesising: {task.name} is not streamed; call generate_speech")
    if settings.multi_token > 1:
        raise GenerationError("synthesising: multi_token: a stream gives a token a pass so far; set it to 1")
    if settings.retries:
        raise GenerationError("synthesising: retries: what a stream has given cannot be taken back; set it to 0")
    prompt, bare = (make_prompt(vocabulary, task, utterance, bare=bare) for bare in (False, True))
    every = max(1, round(chunk_s * vocabulary.frame_rate)) * vocabulary.ids_per_frame
    drawn = _sampling(settings, settings.seed, [key])
    drawn["seed"] = drawn.pop("seeds", [None])[0]
    if settings.guidance > 1:
        drawn |= {"bare_prompt": bare, "guidance": settings.guidance}
    n_given = 0
    grammar, rows = _speech_grammar(speech_lm, settings), limits.rows(vocabulary)
    for answer in decode_stream(speech_lm.model, prompt, grammar, rows, every, **drawn):
        codes = vocabulary.codes_from_ids(answer.ids, answer.further)
        yield SynthesizeOutput(codes[:, n_given:], answer.finish_reason)
        n_given = codes.shape[1]


def _speech_prompts(
    speech_lm: SpeechLM,
    task: Task,
    utterances: Sequence[UtteranceTokens],
    settings: SynthesizeSettings,
    keys: Sequence[str],
) -> list[np.ndarray | None]:
    """What stands before the first code of each answer; None where the scores of its prosody were not finite."""
    vocabulary = speech_lm.vocabulary
    prompts = [make_prompt(vocabulary, task, item) for item in utterances]
    if not task.answer_holds_prosody:
        return prompts
    if vocabulary.further_sizes:
        raise GenerationError(
            f"synthesising: with prosody there is no pattern={vocabulary.pattern.name}; train with semantic or flatten"
        )
    bins = [item.prosody for item in utterances]
    unwritten = [i for i, own in enumerate(bins) if own is None]
    asked = ([utterances[i] for i in unwritten], settings, [keys[i] for i in unwritten])
    for i, own in zip(unwritten, draw_prosody(speech_lm, task, *asked), strict=True):
        bins[i] = own
    return [
        None if own is None else np.concatenate([prompt, vocabulary.ids_from_prosody(own), [vocabulary.speech_id]])
        for prompt, own in zip(prompts, bins, strict=True)
    ]


def _speech_grammar(speech_lm: SpeechLM, settings: SynthesizeSettings) -> Grammar:
    vocabulary = speech_lm.vocabulary
    legal = [_mask(speech_lm.model, ids) for ids in vocabulary.speech_ids()]
    loop_limit = speech_loop_limit(vocabulary, settings)
    late = vocabulary.late if vocabulary.further_sizes else None
    tail = len(vocabulary.further_sizes) * (late or 0)
    return Grammar(legal, vocabulary.speech_end_id, vocabulary.ids_per_frame, loop_limit, tail, late)


def _draw_speech(
    speech_lm: SpeechLM,
    prompts: Sequence[np.ndarray],
    bare: Sequence[np.ndarray] | None,
    limits: Sequence[SpeechLimits],
    settings: SynthesizeSettings,
    seed: int,
    keys: Sequence[str],
) -> list[Answer]:
    vocabulary, model = speech_lm.vocabulary, speech_lm.model
    rows = [one.rows(vocabulary) for one in limits]
    grammar = _speech_grammar(speech_lm, settings)
    if settings.multi_token == 1:
        sampling = _sampling(settings, seed, keys)
        if bare is not None:
            sampling |= {"bare_prompts": bare, "guidance": settings.guidance}
        return decode(model, prompts, grammar, rows, batch_size=settings.batch_size, **sampling)
    answers: list[Answer | None] = [None] * len(prompts)
    proposing = (settings.multi_token, settings.multi_token_verify)
    for batch in buckets([len(prompt) for prompt in prompts], settings.batch_size):
        sampling = _sampling(settings, seed, [keys[i] for i in batch])
        of_batch = (model, [prompts[i] for i in batch], grammar, [rows[i] for i in batch])
        for i, answer in zip(batch, decode_multi_token(*of_batch, *proposing, **sampling), strict=True):
            answers[i] = answer
    return answers


def _draw_words(
    speech_lm: SpeechLM,
    prompts: Sequence[np.ndarray],
    bare: None,
    limits: Sequence[SpeechLimits],
    settings: SynthesizeSettings,
    seed: int,
    keys: Sequence[str],
    words: Sequence[Sequence[np.ndarray]],
) -> list[Answer]:
    """Gives each word in its turn: the first stands in the prompt, with the mark that opens its speech.

    A word that the model does not end is cut where its limit or a loop ends it, and the next is given; the answer's
    reason says so. What came before is read anew with each word.
    """
    vocabulary, prompts = speech_lm.vocabulary, list(prompts)
    if vocabulary.further_sizes:
        raise GenerationError(
            f"synthesising: word by word there is no pattern={vocabulary.pattern.name}; train with semantic or flatten"
        )
    ids: list[list[int]] = [[] for _ in prompts]
    n_passes = [0] * len(prompts)
    reasons: list[FinishReason] = ["stop"] * len(prompts)
    for number in range(max(map(len, words))):
        going = [i for i, own in enumerate(words) if number < len(own) and reasons[i] != "non_finite"]
        if not going:
            break
        batch = ([prompts[i] for i in going], None, [limits[i] for i in going])
        said = _draw_speech(speech_lm, *batch, settings, seed, [f"{keys[i]} word {number}" for i in going])
        for i, one in zip(going, said, strict=True):
            whole = len(one.ids) // vocabulary.ids_per_frame * vocabulary.ids_per_frame  # the next word begins a frame
            drawn = one.ids[:whole]
            ids[i] += drawn
            n_passes[i] += one.n_passes
            reasons[i] = max(reasons[i], one.finish_reason, key=_WORST.index)
            following = words[i][number + 1 : number + 2]
            opening = [vocabulary.speech_end_id, *(k for word in following for k in word), vocabulary.speech_id]
            prompts[i] = np.concatenate([prompts[i], drawn, opening]).astype(np.int64)
    parts = zip(ids, reasons, n_passes, strict=True)
    return [Answer(own, reason, n_passes=passes) for own, reason, passes in parts]


def _sampling(settings: TranscribeSettings | SynthesizeSettings, seed: int, keys: Sequence[str]) -> dict[str, Any]:
    """The arguments of `decode` that draw, with a stream of its own for each key; none where it is greedy."""
    if not settings.temperature:
        return {}
    warped = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")}
    return {"seeds": [_seed(seed, key) for key in keys]} | warped


def _beams(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    grammar: Grammar,
    limits: Sequence[RowLimits],
    settings: TranscribeSettings,
    most: float,
) -> list[list[Answer]]:
    """The likeliest answers of each prompt, batch by batch: a beam's rows end together."""
    found: list[list[Answer]] = [[] for _ in prompts]
    for batch in buckets([len(prompt) for prompt in prompts], settings.batch_size, most):
        of_batch = (model, [prompts[i] for i in batch], grammar, [limits[i] for i in batch])
        for i, answers in zip(batch, decode_beams(*of_batch, settings.num_beams, settings.n_best), strict=True):
            found[i] = answers
    return found


def _numbers(items: Sequence[Any]) -> list[str]:
    return [str(number) for number in range(len(items))]


def _text(text_tokenizer: PreTrainedTokenizerBase, answer: Answer) -> str:
    decoded = text_tokenizer.decode(answer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return decoded.strip()


def _check_modality(task: Task, modality: str) -> None:
    if task.answers != modality:
        other = "generate_speech" if task.answers == "speech" else "generate_text"
        raise GenerationError(f"task {task.name} answers in {task.answers}: call {other}")


def _mask(model: PreTrainedModel, ids: np.ndarray) -> torch.Tensor:
    rows = model.get_output_embeddings().weight.shape[0]
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.from_numpy(ids)] = True
    return mask.to(model.device)


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:7], "big")
