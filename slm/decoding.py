"""How ids are drawn one after the other: in a batch whose rows have each their own limits, and leave it when they end.

Shapes: B prompts of a batch, padded on the left to P; V ids; C legal ones; T ids that came so far.

transformers' `generate` keeps every row of a batch until the last one ends, and each row costs as much as any other. It
is called here in rounds: a round ends when half of its rows have ended, and the next goes on with the others and their
part of the cache. A row that never ends costs what it costs alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from slm.further_codes import FurtherCodes
from slm.legal_head import legal_rows
from slm.loops import LoopWatch, longest_loop
from slm.sampling import gumbel_noise, warpers

# Why an answer ended. `stop`: the model ended it; `length`: its budget was spent; `loop`: it repeated itself;
# `non_finite`: the model's scores were NaN or infinite. `going`, of a stream: it has not ended yet.
FinishReason = Literal["stop", "length", "loop", "non_finite", "going"]
_REASONS: tuple[FinishReason, ...] = ("stop", "length", "loop", "non_finite")
_STOP, _LENGTH, _LOOP, _NON_FINITE = range(4)


@dataclass(frozen=True)
class Answer:
    """The ids of an answer, without the end, and why it ended; with further books their codes too, (T, n - 1).

    `n_passes` are the forward passes of the model that it took, where a pass may give several ids; else 0.
    """

    ids: list[int]
    finish_reason: FinishReason
    further: np.ndarray | None = None
    n_passes: int = 0


@dataclass(frozen=True)
class RowLimits:
    """Of one answer: ids that may come, and ids that must come before its end may."""

    most: int
    least: int = 0


@dataclass(frozen=True)
class Grammar:
    """Which ids an answer is made of.

    Args:
        legal: One (V,) bool mask per place in a frame; text has one place.
        end_id: Ends an answer; legal at the first place of a frame.
        min_new: Ids before which no answer may end.
        loop_limit: Frames (tokens of text) that a loop must be longer than to end the answer; None for no such guard.
        tail: Positions behind the last id, in which the further books come to their end: book 0's are ends.
        late: Frames that each further book is later than the one before; None: the answer has none.
    """

    legal: Sequence[torch.Tensor]
    end_id: int
    min_new: int = 0
    loop_limit: int | None = None
    tail: int = 0
    late: int | None = None

    @property
    def stop_id(self) -> int:
        """Whose coming ends a row at once: the end, or with a tail an id that never comes."""
        return int((~self.legal[0]).int().argmax()) if self.tail else self.end_id


class LegalIds(LogitsProcessor):
    """Forbids every id but the legal ones of the place, and takes note of rows whose scores are not finite.

    Args:
        grammar: What is legal.
        prompt_length: P.
        least: Ids of each row before its end may come; those of the grammar alone where None is given.
    """

    def __init__(self, grammar: Grammar, prompt_length: int, least: torch.Tensor | None = None) -> None:
        self.grammar, self.prompt_length, self.least = grammar, prompt_length, least
        self.non_finite: torch.Tensor | None = None
        self.over: torch.Tensor | None = None  # rows in their tail, where only the end is legal
        self._masks: dict[tuple[int, bool], torch.Tensor] = {}
        self._columns: dict[tuple[int, bool], torch.Tensor] = {}
        for place, mask in enumerate(grammar.legal):
            for with_end in (False, True):
                allowed = mask.clone()
                allowed[grammar.end_id] = with_end
                self._masks[place, with_end], self._columns[place, with_end] = ~allowed, allowed.nonzero()[:, 0]

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows alone."""
        self.least = None if self.least is None else self.least[rows]
        self.non_finite = None if self.non_finite is None else self.non_finite[rows]
        self.over = None if self.over is None else self.over[rows]

    def _place(self, input_ids: torch.Tensor) -> tuple[int, bool]:
        done = input_ids.shape[1] - self.prompt_length
        place = done % len(self.grammar.legal)
        return place, place == 0 and done >= self.grammar.min_new

    def columns(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The ids (C,) that are legal in any row after the tokens so far, in order: not which rows there are."""
        return self._columns[self._place(input_ids)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = self._place(input_ids)
        scores = scores.float().masked_fill(self._masks[place], -math.inf)
        if self.least is not None and place[1]:
            early, end_id = input_ids.shape[1] - self.prompt_length < self.least, self.grammar.end_id
            scores[:, end_id] = scores[:, end_id].masked_fill(early, -math.inf)
        # NaN and +inf carry through a maximum; it is -inf where no legal id is left.
        broken = ~scores.amax(dim=1).isfinite()
        self.non_finite = broken if self.non_finite is None else self.non_finite | broken
        if self.over is not None:
            scores[self.over] = -math.inf
            scores[self.over, self.grammar.end_id] = 0.0
        return scores


class Guidance(LogitsProcessor):
    """Classifier-free guidance (arXiv 2207.12598): scores moved on from those of the bare prompt to those of the asked.

    The first half of the rows has the prompts, the second the same rows' bare ones. Both halves get the same scores, so
    they go on with the same ids and end together.

    Args:
        scale: How far; 1 leaves the scores as they are.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def keep(self, rows: torch.Tensor) -> None:
        """Nothing is kept: both halves lose the same rows."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        asked, bare = scores.float().log_softmax(dim=-1).chunk(2)
        # Where the bare one forbids an id (-inf), there is no difference to take.
        guided = torch.where(bare == -math.inf, asked, bare + self.scale * (asked - bare))
        return guided.repeat(2, 1)


class SeededSampling(LogitsProcessor):
    """Turns greedy search into sampling among the legal ids, with one random stream per row.

    The likeliest id of scores plus Gumbel noise is a draw from their softmax; each row's noise comes from its own
    generator, so the other rows of a batch do not change what is drawn (their padding moves scores by rounding alone).
    Drawn on the CPU, and for legal ids alone: the same on every device, and no cost that grows with the vocabulary.

    Args:
        legal: Which ids there are to draw from.
        seeds: One per row.
        temperature: Above 0.
        top_k: Draw from the k likeliest; 0 for all.
        top_p: Draw from the likeliest that make up this share.
    """

    def __init__(
        self, legal: LegalIds, seeds: Sequence[int], temperature: float, top_k: int = 0, top_p: float = 1.0
    ) -> None:
        self.legal = legal
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.warpers = warpers(temperature, top_k, top_p)

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows alone."""
        self.generators = [self.generators[row] for row in rows.tolist()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        columns = self.legal.columns(input_ids)
        own = scores[:, columns].float()
        for warper in self.warpers:
            own = warper(input_ids, own)
        drawn = columns[(own + gumbel_noise(own, self.generators)).argmax(-1)]
        return torch.full_like(scores, -math.inf).scatter_(1, drawn[:, None], 0.0)


class RowEnds(StoppingCriteria):
    """Ends each row by its own limits, notes why and after how many ids, and ends the round when half have ended.

    Args:
        legal: Knows the end, and which rows' scores are not finite.
        most: (B,) ids that may come, the end aside.
        watch: Tells loops; None for no such guard.
    """

    def __init__(self, legal: LegalIds, most: torch.Tensor, watch: LoopWatch | None) -> None:
        self.legal, self.most, self.watch = legal, most, watch
        self.reasons = torch.full_like(most, -1)
        self.lengths = torch.zeros_like(most)
        self.ended = torch.zeros_like(most, dtype=torch.bool)  # and their tails are over

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows alone."""
        self.most, self.reasons, self.lengths = self.most[rows], self.reasons[rows], self.lengths[rows]
        self.ended = self.ended[rows]
        if self.watch is not None:
            self.watch.keep(rows)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        new = input_ids[:, self.legal.prompt_length :]
        found = torch.full_like(self.reasons, -1)
        # From the weakest reason to the strongest: an end that comes where a loop is full is an end.
        found.masked_fill_(new.shape[1] > self.most, _LENGTH)
        if self.watch is not None:
            found.masked_fill_(self.watch.update(new), _LOOP)
        found.masked_fill_(new[:, -1] == self.legal.grammar.end_id, _STOP)
        if self.legal.non_finite is not None:
            found.masked_fill_(self.legal.non_finite, _NON_FINITE)
        # The end is no part of the answer, nor what came beyond the budget or of scores that mean nothing.
        length = torch.where(found == _LOOP, new.shape[1], new.shape[1] - 1).minimum(self.most)
        first = (self.reasons < 0) & (found >= 0)
        self.reasons = torch.where(first, found, self.reasons)
        self.lengths = torch.where(first, length, self.lengths)
        over, tail = self.reasons >= 0, self.legal.grammar.tail
        self.ended = over & (new.shape[1] >= self.lengths + tail)
        if tail:
            self.legal.over = over
        return self.ended | (2 * self.ended.sum() >= len(over))


def decode(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    grammar: Grammar,
    limits: Sequence[RowLimits],
    seeds: Sequence[int] | None = None,
    bare_prompts: Sequence[np.ndarray] | None = None,
    guidance: float = 1.0,
    **sampling: Any,
) -> list[Answer]:
    """Writes the answer of each prompt, greedily or drawn.

    Args:
        model: The LLM.
        prompts: (P,) ids each, or (P, n) with the codes of further books beside them.
        grammar: What an answer is made of.
        limits: One per prompt.
        seeds: One per prompt, for its random stream; None is greedy.
        bare_prompts: One per prompt, without what it asks for: what `guidance` needs. Each is a row more.
        guidance: The scale of :class:`Guidance`.
        sampling: Temperature, top_k and top_p of :class:`SeededSampling`.

    Returns:
        One answer per prompt, in order. What the other rows of a batch do changes none but by rounding.
    """
    answers: dict[int, Answer] = {}
    for found in _rounds(model, prompts, grammar, limits, seeds, bare_prompts, guidance, sampling):
        answers |= {row: answer for row, answer in found.items() if answer.finish_reason != "going"}
    return [answers[row] for row in range(len(prompts))]


def decode_stream(
    model: PreTrainedModel,
    prompt: np.ndarray,
    grammar: Grammar,
    limits: RowLimits,
    every: int,
    seed: int | None = None,
    bare_prompt: np.ndarray | None = None,
    guidance: float = 1.0,
    **sampling: Any,
) -> Iterator[Answer]:
    """Writes one answer and gives its ids while it does; arguments as in :func:`decode`.

    Yields:
        The answer so far every so many ids, with `going` for a reason, and at last the whole.
    """
    seeds, bare = (None if one is None else [one] for one in (seed, bare_prompt))
    for found in _rounds(model, [prompt], grammar, [limits], seeds, bare, guidance, sampling, every):
        yield found[0]


@torch.inference_mode()
def _rounds(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    grammar: Grammar,
    limits: Sequence[RowLimits],
    seeds: Sequence[int] | None,
    bare_prompts: Sequence[np.ndarray] | None,
    guidance: float,
    sampling: Mapping[str, Any],
    every: int | None = None,
) -> Iterator[dict[int, Answer]]:
    """Yields after each round what each of its rows has written, and why it ended; `going` where it goes on.

    A round is over when half of its rows have ended, or after `every` ids.
    """
    before: list[Any] = []
    if bare_prompts is not None:
        prompts, limits, before = [*prompts, *bare_prompts], [*limits, *limits], [Guidance(guidance)]
        seeds = None if seeds is None else [*seeds, *seeds]
    ids, mask = pad_prompts(model, prompts, grammar.end_id)
    length, device = ids.shape[1], ids.device
    least = torch.tensor([one.least for one in limits], device=device)
    most = torch.tensor([one.most for one in limits], device=device)
    n_places = len(grammar.legal)
    longest = max(one.most for one in limits)
    legal = LegalIds(grammar, length, least)
    watch = None
    if grammar.loop_limit is not None:
        watch = LoopWatch(len(prompts), n_places, grammar.loop_limit, longest // n_places, device)
    ends = RowEnds(legal, most, watch)
    processors: list[Any] = [*before, legal]
    if seeds is not None:
        processors.append(SeededSampling(legal, seeds, **sampling))
    further = None
    if prompts[0].ndim == 2:
        speaks = None if grammar.late is None else ends
        further = FurtherCodes(model, prompts, speaks, grammar.late or 0, seeds, next(iter(before), None), sampling)
        processors.append(further)
    rows = list(range(len(prompts)))
    cache: dict[str, Any] = {}
    while rows:
        # One more than a budget, to see whether it is the end, and the tail.
        left = length + longest + 1 + grammar.tail - ids.shape[1]
        reading = nullcontext() if further is None else further.read()
        with reading, legal_rows(model, grammar.legal, grammar.end_id):
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=left if every is None else min(every, left),
                do_sample=False,
                eos_token_id=grammar.stop_id,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList([ends]),
                return_dict_in_generate=True,
                **cache,
            )
        ids = output.sequences
        found, lengths, tokens = ends.reasons.tolist(), ends.lengths.tolist(), ids[:, length:].tolist()
        reasons = [_REASONS[code] if end else None for code, end in zip(found, ends.ended.tolist(), strict=True)]
        beside = [None] * len(rows) if further is None else further.codes[:, length:].cpu().numpy()
        written = zip(rows, tokens, lengths, reasons, beside, strict=True)
        yield {row: _answer(*parts, grammar.tail) for row, *parts in written}
        going = [place for place, reason in enumerate(reasons) if reason is None]
        rows = [rows[place] for place in going]
        keep = torch.tensor(going, dtype=torch.long, device=device)
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], dim=1)[keep]
        ids = ids[keep]
        for part in (*processors, ends):
            part.keep(keep)
        cache = _cache_of(output, keep)


def _answer(ids: list[int], length: int, reason: FinishReason | None, further: np.ndarray | None, tail: int) -> Answer:
    """An answer of what a row holds: all that there is where it goes on."""
    if reason is None:
        return Answer(ids, "going", further)
    return Answer(ids[:length], reason, None if further is None else further[: length + tail])


def _cache_of(output: Any, rows: torch.Tensor) -> dict[str, Any]:
    """What `generate` needs to go on with some rows of a batch; nothing where it must read all of them anew.

    That is a model without a cache, and one that has a state in its place (Mamba): `generate` does not tell there which
    ids have been read.
    """
    for name in ("cache", "past_key_values"):  # by transformers' version
        cache = getattr(output, name, None)
        if hasattr(cache, "reorder_cache") and not all(getattr(cache, "is_linear", [False])):
            cache.reorder_cache(rows)
            return {name: cache}
    return {}


@torch.inference_mode()
def decode_beams(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    grammar: Grammar,
    limits: Sequence[RowLimits],
    num_beams: int,
    n_best: int = 1,
) -> list[list[Answer]]:
    """Searches each prompt's answers with a beam.

    Args:
        model: The LLM.
        prompts: (P,) ids each, or (P, n) with the codes of further books beside them.
        grammar: What an answer is made of. A loop is told after the search, which a beam seldom runs into.
        limits: One per prompt; `least` is not read.
        num_beams: Beams.
        n_best: Answers of each prompt, at most `num_beams`.

    Returns:
        The likeliest answers of each prompt, the best first.
    """
    ids, mask = pad_prompts(model, prompts, grammar.end_id)
    length = ids.shape[1]
    legal = LegalIds(grammar, length)
    further = None if prompts[0].ndim == 1 else FurtherCodes(model, prompts, None)
    with nullcontext() if further is None else further.read():
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(one.most for one in limits) + 1,
            do_sample=False,
            num_beams=num_beams,
            num_return_sequences=n_best,
            eos_token_id=grammar.end_id,
            logits_processor=LogitsProcessorList([legal] if further is None else [legal, further]),
        )[:, length:].tolist()
    broken = legal.non_finite.view(len(prompts), num_beams).any(dim=1).tolist()
    answers = []
    for i, one in enumerate(limits):
        rows = found[i * n_best : (i + 1) * n_best]
        answers.append([_cut(row, grammar, one.most, broken[i]) for row in rows])
    return answers


def _cut(row: Sequence[int], grammar: Grammar, most: int, broken: bool) -> Answer:
    """The ids before the end, at most the budget, and whether the end came within it."""
    stop = row.index(grammar.end_id) if grammar.end_id in row else len(row)
    ids = list(row[: min(stop, most)])
    if broken:
        return Answer(ids, "non_finite")
    if grammar.end_id in row and stop <= most:
        return Answer(ids, "stop")
    loops = grammar.loop_limit is not None and longest_loop(np.array([ids])) > grammar.loop_limit
    return Answer(ids, "loop" if loops else "length")


def pad_prompts(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], end_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left, (B, P) ids and mask on the model's device."""
    length = max(len(prompt) for prompt in prompts)
    pad = model.generation_config.pad_token_id
    ids = torch.full((len(prompts), length), end_id if pad is None else pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.from_numpy(prompt if prompt.ndim == 1 else prompt[:, 0])
        mask[row, length - len(prompt) :] = 1
    return ids.to(model.device), mask.to(model.device)
