"""What stands around a prompt: the ids before it, those between it and its answer, and the one that ends the answer."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from slm.text_tokens import special_ids

# Stand-ins for the two turns while a chat template is read; only their places matter.
_USER, _ASSISTANT = "USERTURNHERE", "ASSISTANTTURNHERE"


class PromptFormatError(ValueError):
    """A text tokenizer whose prompts and answers cannot be told apart; the message says why."""


def read_prompt_format(text_tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], int]:
    """Ids before a prompt, between prompt and answer, and the one that ends the answer.

    A chat template is rendered once, here, and kept as ids: some put today's date in, and training and generation must
    agree.

    Raises:
        PromptFormatError: An answer would have no end, or the template does not show both turns.
    """
    eos = text_tokenizer.eos_token_id
    if not text_tokenizer.chat_template:
        if eos is None:
            raise PromptFormatError(
                "the text tokenizer has no eos token and no chat template, so an answer would never end"
            )
        opening = text_tokenizer("")["input_ids"]
        return [i for i in opening[:1] if i == text_tokenizer.bos_token_id], [], eos
    turns = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}]
    rendered = text_tokenizer.apply_chat_template(turns, tokenize=False)
    if rendered.count(_USER) != 1 or rendered.count(_ASSISTANT) != 1:
        raise PromptFormatError("the model's chat template does not show a user's and an assistant's turn once each")
    before, rest = rendered.split(_USER)
    between, after = rest.split(_ASSISTANT)
    before_ids, between_ids, after_ids = (
        text_tokenizer(part, add_special_tokens=False)["input_ids"] if part else [] for part in (before, between, after)
    )
    if after_ids and after_ids[0] in special_ids(text_tokenizer):
        return before_ids, between_ids, after_ids[0]
    if eos is None:
        raise PromptFormatError(
            "the chat template ends a turn with no special token and the tokenizer has no eos token"
        )
    return before_ids, between_ids, eos
