"""Answers of several speech tokens a forward pass: further heads propose them, the next pass verifies them.

Self-speculative decoding (blockwise, Stern et al. 2018, arXiv 1811.03115; with multi-token heads arXiv 2404.19737,
section 3.2). A pass reads the newest token and the n - 1 that were proposed behind it, and gives the model's own choice
behind each; as many are accepted as it would have chosen itself, and its choice behind the last of them is new. So an
answer is that of :mod:`slm.decoding.decode`, up to rounding, whatever the heads propose: greedily, and drawn too, since
a draw there is the maximum of scores plus noise that its place alone decides. Without verification all that is proposed
is taken, n tokens a pass (VocalNet, arXiv 2504.04060): faster, and another answer.

Shapes: B rows that still go on, padded on the left to P slots of the cache; m tokens of a pass; C ids that are legal
anywhere; D width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from slm.decoding.attention_cache import cache_name, only_attention
from slm.decoding.batching import pad_prompts
from slm.decoding.loops import LoopWatch
from slm.decoding.row_rules import Answer, FinishReason, Grammar, RowLimits
from slm.decoding.sampling import gumbel_noise, warpers
from slm.model.multi_token import MultiTokenError, multi_token_heads_of
from slm.model.parts import head_states
from slm.training.answer_loss import AfterHead


@dataclass
class _Row:
    """One answer while it is written: what has come of it, and why it ended."""

    number: int  # of its prompt
    limits: RowLimits
    ids: Tensor
    watch: LoopWatch | None
    generator: torch.Generator | None
    noise: dict[int, Tensor] = field(default_factory=dict)  # by place in the answer
    count: int = 0  # ids that came, the end too
    passes: int = 0
    reason: FinishReason | None = None

    def take(self, token: int, broken: bool, end_id: int) -> None:
        """Takes the next id; by the same rules as `slm.decoding.row_rules.RowEnds`, in the same order."""
        self.noise.pop(self.count, None)
        self.ids[self.count] = token
        self.count += 1
        looped = self.watch is not None and bool(self.watch.update(self.ids[None, : self.count])[0])
        if broken:
            self.reason = "non_finite"
        elif token == end_id:
            self.reason = "stop"
        elif looped:
            self.reason = "loop"
        elif self.count > self.limits.most:
            self.reason = "length"

    def last(self, n: int) -> list[int]:
        """Its newest n ids."""
        return self.ids[self.count - n : self.count].tolist()

    def answer(self) -> Answer:
        """Without the end, what came beyond the budget, and an id of scores that mean nothing."""
        length = min(self.count if self.reason == "loop" else self.count - 1, self.limits.most)
        return Answer(self.ids[:length].tolist(), self.reason, n_passes=self.passes)


class _Choice:
    """Chooses the ids of several places of each row at once, among those that are legal there.

    Args:
        grammar: What is legal.
        device: Of the scores.
        drawn: Whether ids are drawn, each row's from its generator; else they are the likeliest.
        sampling: Arguments of `slm.decoding.sampling.warpers`.
    """

    def __init__(self, grammar: Grammar, device: torch.device, drawn: bool, sampling: Mapping[str, Any]) -> None:
        self.grammar = grammar
        legal = torch.stack([mask.to(device) for mask in grammar.legal])
        every = legal.any(dim=0)
        every[grammar.end_id] = True
        self.columns = every.nonzero()[:, 0]
        self._end = int((self.columns == grammar.end_id).nonzero())
        self.allowed = legal[:, self.columns].repeat_interleave(2, dim=0)  # of a place without its end, and with it
        self.allowed[:, self._end] = torch.tensor([False, True] * len(legal), device=device)
        self.warpers = warpers(**sampling) if drawn else None

    def __call__(self, scores: Tensor, rows: Sequence[_Row]) -> tuple[list[list[int]], list[list[bool]]]:
        """Of the scores (B, m, C) of each row's next places the ids chosen, and which scores are not finite."""
        places = [range(row.count, row.count + scores.shape[1]) for row in rows]
        kinds = [[self._kind(place, row.limits.least) for place in own] for row, own in zip(rows, places, strict=True)]
        allowed = self.allowed[torch.tensor(kinds, device=scores.device)]
        scores = scores.float().masked_fill(~allowed, -math.inf)
        broken = ~scores.amax(dim=-1).isfinite()
        if self.warpers is not None:
            flat = scores.flatten(0, 1)
            for warper in self.warpers:
                flat = warper(None, flat)
            scores = flat.view_as(scores) + self._noise(rows, places).to(scores)
        return self.columns[scores.argmax(dim=-1)].tolist(), broken.tolist()

    def _kind(self, place: int, least: int) -> int:
        """Which row of `allowed` a place of an answer has."""
        in_frame = place % len(self.grammar.legal)
        return 2 * in_frame + (in_frame == 0 and place >= max(self.grammar.min_new, least))

    def _noise(self, rows: Sequence[_Row], places: Sequence[range]) -> Tensor:
        """(B, m, C): each place's own, as `row_rules.SeededSampling` draws it, one place after the other."""
        for row, own in zip(rows, places, strict=True):
            for place in range(max(row.noise, default=row.count - 1) + 1, own[-1] + 1):
                # There the end has its noise before `least` too, from where on it may come by the grammar.
                legal = self.allowed[self._kind(place, 0)].cpu()
                row.noise[place] = torch.zeros(len(legal))
                row.noise[place][legal] = gumbel_noise(torch.empty(1, int(legal.sum())), [row.generator])[0]
        return torch.stack(
            [torch.stack([row.noise[place] for place in own]) for row, own in zip(rows, places, strict=True)]
        )


