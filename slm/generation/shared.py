"""What all answers share: whether a task gives them, which ids are legal, and each answer's random stream."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from slm.decoding.row_rules import Grammar
from slm.generation.speech_lm import SpeechLM
from slm.settings import GenerationError, SynthesizeSettings, TranscribeSettings, speech_loop_limit
from slm.tasks import Task


def check_modality(task: Task, modality: str) -> None:
    """Raises GenerationError where a task answers in the other."""
    if task.answers != modality:
        other = "generate_speech" if task.answers == "speech" else "generate_text"
        raise GenerationError(f"task {task.name} answers in {task.answers}: call {other}")


def check_speech(task: Task, settings: SynthesizeSettings) -> None:
    """Raises GenerationError where a task does not answer in speech, or not with these settings."""
    check_modality(task, "speech")
    if task.by_word and settings.guidance > 1:
        raise GenerationError(f"synthesising: guidance: {task.name} gives its words in the answer; set it to 1")
    if task.answer_holds_prosody and settings.guidance > 1:
        raise GenerationError(f"synthesising: guidance: {task.name} begins with prosody, not speech; set it to 1")


def legal_mask(model: PreTrainedModel, ids: np.ndarray) -> torch.Tensor:
    """(V,) bool, True at the ids, on the model's device."""
    rows = model.get_output_embeddings().weight.shape[0]
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.from_numpy(ids)] = True
    return mask.to(model.device)


def speech_grammar(speech_lm: SpeechLM, settings: SynthesizeSettings) -> Grammar:
    """What an answer in codes is made of."""
    vocabulary = speech_lm.vocabulary
    legal = [legal_mask(speech_lm.model, ids) for ids in vocabulary.speech_ids()]
    loop_limit = speech_loop_limit(vocabulary, settings)
    late = vocabulary.late if vocabulary.further_sizes else None
    tail = len(vocabulary.further_sizes) * (late or 0)
    return Grammar(legal, vocabulary.speech_end_id, vocabulary.ids_per_frame, loop_limit, tail, late)


def sampling(settings: TranscribeSettings | SynthesizeSettings, seed: int, keys: Sequence[str]) -> dict[str, Any]:
    """The arguments of `decode` that draw, with a stream of its own for each key; none where it is greedy."""
    if not settings.temperature:
        return {}
    warped = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")}
    return {"seeds": [_seed(seed, key) for key in keys]} | warped


def sampling_of_one(settings: SynthesizeSettings, seed: int, key: str) -> dict[str, Any]:
    """The arguments of `decode_stream` that draw; none where it is greedy."""
    drawn = sampling(settings, seed, [key])
    if drawn:
        drawn["seed"] = drawn.pop("seeds")[0]
    return drawn


def default_keys(items: Sequence[Any]) -> list[str]:
    """The keys of answers that have no other."""
    return [str(number) for number in range(len(items))]


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:7], "big")
