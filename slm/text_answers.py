"""A text LLM's own answers to written requests: greedy, in batches, in the words of the LLM's chat template.

A base LLM has none and goes on with a text rather than answers it; shown a few requests with their answers it goes on
with an answer (Brown et al. 2020, arXiv 2005.14165), and then with a next request: its answer is one line.

Shapes: B requests, L tokens of the longest of them; shorter ones are padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextAnswer:
    """An answer without special tokens and surrounding space, and whether the LLM ended it or it was cut off."""

    text: str
    ended: bool


@dataclass(frozen=True)
class Request:
    """What is asked, and other requests with their answers that are shown in front of it."""

    text: str
    examples: tuple[tuple[str, str], ...] = ()


def request_ids(tokenizer: PreTrainedTokenizerBase, request: Request) -> list[int]:
    """The ids that an answer follows: the chat template around the turns, or without one their text and a line break.

    Text that spells a special token stays text.
    """
    if tokenizer.chat_template:
        turns = [(("user", asked), ("assistant", answer)) for asked, answer in request.examples]
        said = [*(turn for pair in turns for turn in pair), ("user", request.text)]
        messages = [{"role": role, "content": text} for role, text in said]
        plain = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
        return list(tokenizer.apply_chat_template(messages, **plain)["input_ids"])
    text = "".join(f"{asked}\n{answer}\n\n" for asked, answer in request.examples) + f"{request.text}\n"
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), *ids]


@torch.no_grad()
def answer_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    max_new_tokens: int,
    one_line: bool = False,
) -> list[TextAnswer]:
    """Greedy answers, which depend on the requests alone; batches equal singles up to rounding.

    Args:
        model: a causal LM.
        tokenizer: its text tokenizer.
        requests: B of them.
        max_new_tokens: where an answer without an end is cut.
        one_line: an answer ends with its line.

    Returns:
        B answers.

    Raises:
        ValueError: a request and its answer do not fit into the model's positions.
    """
    ids = [request_ids(tokenizer, request) for request in requests]
    longest = max(map(len, ids))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and longest + max_new_tokens > limit:
        raise ValueError(
            f"a request of {longest} tokens and an answer of {max_new_tokens} do not fit into the model's {limit} "
            "positions; lower max_new_tokens, or take a model that reads more"
        )
    end = tokenizer.eos_token_id
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end or 0)
    rows = torch.tensor([[filler] * (longest - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=model.device)
    ends = model.generation_config.eos_token_id  # one or several
    ends = end if ends is None else ends
    stops = _line_ends(tokenizer) if one_line else []
    ends = [*(ends if isinstance(ends, list) else [] if ends is None else [ends]), *stops]
    made = model.generate(
        rows,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=filler,
    )
    made = made[:, longest:]
    ended = torch.isin(made, torch.tensor(ends, device=model.device)).any(dim=1)
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    answers = []
    for text, end in zip(texts, ended.tolist(), strict=True):
        line, broken, _ = text.partition("\n") if one_line else (text, "", "")
        answers.append(TextAnswer(line.strip(), bool(end or broken)))
    return answers


def _line_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of one and two line breaks, where each is a token; others are found in the text."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", "\n\n")]
    return sorted({row[0] for row in ids if len(row) == 1 and row[0] != tokenizer.unk_token_id})