class _Passes:
    """Forward passes of some rows, and the cache of what they have read for good.

    Args:
        model: A causal LM whose layers are all attention.
        columns: (C,) ids whose scores are asked for.
        tokens: n that are proposed, the next one too.
    """

    def __init__(self, model: PreTrainedModel, columns: Tensor, tokens: int) -> None:
        self.model, self.columns, self.tokens = model, columns, tokens
        self.heads, head = multi_token_heads_of(model), model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        self.rows = SimpleNamespace(weight=head.weight[columns], bias=None if bias is None else bias[columns])
        self.after = AfterHead.of(model.config.get_text_config())
        self.cache = DynamicCache()  # of whole layers: a window's own cache forgets what a refused token pushed out
        names = inspect.signature(model.forward).parameters
        self.cache_name = cache_name(model)
        self.keeps = "logits_to_keep" in names
        self.mask = torch.zeros(0)

    def read(self, ids: Tensor, mask: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """Reads ids (B, m) whose slots so far, and theirs, have a mask (B, P + m).

        Returns:
            Scores (B, kept, C) and states (B, kept, D) of the last `kept` of them.
        """
        self.mask = mask
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        options = {"logits_to_keep": kept} if self.keeps else {}
        options[self.cache_name] = self.cache
        with head_states(self.model) as states:
            output = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, return_dict=True, **options
            )
        return output.logits[:, -kept:, self.columns], states[0][:, -kept:]

    def proposed(self, states: Tensor) -> Tensor:
        """The scores (B, n - 1, C) of the tokens at distance 2 to n of states (B, D)."""
        found = [self.heads(distance, states) for distance in range(2, self.tokens + 1)]
        return self.after(F.linear(torch.stack(found, dim=1), self.rows.weight, self.rows.bias).float())

    def forget(self, rows: Sequence[int], refused: Sequence[int]) -> Tensor:
        """Goes on with some rows, without the last `refused` slots of each; returns their mask (B', P').

        What a row keeps is moved to the right, so that it has no holes and all rows end together.
        """
        device, slots = self.mask.device, self.mask.shape[1]
        chosen, cut = torch.tensor(rows, device=device), torch.tensor(refused, device=device)
        lengths = self.mask[chosen].sum(dim=1) - cut
        size = int(lengths.max())
        source = torch.arange(size, device=device) + (slots - cut - size)[:, None]
        same = len(rows) == len(self.mask) and size == slots - min(refused) and min(refused) == max(refused)
        for layer in self.cache.layers:
            if not layer.get_seq_length():
                continue  # reads another layer's
            if same:
                layer.keys, layer.values = layer.keys[:, :, :size], layer.values[:, :, :size]
                continue
            for name in ("keys", "values"):
                own = getattr(layer, name)[chosen]
                index = source.clamp_min(0)[:, None, :, None].expand(-1, own.shape[1], -1, own.shape[3])
                setattr(layer, name, own.gather(2, index))
        return (torch.arange(size, device=device) >= (size - lengths)[:, None]).to(self.mask.dtype)


