"""A batch that answers are written in, row by row: rows leave it when they have ended, and others take their place.

transformers' `generate` keeps every row of a batch until the last one ends, and each row costs as much as any other. It
is called here in rounds. Between them the rows that have ended leave, with their part of the cache, and those of
another batch come in, which has read its prompts by itself (iteration-level scheduling, Orca, OSDI 2022). Both are
padded on the left to one width: padding has no position of its own, so a row's positions are those that it has alone.

Shapes: B rows; W ids of each, prompt and answer so far; n codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from slm.decoding import attention_cache
from slm.decoding.batching import pad_prompts
from slm.decoding.further_codes import FurtherCodes
from slm.decoding.legal_head import legal_rows
from slm.decoding.loops import LoopWatch
from slm.decoding.row_rules import (
    REASONS,
    Answer,
    FinishReason,
    Grammar,
    Guidance,
    LegalIds,
    RowEnds,
    RowLimits,
    SeededSampling,
)


@dataclass(frozen=True)
class Request:
    """What is asked of a model, of which a batch holds some.

    Args:
        model: The LLM.
        prompts: (P,) ids each, or (P, n) with the codes of further books beside them.
        grammar: What an answer is made of.
        limits: One per prompt.
        seeds: One per prompt, for its random stream; None is greedy.
        sampling: Temperature, top_k and top_p of :class:`slm.decoding.row_rules.SeededSampling`.
        guidance: Where it is not None, the second half of the prompts are the bare ones of the first.
    """

    model: PreTrainedModel
    prompts: Sequence[np.ndarray]
    grammar: Grammar
    limits: Sequence[RowLimits]
    seeds: Sequence[int] | None
    sampling: Mapping[str, Any]
    guidance: Guidance | None = None

    @property
    def n_asked(self) -> int:
        """Prompts that an answer is asked of: the bare ones aside."""
        return len(self.prompts) // (1 if self.guidance is None else 2)


class RunningBatch:
    """Rows that are written together.

    Args:
        request: Whose prompts.
        asked: Numbers of those that its rows begin with; the bare ones of the same come with them.
    """

    def __init__(self, request: Request, asked: Sequence[int]) -> None:
        self.request, self.rows = request, list(asked)
        model, grammar = request.model, request.grammar
        if request.guidance is not None:
            self.rows += [row + request.n_asked for row in asked]
        prompts = [request.prompts[row] for row in self.rows]
        limits = [request.limits[row] for row in self.rows]
        seeds = None if request.seeds is None else [request.seeds[row] for row in self.rows]
        self.ids, self.mask = pad_prompts(model, prompts, grammar.end_id)
        device, n_places = self.ids.device, len(grammar.legal)
        least = torch.tensor([one.least for one in limits], device=device)
        self.legal = LegalIds(grammar, [self.ids.shape[1]] * len(self.rows), least)
        watch = None
        if grammar.loop_limit is not None:
            # Of all prompts, so that the rows of two batches watch for the same loops.
            longest = max(one.most for one in request.limits)
            watch = LoopWatch(len(self.rows), n_places, grammar.loop_limit, longest // n_places, device)
        self.ends = RowEnds(self.legal, torch.tensor([one.most for one in limits], device=device), watch)
        self.processors: list[Any] = [self.legal] if request.guidance is None else [request.guidance, self.legal]
        if seeds is not None:
            self.processors.append(SeededSampling(self.legal, seeds, **request.sampling))
        self.further = None
        if prompts[0].ndim == 2:
            speaks = None if grammar.late is None else self.ends
            drawn = (seeds, request.guidance, request.sampling)
            self.further = FurtherCodes(model, prompts, speaks, grammar.late or 0, *drawn)
            self.processors.append(self.further)
        self.cache = attention_cache.new_cache(model) if attention_cache.only_attention(model) else {}

    @property
    def asked(self) -> list[int]:
        """Numbers of the prompts that are being answered."""
        return [row for row in self.rows if row < self.request.n_asked]

    def go_on(self, enough: int, most: int | None = None) -> dict[int, Answer]:
        """Writes a round, after which the rows that have ended leave.

        Args:
            enough: Rows whose ends end the round.
            most: Ids of each row, at most.

        Returns:
            What each row has written, by the number of its prompt, and why it ended; `going` where it goes on.
        """
        grammar, limits = self.request.grammar, self.request.limits
        # One more than a budget, to see whether it is the end, and the tail.
        done = self.legal.done(self.ids)
        left = max(limits[row].most - n for row, n in zip(self.rows, done, strict=True)) + 1 + grammar.tail
        self.ends.enough = enough
        reading = nullcontext() if self.further is None else self.further.read()
        with reading, legal_rows(self.request.model, grammar.legal, grammar.end_id):
            output = self.request.model.generate(
                input_ids=self.ids,
                attention_mask=self.mask,
                max_new_tokens=left if most is None else min(most, left),
                do_sample=False,
                eos_token_id=grammar.stop_id,
                logits_processor=LogitsProcessorList(self.processors),
                stopping_criteria=StoppingCriteriaList([self.ends]),
                return_dict_in_generate=True,
                **self.cache,
            )
        self.ids = output.sequences
        self.mask = F.pad(self.mask, (0, self.ids.shape[1] - self.mask.shape[1]), value=1)
        found, ended = self.ends.reasons.tolist(), self.ends.ended.tolist()
        reasons = [REASONS[code] if end else None for code, end in zip(found, ended, strict=True)]
        answers = self._answers(reasons)
        self.cache = _cache_of(output)
        self._keep([place for place, reason in enumerate(reasons) if reason is None])
        return answers

    def join(self, other: RunningBatch) -> None:
        """Takes the rows of another of the same request behind its own; the models of both keep attention alone."""
        width = max(self._used(), other._used())
        for batch in (self, other):
            batch._move(width - batch.ids.shape[1])
        self.rows += other.rows
        self.ids, self.mask = torch.cat([self.ids, other.ids]), torch.cat([self.mask, other.mask])
        for part, its in zip([*self.processors, self.ends], [*other.processors, other.ends], strict=True):
            part.join(its)
        for name, cache in self.cache.items():
            attention_cache.join(cache, other.cache[name])
        if self.request.guidance is not None:  # which asks for all bare ones behind all others
            self._keep(sorted(range(len(self.rows)), key=lambda place: self.rows[place] >= self.request.n_asked))

    def _answers(self, reasons: Sequence[FinishReason | None]) -> dict[int, Answer]:
        """Of each row the answer so far: all that there is where it goes on."""
        tokens, lengths, answers = self.ids.tolist(), self.ends.lengths.tolist(), {}
        beside = None if self.further is None else self.further.codes.cpu().numpy()
        for place, (row, start, reason) in enumerate(zip(self.rows, self.legal.starts, reasons, strict=True)):
            end = len(tokens[place]) if reason is None else start + lengths[place]
            last = end if reason is None else end + self.request.grammar.tail
            codes = None if beside is None else beside[place, start:last]
            answers[row] = Answer(tokens[place][start:end], reason or "going", codes)
        return answers

    def _keep(self, places: Sequence[int]) -> None:
        """Goes on with these rows alone, in this order."""
        if list(places) == list(range(len(self.rows))):
            return
        self.rows = [self.rows[place] for place in places]
        keep = torch.tensor(places, dtype=torch.long, device=self.ids.device)
        self.ids, self.mask = self.ids[keep], self.mask[keep]
        for part in (*self.processors, self.ends):
            part.keep(keep)
        for cache in self.cache.values():
            cache.reorder_cache(keep)

    def _used(self) -> int:
        """The width that the longest row needs."""
        done, prompts = self.legal.done(self.ids), self.request.prompts
        return max(len(prompts[row]) + n for row, n in zip(self.rows, done, strict=True))

    def _move(self, n: int) -> None:
        """Puts n ids of padding on the left; takes as many off below 0."""
        self.ids = F.pad(self.ids, (n, 0), value=self.request.grammar.end_id)
        self.mask = F.pad(self.mask, (n, 0))
        for part in (*self.processors, self.ends):
            part.move(n)
        for cache in self.cache.values():
            attention_cache.move(cache, n)


def _cache_of(output: Any) -> dict[str, Any]:
    """What `generate` needs to go on with a batch; nothing where it must read all of it anew.

    That is a model without a cache, and one that has a state in its place (Mamba): `generate` does not tell there which
    ids have been read.
    """
    for name in ("cache", "past_key_values"):  # by transformers' version
        cache = getattr(output, name, None)
        if hasattr(cache, "reorder_cache") and not all(getattr(cache, "is_linear", [False])):
            return {name: cache}
    return {}
