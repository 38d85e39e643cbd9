"""The attention of named heads from speech to the text that it says, read while a model runs; and a prior added to it.

transformers' attention modules look up by name the function that attends. While a reader is open, those of the layers
that are read find one that calls the model's own and then computes, from the queries and keys that it was given
(positions and norms already in them), the weights of the heads in question. So it is the same whatever attention the
model runs with, all else stays as it is, and nothing is left behind when the reader is closed.

Shapes: R rows of length L; N spoken texts, each with a sequence of its own in a row; of all together F positions from
which codes are predicted, S positions of a sequence, T tokens of text, at most; H heads of a layer, D their width; h
heads that are read.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slm.model.freezing import decoder_layers
from slm.training.alignment.config import AlignmentConfig
from slm.training.alignment.forward_sum import LOWEST, log_prior
from slm.training.config import TrainingError

KEY = "training.alignment"
NAME = "slm_attention_reader"  # what our function is called among transformers'
ROUNDING = 0.05  # of the largest of a head's outputs: bf16's, and the order of sums
Head = tuple[int, int]


@dataclass(frozen=True)
class Spoken:
    """The lines of a batch's `spoken` (N, 6), each (N,)."""

    rows: Tensor
    begins: Tensor
    text: Tensor
    tokens: Tensor
    speech: Tensor
    frames: Tensor

    @classmethod
    def of(cls, spoken: Tensor) -> Spoken:
        return cls(*spoken.unbind(1))


@dataclass
class Reading:
    """What an open reader has found, and what it adds: log of the attention of each layer's heads, (N, h, F, T)."""

    spoken: Spoken
    strength: float
    by_layer: dict[int, Tensor] = field(default_factory=dict)

    @property
    def log_attention(self) -> Tensor:
        """(N, h, F, T), heads in the reader's order."""
        return torch.cat([self.by_layer[layer] for layer in sorted(self.by_layer)], dim=1)


class AttentionReader:
    """Reads heads of a causal LM.

    Args:
        model: In transformers' own code; adapters may be in it, an engine that shards it not around it.
        heads: (layer, head), from 0.

    Raises:
        TrainingError: The model has no such layer or head, or another kind of attention.
        ModelError: It keeps its layers under a name that is not known.
    """

    def __init__(self, model: PreTrainedModel, heads: Sequence[Head]) -> None:
        self.heads = sorted(set(heads))
        layers = decoder_layers(model, KEY)
        count = model.config.get_text_config().num_attention_heads
        self._layers: list[_Layer] = []
        for number in dict.fromkeys(layer for layer, _ in self.heads):
            own = [head for layer, head in self.heads if layer == number]
            if number >= len(layers) or own[-1] >= count:
                raise TrainingError(
                    f"{KEY}: layer {number}, head {own[-1]} is none; the model has {len(layers)} layers of {count} "
                    "heads, both from 0"
                )
            self._layers.append(_Layer(number, own, _attention_of(layers[number])))

    @contextmanager
    def reading(self, spoken: Tensor, strength: float = 0.0) -> Iterator[Reading]:
        """While open, a forward pass of the model is read.

        Args:
            spoken: (N, 6) of the batch, as `slm.training.batches.pack` makes it.
            strength: The prior, times this, is added to the heads' scores of the text; 0 changes nothing in the model.
        """
        found = Reading(Spoken.of(spoken), strength)
        for layer in self._layers:
            layer.begin(found)
        try:
            yield found
        finally:
            for layer in self._layers:
                layer.end()


def heads_of(config: AlignmentConfig, model: PreTrainedModel) -> list[Head]:
    """The heads that a configuration names, those of whole layers too."""
    count = model.config.get_text_config().num_attention_heads
    whole = [(layer, head) for layer in config.layers for head in range(count)]
    return sorted({*whole, *(tuple(pair) for pair in config.heads)})


def _attention_of(layer: nn.Module) -> nn.Module:
    """The module of a layer that attends."""
    for module in layer.modules():
        if "Attention" in type(module).__name__ and hasattr(module, "config") and hasattr(module, "layer_idx"):
            return module
    raise TrainingError(f"{KEY}: {type(layer).__name__} has no attention to read; choose another layer or model")


class _Layer:
    """One layer's attention module, while it is read and while not."""

    def __init__(self, number: int, heads: list[int], module: nn.Module) -> None:
        self.number, self.heads, self.module = number, heads, module
        self.reading: Reading | None = None
        self.checked = False

    def begin(self, reading: Reading) -> None:
        self.reading, self.config = reading, self.module.config
        self.module.config = copy.copy(self.config)
        self.module.config._attn_implementation = NAME
        self.module.attention_reader = self

    def end(self) -> None:
        self.module.config, self.reading = self.config, None
        del self.module.attention_reader

    def own_attention(self, *args: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
        """What the model itself would have called, with its own arguments and results.

        Raises:
            TrainingError: The model runs eager attention by a function that its module does not name.
        """
        written_out = getattr(sys.modules[type(self.module).__module__], "eager_attention_forward", None)
        attend: Callable | None = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, written_out)
        if attend is None:
            raise TrainingError(f"{KEY}: not with eager attention of {type(self.module).__name__}; set attention=sdpa")
        ours, self.module.config = self.module.config, self.config
        try:
            return attend(self.module, *args, **settings)
        finally:
            self.module.config = ours

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> tuple[Tensor, Any]:
        """(R, L, H, D) as the model's own attention gives it, but for the heads that a prior is on."""
        output, weights = self.own_attention(query, key, value, mask, **settings)
        reading = self.reading
        with torch.autocast(query.device.type, enabled=False):
            places = _Places(reading.spoken, self.heads, query, key, settings.get("sliding_window"))
            scores = places.scores(query, key, settings.get("scaling"), settings.get("softcap"))
            if not self.checked:
                self._check(places, scores, value, output)
            if reading.strength:
                scores = scores + reading.strength * places.prior()[:, None]
            log_weights = scores.log_softmax(-1)
            if reading.strength:
                weighed = F.dropout(log_weights.exp(), settings.get("dropout", 0.0), self.module.training)
                output = places.put(output, places.outputs(weighed, value))
            reading.by_layer[self.number] = places.of_text(log_weights)
        return output, weights

    @torch.no_grad()
    def _check(self, places: _Places, scores: Tensor, value: Tensor, output: Tensor) -> None:
        """Raises TrainingError where the model's attention is another: with sinks, in chunks, by its own mask."""
        if self.module.training and getattr(self.module, "attention_dropout", 0.0):
            return  # which hides the difference
        ours, own = places.outputs(scores.softmax(-1), value)[places.inside], places.read(output).float()
        if (ours - own).abs().max() > ROUNDING * own.abs().max():
            raise TrainingError(
                f"{KEY}: {type(self.module).__name__} of layer {self.number} does more than attend by softmax to all "
                "that came before, so its weights cannot be read; choose another layer or model"
            )
        self.checked = True


