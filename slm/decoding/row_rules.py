"""What an answer is made of, how its next id is drawn, and when it ends: for each row of a batch by itself.

Rows of a batch need not have begun together: one takes the place of another that has ended. So all that is told here of
a row follows from the ids since its own prompt, whatever the others do.

Shapes: B rows; W ids of each, prompt and answer so far, padded on the left; V ids; C legal ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import LogitsProcessor, StoppingCriteria

from slm.decoding.loops import LoopWatch
from slm.decoding.sampling import gumbel_noise, warpers

# Why an answer ended. `stop`: the model ended it; `length`: its budget was spent; `loop`: it repeated itself;
# `non_finite`: the model's scores were NaN or infinite. `going`, of a stream: it has not ended yet.
FinishReason = Literal["stop", "length", "loop", "non_finite", "going"]
REASONS: tuple[FinishReason, ...] = ("stop", "length", "loop", "non_finite")
_STOP, _LENGTH, _LOOP, _NON_FINITE = range(4)


@dataclass(frozen=True)
class Answer:
    """The ids of an answer, without the end, and why it ended; with further books their codes too, (T, n - 1).

    `n_passes` are the forward passes of the model that it took, where a pass may give several ids; else 0. `draws`: how
    often it was drawn, this being the last.
    """

    ids: list[int]
    finish_reason: FinishReason
    further: np.ndarray | None = None
    n_passes: int = 0
    draws: int = 1


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


_Place = tuple[int, bool]  # in a frame, and whether the end may come there


class LegalIds(LogitsProcessor):
    """Forbids every id but the legal ones of the place, and takes note of rows whose scores are not finite.

    Args:
        grammar: What is legal.
        starts: Of each row where its answer begins, behind its prompt: P of them, at a width of P.
        least: (B,) ids of each row before its end may come; those of the grammar alone where None is given.
    """

    def __init__(self, grammar: Grammar, starts: Sequence[int], least: torch.Tensor | None = None) -> None:
        self.grammar, self.starts, self.least = grammar, list(starts), least
        self.non_finite: torch.Tensor | None = None
        self.over: torch.Tensor | None = None  # rows in their tail, where only the end is legal
        self._masks: dict[_Place, torch.Tensor] = {}
        self._columns: dict[_Place, torch.Tensor] = {}
        for place, mask in enumerate(grammar.legal):
            for with_end in (False, True):
                allowed = mask.clone()
                allowed[grammar.end_id] = with_end
                self._masks[place, with_end], self._columns[place, with_end] = ~allowed, allowed.nonzero()[:, 0]

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows alone."""
        self.starts = [self.starts[row] for row in rows.tolist()]
        self.least, self.non_finite, self.over = (
            None if own is None else own[rows] for own in (self.least, self.non_finite, self.over)
        )

    def join(self, other: LegalIds) -> None:
        """Takes the rows of another of the same grammar behind its own."""
        self.starts += other.starts
        self.least = torch.cat([self.least, other.least])
        self.non_finite = torch.cat([self.non_finite, other.non_finite])
        self.over = None if self.over is None else torch.cat([self.over, other.over])

    def move(self, n: int) -> None:
        """Takes note of n more ids of padding on the left."""
        self.starts = [start + n for start in self.starts]

    def done(self, input_ids: torch.Tensor) -> list[int]:
        """How many ids each row's answer has in (B, W); of a beam the width of all alike."""
        return [input_ids.shape[1] - start for start in self.starts]

    def _places(self, input_ids: torch.Tensor) -> list[_Place]:
        n_places = len(self.grammar.legal)
        places = [(n % n_places, n % n_places == 0 and n >= self.grammar.min_new) for n in self.done(input_ids)]
        return places[:1] if len(set(places)) == 1 else places

    def columns(self, input_ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The ids (C,) that are legal after the tokens so far, in order, and for which rows they are: (B',) of them."""
        places = self._places(input_ids)
        if len(places) == 1:
            return [(torch.arange(len(input_ids), device=input_ids.device), self._columns[places[0]])]
        alike = {one: [row for row, own in enumerate(places) if own == one] for one in dict.fromkeys(places)}
        return [(torch.tensor(rows, device=input_ids.device), self._columns[one]) for one, rows in alike.items()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masks = torch.stack([self._masks[place] for place in self._places(input_ids)])
        scores = scores.float().masked_fill(masks, -math.inf)
        if self.least is not None:
            done, end_id = torch.tensor(self.done(input_ids), device=scores.device), self.grammar.end_id
            scores[:, end_id] = scores[:, end_id].masked_fill(done < self.least, -math.inf)
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

    def join(self, other: Guidance) -> None:
        """Nothing is kept."""

    def move(self, n: int) -> None:
        """Nothing is kept."""

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

    def join(self, other: SeededSampling) -> None:
        """Takes the rows of another behind its own."""
        self.generators += other.generators

    def move(self, n: int) -> None:
        """Nothing depends on the padding."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = input_ids.new_zeros(len(input_ids))
        for rows, columns in self.legal.columns(input_ids):
            own = scores[rows[:, None], columns].float()
            for warper in self.warpers:
                own = warper(input_ids, own)
            noise = gumbel_noise(own, [self.generators[row] for row in rows.tolist()])
            drawn[rows] = columns[(own + noise).argmax(-1)]
        return torch.full_like(scores, -math.inf).scatter_(1, drawn[:, None], 0.0)


class RowEnds(StoppingCriteria):
    """Ends each row by its own limits, notes why and after how many ids, and ends the round when enough have ended.

    Args:
        legal: Knows the end, where each answer begins, and which rows' scores are not finite.
        most: (B,) ids that may come, the end aside.
        watch: Tells loops; None for no such guard.
    """

    def __init__(self, legal: LegalIds, most: torch.Tensor, watch: LoopWatch | None) -> None:
        self.legal, self.most, self.watch = legal, most, watch
        self.enough = len(most)  # rows
        self.reasons = torch.full_like(most, -1)
        self.lengths = torch.zeros_like(most)
        self.ended = torch.zeros_like(most, dtype=torch.bool)  # and their tails are over

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows alone."""
        self.most, self.reasons, self.lengths = self.most[rows], self.reasons[rows], self.lengths[rows]
        self.ended = self.ended[rows]
        if self.watch is not None:
            self.watch.keep(rows)

    def join(self, other: RowEnds) -> None:
        """Takes the rows of another behind its own."""
        for name in ("most", "reasons", "lengths", "ended"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        if self.watch is not None:
            self.watch.join(other.watch)

    def move(self, n: int) -> None:
        """`legal` knows of the padding."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        done = torch.tensor(self.legal.done(input_ids), device=input_ids.device)
        found = torch.full_like(self.reasons, -1)
        # From the weakest reason to the strongest: an end that comes where a loop is full is an end.
        found.masked_fill_(done > self.most, _LENGTH)
        if self.watch is not None:
            found.masked_fill_(self.watch.update(input_ids[:, min(self.legal.starts) :], done), _LOOP)
        found.masked_fill_(input_ids[:, -1] == self.legal.grammar.end_id, _STOP)
        if self.legal.non_finite is not None:
            found.masked_fill_(self.legal.non_finite, _NON_FINITE)
        # The end is no part of the answer, nor what came beyond the budget or of scores that mean nothing.
        length = torch.where(found == _LOOP, done, done - 1).minimum(self.most)
        first = (self.reasons < 0) & (found >= 0)
        self.reasons = torch.where(first, found, self.reasons)
        self.lengths = torch.where(first, length, self.lengths)
        over, tail = self.reasons >= 0, self.legal.grammar.tail
        self.ended = over & (done >= self.lengths + tail)
        if tail:
            self.legal.over = over
        return self.ended | (self.ended.sum() >= self.enough)
