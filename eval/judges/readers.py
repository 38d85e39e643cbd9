"""How a judge's model is read: generate (alone or with the CTC head), the CTC head, a CTC model. Clips -> texts.

Shapes: B clips, S samples, T encoder frames, D width, V vocabulary, L text tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from eval.judges.config import JudgeConfig, JudgeError
from eval.judges.joint import CTCPrefixScores
from eval.judges.no_speech import (
    CHARACTERS_A_TOKEN,
    StopAtRepetition,
    WhisperConfidence,
    is_no_speech,
    without_repeated_tail,
)

CTC_HEAD_FILE = "ctc_head.safetensors"
OPEN_WINDOW_S = 30.0  # pieces for models that have no window of their own
Reader = Callable[[list[np.ndarray]], list[str]]


@contextmanager
def quiet_whisper() -> Iterator[None]:
    """Drops two notices: Whisper's own generate hands the library's two kinds of settings, and needs no attention mask
    (its features are padded by sound, to the whole window)."""
    logger = logging.getLogger("transformers.generation.utils")
    dropped = ("Passing `generation_config` together with", "The attention mask is not set")

    def keep(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(dropped)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def seq2seq_reader(
    model: Any,
    features: Callable[..., dict[str, torch.Tensor]],
    tokenizer: Any,
    config: JudgeConfig,
    rate: int,
    whisper: bool,
    language: str | None,
) -> Reader:
    """Reads by `generate`, with the CTC head's say where decoding is joint; `language` is `spoken_language`'s."""
    settings = model.generation_config
    for key in ("suppress_tokens", "begin_suppress_tokens"):
        # Whisper's configuration suppresses ids of its own vocabulary by default; a smaller one does not have them.
        kept = [i for i in getattr(settings, key, None) or [] if 0 <= i < model.config.vocab_size]
        setattr(settings, key, kept or None)
    settings.max_length = None
    extra: dict[str, Any] = {"return_timestamps": False} if whisper else {}
    joint = config.decoding == "joint"
    head = CTCHead(model, Path(config.name), tokenizer.pad_token_id) if joint else None
    if language is not None:
        extra |= {"language": None if language == "auto" else language, "task": "transcribe"}
    # Only Whisper's own vocabulary has a token for no speech, before the one that turns timestamps off.
    rule = config.no_speech != "off"
    sure = whisper and rule and getattr(settings, "no_timestamps_token_id", None) is not None
    confidence = WhisperConfidence(model) if sure else None
    scale = CHARACTERS_A_TOKEN if median(map(len, tokenizer.get_vocab())) == 1 else 1
    if rule:
        extra["stopping_criteria"] = StoppingCriteriaList([StopAtRepetition(scale)])
    # Room for the prompt: start, language, task, no timestamps.
    room = max(1, (getattr(model.config, "max_target_positions", None) or 448) - 8)
    eos, special = settings.eos_token_id, set(tokenizer.all_special_ids)

    def bound(n_samples: int) -> int:
        return min(room, 10 + math.ceil(config.max_tokens_per_second * n_samples / rate))

    def read(clips: list[np.ndarray]) -> list[str]:
        bounds = [bound(len(clip)) for clip in clips]
        # Beams depend on the bound itself, which must then not depend on the company a clip is in.
        longest = max(bounds) if config.num_beams == 1 else bound(round(OPEN_WINDOW_S * rate))
        # Whisper's generate adds its prompt to `max_length`, and warns about its own default beside `max_new_tokens`.
        limit = {"max_length" if whisper else "max_new_tokens": longest}
        inputs = features(clips, attention_mask=not whisper)
        with torch.inference_mode(), quiet_whisper():
            if head is not None:
                scores = head(inputs["input_features"]).log_softmax(-1)
                second = CTCPrefixScores(scores, head.blank, eos, config.ctc_weight)
                extra["logits_processor"] = LogitsProcessorList([second])
            output = model.generate(**inputs, num_beams=config.num_beams, do_sample=False, **limit, **extra)  # (B, L)
        answers = []
        for ids, length in zip(output.tolist(), bounds, strict=True):
            # The batch ran under its longest clip's bound; each answer is cut to its own, so batching changes nothing.
            start = next((i for i, token in enumerate(ids) if token not in special), len(ids))
            answer = ids[start : start + length]
            if eos in answer:
                answer = answer[: answer.index(eos)]
            answers.append(without_repeated_tail(answer, scale) if rule else answer)
        texts = [to_text(tokenizer, answer) for answer in answers]
        if confidence is not None:
            with torch.inference_mode():
                prompts = _prompts(model, inputs["input_features"], language)
                sure_of = confidence(answers, prompts)
            texts = ["" if is_no_speech(*values) else text for text, values in zip(texts, sure_of, strict=True)]
        return texts

    return read


def _prompts(model: Any, input_features: torch.Tensor, language: str | None) -> list[list[int]]:
    """Language and task of each clip, as a Whisper is prompted; empty where it knows one language."""
    settings = model.generation_config
    if language is None:
        return [[] for _ in input_features]
    task = settings.task_to_id["transcribe"]
    if language == "auto":
        return [[int(i), task] for i in model.detect_language(input_features)]
    return [[settings.lang_to_id[f"<|{language}|>"], task] for _ in input_features]


def to_text(tokenizer: Any, ids: list[int], **options: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False, **options)


def collapse(ids: list[int], blank: int) -> list[int]:
    """Greedy CTC: repeats become one, then blanks go."""
    return [token for i, token in enumerate(ids) if token != blank and (i == 0 or token != ids[i - 1])]


class CTCHead:
    """The CTC head of a recogniser's folder, on its encoder: mel spectrograms (B, M, 2 T) -> logits (B, T, V).

    Raises:
        JudgeError: the head's file does not fit the model.
    """

    def __init__(self, model: Any, folder: Path, blank: int) -> None:
        from safetensors.torch import load_file

        self.encoder, self.blank = model.get_encoder(), blank
        head = {key: value.to(model.device, torch.float32) for key, value in load_file(folder / CTC_HEAD_FILE).items()}
        if head.keys() != {"weight", "bias"} or head["weight"].shape[1] != model.config.d_model:
            raise JudgeError(f"{folder / CTC_HEAD_FILE} must hold `weight` (V, {model.config.d_model}) and `bias` (V,)")
        self.weight, self.bias = head["weight"], head["bias"]

    def __call__(self, input_features: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(self.encoder(input_features).last_hidden_state, self.weight, self.bias)


def ctc_head_reader(
    model: Any, features: Callable[..., dict[str, torch.Tensor]], tokenizer: Any, folder: Path
) -> Reader:
    head = CTCHead(model, folder, tokenizer.pad_token_id)

    def read(clips: list[np.ndarray]) -> list[str]:
        with torch.inference_mode():
            best = head(features(clips)["input_features"]).argmax(-1)  # (B, T)
        # The whole window is read: a head trained on padded clips may place a last letter in the silence after the end.
        return [to_text(tokenizer, collapse(ids, head.blank)) for ids in best.tolist()]

    return read


def ctc_reader(model: Any, features: Callable[..., dict[str, torch.Tensor]], tokenizer: Any, extractor: Any) -> Reader:
    from transformers import Wav2Vec2CTCTokenizer

    blank = model.config.pad_token_id if model.config.pad_token_id is not None else tokenizer.pad_token_id
    # This tokenizer would merge repeats again, and write "helo" for "hel<blank>lo".
    options = {"group_tokens": False} if isinstance(tokenizer, Wav2Vec2CTCTokenizer) else {}

    def read(clips: list[np.ndarray]) -> list[str]:
        # Models trained without attention mask (group norm over time) hear the padding: they read one by one.
        groups = [clips] if extractor.return_attention_mask else [[clip] for clip in clips]
        texts = []
        for group in groups:
            with torch.inference_mode():
                best = model(**features(group)).logits.argmax(-1)  # (B, T)
            longest = max(len(clip) for clip in group)
            for ids, clip in zip(best.tolist(), group, strict=True):
                valid = math.ceil(len(ids) * len(clip) / longest)
                texts.append(to_text(tokenizer, collapse(ids[:valid], blank), **options))
        return texts

    return read
