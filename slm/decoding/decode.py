"""How ids are drawn one after the other: in a batch whose rows have each their own limits, and leave it when they end.

A row that has ended makes room for a prompt that waits (continuous batching). A row that never ends costs what it costs
alone.

Shapes: B prompts of a batch, padded on the left to P; V ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, PreTrainedModel

from slm.decoding.attention_cache import only_attention
from slm.decoding.batching import Waiting, buckets, pad_prompts
from slm.decoding.further_codes import FurtherCodes
from slm.decoding.loops import longest_loop
from slm.decoding.row_rules import Answer, Grammar, Guidance, LegalIds, RowLimits
from slm.decoding.running_batch import Request, RunningBatch

# Of a batch's rows that must have ended before the others wait for what follows: where prompts wait for their places,
# and where none does.
REFILL_SHARE, LEAVE_SHARE = 0.25, 0.5


def decode(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    grammar: Grammar,
    limits: Sequence[RowLimits],
    seeds: Sequence[int] | None = None,
    bare_prompts: Sequence[np.ndarray] | None = None,
    guidance: float = 1.0,
    batch_size: int | None = None,
    most: float = math.inf,
    **sampling: Any,
) -> list[Answer]:
    """Writes the answer of each prompt, greedily or drawn; the next prompts take the places of those that are answered.

    Where the model keeps more of what it has read than attention does, batch follows batch instead.

    Args:
        model: The LLM.
        prompts: (P,) ids each, or (P, n) with the codes of further books beside them.
        grammar: What an answer is made of.
        limits: One per prompt.
        seeds: One per prompt, for its random stream; None is greedy.
        bare_prompts: One per prompt, without what it asks for: what `guidance` needs. Each is a row more.
        guidance: The scale of :class:`Guidance`.
        batch_size: Prompts that are answered together, at most; all of them where None is given.
        most: Ids of their prompts with the padding, at most; a prompt longer than that is alone.
        sampling: Temperature, top_k and top_p of :class:`~slm.decoding.row_rules.SeededSampling`.

    Returns:
        One answer per prompt, in order. What the other rows of a batch do changes none but by rounding.
    """
    answers: dict[int, Answer] = {}
    request = _request(model, prompts, grammar, limits, seeds, bare_prompts, guidance, sampling)
    for found in _rounds(request, batch_size or len(prompts), most):
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
    request = _request(model, [prompt], grammar, [limits], seeds, bare, guidance, sampling)
    for found in _rounds(request, 1, math.inf, every):
        yield found[0]


def _request(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    grammar: Grammar,
    limits: Sequence[RowLimits],
    seeds: Sequence[int] | None,
    bare_prompts: Sequence[np.ndarray] | None,
    guidance: float,
    sampling: Mapping[str, Any],
) -> Request:
    if bare_prompts is None:
        return Request(model, prompts, grammar, limits, seeds, sampling)
    seeds = None if seeds is None else [*seeds, *seeds]
    doubled = ([*prompts, *bare_prompts], grammar, [*limits, *limits], seeds, sampling)
    return Request(model, *doubled, guidance=Guidance(guidance))


@torch.inference_mode()
def _rounds(request: Request, batch_size: int, most: float, every: int | None = None) -> Iterator[dict[int, Answer]]:
    """Yields after each round what each of its rows has written, and why it ended; `going` where it goes on.

    A round is over when enough of its rows have ended, or after `every` ids.
    """
    lengths = [len(prompt) for prompt in request.prompts[: request.n_asked]]
    everything: Iterable[list[int]] = [list(range(len(lengths)))]
    if not only_attention(request.model):  # no row can come to others
        everything = buckets(lengths, batch_size, most)
    for numbers in everything:
        yield from _work_off(request, Waiting(numbers, lengths, batch_size, most), every)


def _work_off(request: Request, waiting: Waiting, every: int | None) -> Iterator[dict[int, Answer]]:
    """The rounds of prompts that wait for places in one batch."""
    running: RunningBatch | None = None
    while waiting or running is not None:
        groups = waiting.take([] if running is None else running.asked)
        for group in groups:
            new = RunningBatch(request, group)
            if running is not None or len(groups) > 1:
                yield new.go_on(len(new.rows), 1)  # reads its prompts, so that it can come to the others
            if running is not None and new.rows:
                running.join(new)
            elif new.rows:
                running = new
        if running is not None:
            share = REFILL_SHARE if waiting else LEAVE_SHARE
            yield running.go_on(math.ceil(share * len(running.rows)), every)
            running = running if running.rows else None


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
    legal = LegalIds(grammar, [length] * len(prompts))
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
