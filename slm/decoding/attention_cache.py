"""The keys and values that attention keeps of what a model has read: in room to grow, and of two batches put together.

Shapes: B rows; H heads; W slots of the cache, those of a shorter row's padding on the left; D width of a head.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

ATTENTION = {"full_attention", "sliding_attention"}  # kinds of layers that keep keys and values, slot by slot
SPARE = 64  # slots that a layer takes at once


def only_attention(model: PreTrainedModel) -> bool:
    """Whether all that a model keeps are keys and values: no layer has a state, which has no slots."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    return not getattr(model, "_is_stateful", False) and kinds <= ATTENTION


class SpareLayer(DynamicLayer):
    """A layer that writes what is new behind what it has, in slots to spare.

    `DynamicLayer` copies all that it has for each token: most of a step's time where many rows are decoded at once.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._room: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes the keys and values (B, H, n, D) of n new slots; returns those of all slots."""
        if not self.get_seq_length():
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = self._with("keys", key_states), self._with("values", value_states)
        return self.keys, self.values

    def _with(self, name: str, new: Tensor) -> Tensor:
        own, room = getattr(self, name), self._room.get(name)
        length, end = own.shape[2], own.shape[2] + new.shape[2]
        # Whoever gave the layer other rows or slots since gave it other tensors.
        if room is None or own.data_ptr() != room.data_ptr() or len(own) != len(room) or end > room.shape[2]:
            room = self._room[name] = F.pad(own, (0, 0, 0, end - length + SPARE))
        room[:, :, length:end] = new
        return room[:, :, :end]


def new_cache(model: PreTrainedModel) -> dict[str, Cache]:
    """An empty cache of a model that keeps attention alone, by the name of the argument that takes it."""
    cache = DynamicCache(config=model.config.get_text_config())
    cache.layers = [SpareLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return {cache_name(model): cache}


def cache_name(model: PreTrainedModel) -> str:
    """The argument of a model that takes its cache, by transformers' version."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def move(cache: Cache, n: int) -> None:
    """Puts n slots of padding on the left; takes as many off below 0. A window keeps no more slots than it sees."""
    for layer in cache.layers:
        if not layer.get_seq_length():
            continue  # reads another layer's
        slots = layer.get_seq_length() + n
        if layer.is_sliding:
            layer.cumulative_length = slots
            slots = min(slots, layer.sliding_window - 1)
        more = slots - layer.keys.shape[-2]
        layer.keys, layer.values = (F.pad(own, (0, 0, more, 0)) for own in (layer.keys, layer.values))


def join(cache: Cache, other: Cache) -> None:
    """Puts another's rows, of the same width, behind a cache's own."""
    for layer, its in zip(cache.layers, other.layers, strict=True):
        if layer.get_seq_length():
            layer.keys = torch.cat([layer.keys, its.keys])
            layer.values = torch.cat([layer.values, its.values])
