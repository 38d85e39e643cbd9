"""Which of a text tokenizer's ids are text: its own pieces, and not what was added to it or is special."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedTokenizerBase

_ADDED: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, set[int]]] = WeakKeyDictionary()


def added_ids(text_tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids beside a tokenizer's own pieces, special or not: an instruct model's `<tool_call>` is not marked special."""
    size, ids = _ADDED.get(text_tokenizer, (-1, set()))
    if size != len(text_tokenizer):  # a property that builds thousands of objects, asked for each text
        ids = set(text_tokenizer.added_tokens_decoder)
        _ADDED[text_tokenizer] = len(text_tokenizer), ids
    return ids


def own_pieces(text_tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """A text's ids by the tokenizer's own model, which knows nothing of what was added."""
    backend = text_tokenizer.backend_tokenizer
    text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    pieces = [text] if backend.pre_tokenizer is None else [p for p, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return np.asarray([token.id for piece in pieces for token in backend.model.tokenize(piece)], dtype=np.int64)


def special_ids(text_tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that stand for no text."""
    added = {i for i, token in text_tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(text_tokenizer.all_special_ids)
