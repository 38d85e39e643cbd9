"""An SLM whose answers are written down beforehand: what it says next is a function of what it has said so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from slm_tiny import CODES, FINGERPRINT, tiny_model, tiny_tokenizer
from transformers import LogitsProcessorList, PreTrainedModel

from slm.decoding.row_rules import LegalIds
from slm.generation import SpeechLM
from slm.model.speech_rows import extend_with_speech
from slm.trained_on import TrainedOn
from slm.vocabulary import add_speech

KNOWN = TrainedOn(
    " abcdefghijklmnopqrstuvwxyz", 40, 3.0, (8.0, 12.5, 25.0), shortest_text=8, longest_loop_s=0.4, longest_text_loop=4
)
# From the prompt's ids and the answer's so far to the next id; None is the model's own choice, a float what all of its
# scores become.
Script = Callable[[list[int], list[int]], int | float | None]


def scripted(script: Script, known: TrainedOn | None = KNOWN) -> SpeechLM:
    """A tiny model that follows a script; `model.forwards` lists how many rows each of its steps had."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("qwen2", len(tokenizer))
    facts = {"fingerprint": FINGERPRINT, "frame_rate": 12.5, "tokenizer": "tiny", "normaliser": "basic"}
    vocabulary = dataclasses.replace(add_speech(tokenizer, [CODES, CODES], **facts), trained_on=known)
    extend_with_speech(model, vocabulary, seed=0)
    follow(model, script)
    return SpeechLM(model, tokenizer, vocabulary)


def follow(model: PreTrainedModel, script: Script) -> None:
    """Makes a model follow a script, in the scores that it gives; what is legal, due or too much it does not know."""
    generate = model.generate
    model.forwards = []

    def scripted_generate(**arguments: Any) -> Any:
        own = arguments.pop("logits_processor")
        prompts = arguments["attention_mask"].argmax(dim=1).tolist()
        answers = next(one for one in own if isinstance(one, LegalIds)).starts  # of each row, behind its prompt

        def processor(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            model.forwards.append(len(input_ids))
            n_beams = len(input_ids) // len(prompts)
            for row, ids in enumerate(input_ids.tolist()):
                start = answers[row // n_beams]
                chosen = script(ids[prompts[row // n_beams] : start], ids[start:])
                if isinstance(chosen, float):
                    scores[row] = chosen
                elif chosen is not None:
                    scores[row, chosen] = 100.0
            return scores

        return generate(logits_processor=LogitsProcessorList([processor, *own]), **arguments)

    model.generate = scripted_generate
