"""A text LLM's own answers to written requests: greedy, in batches, in the words of the LLM's chat template.

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


def request_ids(tokenizer: PreTrainedTokenizerBase, request: str) -> list[int]:
    """The ids that an answer follows: the chat template around the request, or without one its text and a line break.

    Text that spells a special token stays text.
    """
    if tokenizer.chat_template:
        plain = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
        return list(tokenizer.apply_chat_template([{"role": "user", "content": request}], **plain)["input_ids"])
    ids = tokenizer(f"{request}\n", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), *ids]


@torch.no_grad()
def answer_requests(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[str], max_new_tokens: int
) -> list[TextAnswer]:
    """Greedy answers, which depend on the requests alone; batches equal singles up to rounding.

    Args:
        model: a causal LM.
        tokenizer: its text tokenizer.
        requests: B texts.
        max_new_tokens: where an answer without an end is cut.

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
    made = model.generate(
        rows,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=filler,
    )
    made = made[:, longest:]
    ended = torch.isin(made, torch.tensor([] if ends is None else ends, device=model.device)).any(dim=1)
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    return [TextAnswer(text.strip(), bool(row)) for text, row in zip(texts, ended.tolist(), strict=True)]