def check_multi_token_decoding(model: PreTrainedModel, tokens: int) -> None:
    """Whether a model can propose so many tokens.

    Raises:
        MultiTokenError: It has no such heads, or layers whose state cannot go back over a refused token.
    """
    heads = multi_token_heads_of(model)
    if heads is None or heads.tokens < tokens:
        has = "none" if heads is None else f"heads for {heads.tokens} tokens"
        raise MultiTokenError(
            f"decoding.multi_token: {tokens}, and the model has {has}; set it to {heads.tokens if heads else 1}, or "
            f"train with training.multi_token.tokens={tokens} (`slm finetune`)"
        )
    if not only_attention(model):
        raise MultiTokenError(
            f"decoding.multi_token: {type(model).__name__} has layers with a state, which cannot go back over a token "
            "that was proposed and refused; set it to 1"
        )


@torch.inference_mode()
def decode_multi_token(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    grammar: Grammar,
    limits: Sequence[RowLimits],
    tokens: int,
    verify: bool = True,
    seeds: Sequence[int] | None = None,
    **sampling: Any,
) -> list[Answer]:
    """Writes the answer of each prompt, up to `tokens` ids a forward pass; its rows accept each as many as they do.

    Args:
        model: The LLM, with multi-token heads.
        prompts: (P,) ids each.
        grammar: What an answer is made of, without a tail.
        limits: One per prompt.
        tokens: n, at most as many as the heads predict.
        verify: Whether the model accepts what is proposed before it counts.
        seeds: One per prompt, for its random stream; None is greedy.
        sampling: Temperature, top_k and top_p.

    Returns:
        One answer per prompt, in order, with the passes that it took: those of
        :mod:`slm.decoding.decode` where they are verified.

    Raises:
        MultiTokenError: The model cannot.
    """
    check_multi_token_decoding(model, tokens)
    rows = [_new_row(number, one, grammar, seeds) for number, one in enumerate(limits)]
    ids, mask = pad_prompts(model, prompts, grammar.end_id)
    choice = _Choice(grammar, ids.device, seeds is not None, sampling)
    passes = _Passes(model, choice.columns, tokens)
    answers: list[Answer | None] = [None] * len(rows)
    guesses: list[list[int]] = [[] for _ in rows]  # read behind the newest id, to be verified
    while True:
        read = 1 + len(guesses[0])
        scores, states = passes.read(ids, mask, read)
        for row in rows:
            row.passes += 1
        parts = zip(rows, *choice(scores, rows), guesses, strict=True)
        taken = [_accept(row, *own, grammar.end_id) for row, *own in parts]
        last = states[torch.arange(len(rows), device=mask.device), torch.tensor(taken, device=mask.device) - 1]
        proposed, _ = choice(passes.proposed(last), rows)
        if not verify:
            for row, own in zip(rows, proposed, strict=True):
                _accept(row, own, [False] * len(own), own[:-1], grammar.end_id)
        for row in rows:
            if row.reason is not None:
                answers[row.number] = row.answer()
        going = [place for place, row in enumerate(rows) if row.reason is None]
        if not going:
            return answers
        mask = passes.forget(going, [read - taken[place] for place in going])
        rows, proposed = [rows[place] for place in going], [proposed[place] for place in going]
        given = [[*row.last(1), *own] if verify else row.last(tokens) for row, own in zip(rows, proposed, strict=True)]
        guesses = proposed if verify else [[] for _ in rows]
        ids = torch.tensor(given, device=mask.device)
        mask = torch.cat([mask, mask.new_ones(ids.shape)], dim=1)


def _new_row(number: int, limits: RowLimits, grammar: Grammar, seeds: Sequence[int] | None) -> _Row:
    n_places, watch, cpu = len(grammar.legal), None, torch.device("cpu")
    if grammar.loop_limit is not None:
        watch = LoopWatch(1, n_places, grammar.loop_limit, limits.most // n_places, cpu)
    generator = None if seeds is None else torch.Generator().manual_seed(seeds[number])
    return _Row(number, limits, torch.zeros(limits.most + 1, dtype=torch.long), watch, generator)


def _accept(row: _Row, chosen: Sequence[int], broken: Sequence[bool], guesses: Sequence[int], end_id: int) -> int:
    """Takes ids as long as those before them were guessed right and the answer goes on; returns how many."""
    for number, token in enumerate(chosen):
        if row.reason is not None or (number and guesses[number - 1] != chosen[number - 1]):
            return number
        row.take(token, broken[number], end_id)
    return len(chosen)