class _Places:
    """Where in a layer's tensors the spoken texts are: each in its own sequence, whatever lies beside it in the row.

    Args:
        spoken: The texts.
        heads: Which heads are read.
        query: (R, H, L, D) of the layer.
        key: (R, H', L, D), a head of which several of the queries' may share.
        window: How far back the layer sees; None: all the way.
    """

    def __init__(self, spoken: Spoken, heads: Sequence[int], query: Tensor, key: Tensor, window: int | None) -> None:
        self.spoken, self.heads, device = spoken, list(heads), query.device
        self.shared = [head // (query.shape[1] // key.shape[1]) for head in heads]
        ends = spoken.speech + spoken.frames
        if window and bool((ends - spoken.text > window).any()):
            raise TrainingError(
                f"{KEY}: a layer that sees {window} positions back does not see the text any more; choose others"
            )
        frame = torch.arange(int(spoken.frames.max()), device=device)
        step = torch.arange(int((ends - spoken.begins).max()), device=device)
        token = torch.arange(int(spoken.tokens.max()), device=device)
        from_, to = spoken.speech[:, None] + frame, spoken.begins[:, None] + step  # (N, F), (N, S)
        self.allowed = to[:, None, :] <= from_[:, :, None]
        if window:
            self.allowed &= from_[:, :, None] - to[:, None, :] < window
        last = query.shape[2] - 1  # padding of a sequence may reach beyond the row
        self.queries, self.keys = from_.clamp_max(last), to.clamp_max(last)
        self.text = ((spoken.text - spoken.begins)[:, None] + token).clamp_max(len(step) - 1)  # (N, T) of S
        self.inside = frame < spoken.frames[:, None]
        self.at = spoken.rows[:, None].expand_as(self.queries)[self.inside], self.queries[self.inside]

    def _taken(self, states: Tensor, heads: list[int], positions: Tensor) -> Tensor:
        """(R, H, L, D) -> (N, positions, h, D) in fp32."""
        return states[:, heads].transpose(1, 2)[self.spoken.rows[:, None], positions].float()

    def scores(self, query: Tensor, key: Tensor, scaling: float | None, cap: float | None) -> Tensor:
        """(N, h, F, S) in fp32, lowest where a position does not see another."""
        asked, given = self._taken(query, self.heads, self.queries), self._taken(key, self.shared, self.keys)
        found = torch.einsum("nfhd,nshd->nhfs", asked, given) * (scaling or query.shape[-1] ** -0.5)
        found = torch.tanh(found / cap) * cap if cap else found
        return found.masked_fill(~self.allowed[:, None], LOWEST)

    def prior(self) -> Tensor:
        """(N, F, S): the log of the beta-binomial prior at the text's positions, against an even one; elsewhere 0."""
        prior = log_prior(self.spoken.frames, self.spoken.tokens, self.queries.shape[1], self.text.shape[1])
        added = prior.new_zeros(*self.queries.shape, self.keys.shape[1])
        # Added, since padding of a text, of which the prior is 0, may lie where another position is.
        return added.scatter_add(2, self.text[:, None].expand_as(prior), prior)

    def of_text(self, log_weights: Tensor) -> Tensor:
        """(N, h, F, S) -> (N, h, F, T)."""
        return log_weights.gather(3, self.text[:, None, None].expand(*log_weights.shape[:3], -1))

    def outputs(self, weights: Tensor, value: Tensor) -> Tensor:
        """Weights (N, h, F, S) of the layer's values -> (N, F, h, D)."""
        return torch.einsum("nhfs,nshd->nfhd", weights, self._taken(value, self.shared, self.keys))

    def read(self, output: Tensor) -> Tensor:
        """What the heads give to the positions of speech, of (R, L, H, D): (positions, h, D)."""
        return output[self.at[0][:, None], self.at[1][:, None], self.heads]

    def put(self, output: Tensor, found: Tensor) -> Tensor:
        """The output (R, L, H, D) with these heads' (N, F, h, D) at the positions of speech."""
        heads = torch.tensor(self.heads, device=output.device)
        index = (self.at[0][:, None], self.at[1][:, None], heads[None])
        return output.index_put(index, found[self.inside].to(output.dtype))


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
) -> tuple[Tensor, Any]:
    """What transformers calls in the layers that are read."""
    return module.attention_reader.attend(query, key, value, attention_mask, **settings)


AttentionInterface.register(NAME, _attend)
