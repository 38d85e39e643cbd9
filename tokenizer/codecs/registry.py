"""Kinds of codec by the `model_type` of their config.json."""

from __future__ import annotations

from tokenizer.codecs.base import Codec
from tokenizer.model.configuration import LMSPTConfig

# model_type -> the wrapper that holds the model to the codec protocol
CODECS: dict[str, type[Codec]] = {}


def register_codec(model_type: str, wrapper: type[Codec]) -> None:
    """Makes a kind of codec known to `load_tokenizer`, and so to every command that takes a tokenizer.

    The model itself is registered with transformers: `AutoConfig.register` and `AutoModel.register`.

    Args:
        model_type: as config.json names it.
        wrapper: called with the loaded model and the number of books to use (None: all); raises ValueError where it
            cannot be used.

    Raises:
        ValueError: the model type is taken by another wrapper.
    """
    if model_type == LMSPTConfig.model_type or CODECS.get(model_type, wrapper) is not wrapper:
        raise ValueError(f"model type {model_type!r} is registered already: give the codec's config another model_type")
    CODECS[model_type] = wrapper
