"""The loss of the answers without logits of the whole batch: the head runs where an answer is, some tokens at a time.

A vocabulary of 263,232 rows takes a megabyte of logits for each position, and twice that for their gradient; most
positions are prompts, which have no loss. Here the head and the loss of a chunk of answer tokens are computed together
with their gradients, and the logits are gone before the next chunk: memory grows with neither the batch nor, beyond
one chunk, the vocabulary. It is the idea of the fused losses of GPU kernels (Liger, cut cross-entropy) in plain torch,
for any head: a bias, adapters and tied tables are the head's own business.

Shapes: N answer tokens of a batch, D width, V vocabulary; hidden states (R, L, D) of R rows of length L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 25  # of a chunk's logits: 128 MiB in fp32
# Answer tokens are filled up to a multiple: a CPU compiles and keeps a kernel, of a megabyte, for each number of them.
TOKEN_MULTIPLE = 32
# Relative, between this loss and that of whole logits: rounding, or the model does other things after its head.
TOLERANCE = 1e-3
# What comes of a model that does something else with its head or its logits.
OTHER_LOGITS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of weighted cross-entropies of a head's logits; its gradients are made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, labels: Tensor, weights: Tensor, chunk: int, *parameters: Tensor
    ) -> Tensor:
        learnt = [p for p in parameters if p.requires_grad]
        sums = [torch.zeros_like(p) for p in learnt]
        of_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        gradients = head.gradients if hidden.requires_grad or learnt else head.loss_alone
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            span = slice(start, start + chunk)
            loss, of_part = gradients(hidden[span].detach(), labels[span], weights[span], learnt, sums)
            total += loss
            if of_hidden is not None:
                of_hidden[span] = of_part
        given = iter(sums)
        ctx.gradients = [of_hidden, *(next(given) if p.requires_grad else None for p in parameters)]
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # In place: another table of gradients would be as large as the logits that were saved.
        of_hidden, *sums = (None if g is None else g.mul_(scale.to(g.dtype)) for g in ctx.gradients)
        ctx.gradients = None
        return (of_hidden, None, None, None, None, *sums)


class Head:
    """A head whose gradients torch finds: adapters, and whatever else it may be."""

    def __init__(self, logits_of: Callable[[Tensor], Tensor]) -> None:
        self.logits_of = logits_of

    def gradients(
        self, hidden: Tensor, labels: Tensor, weights: Tensor, learnt: list[Tensor], sums: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The loss of some tokens (N, D) and its gradient there; that of what is learnt is added to `sums`."""
        with torch.enable_grad():
            part = hidden.requires_grad_()
            loss = _weighted(self.logits_of(part), labels, weights)
        of_part, *found = torch.autograd.grad(loss, [part, *learnt])
        for target, value in zip(sums, found, strict=True):
            target += value
        return loss.detach(), of_part

    def loss_alone(self, hidden: Tensor, labels: Tensor, weights: Tensor, *_: Any) -> tuple[Tensor, None]:
        """The loss of some tokens (N, D)."""
        return _weighted(self.logits_of(hidden), labels, weights), None


@dataclass(frozen=True)
class AfterHead:
    """What some models do to their logits: a factor (Granite, Cohere, Falcon-H1), a soft cap (Gemma 2).

    Args:
        factor: logits are multiplied by it first.
        cap: then x -> cap tanh(x / cap); None: nothing.
    """

    factor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> AfterHead:
        """As a configuration of transformers names it; whether it is true, `AnswerLoss.fits` finds out."""
        caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
        multipliers = (getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier"))
        factor = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(factor * next((m for m in multipliers if m), 1.0), next((cap for cap in caps if cap), None))

    def __call__(self, logits: Tensor) -> Tensor:
        """(N, V) logits of the head -> those of the model."""
        logits = logits if self.factor == 1.0 else logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def slope(self, after: Tensor, slope: Tensor) -> Tensor:
        """The gradient (N, V) of the head's logits, in place, from that of the model's logits `after`."""
        if self.cap is not None:
            slope *= 1 - (after / self.cap) ** 2
        return slope if self.factor == 1.0 else slope.mul_(self.factor)


class LinearHead(Head):
    """A plain linear head: the gradient of its table is added where it belongs, without a second table."""

    def __init__(self, linear: nn.Linear, after: AfterHead) -> None:
        # Not by its forward, in whose place the loss stands.
        super().__init__(lambda hidden: after(F.linear(hidden, linear.weight, linear.bias)))
        self.linear, self.after = linear, after
        device = linear.weight.device.type
        autocast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if autocast else linear.weight.dtype
        self.table = linear.weight.detach().to(self.dtype)

    def gradients(
        self, hidden: Tensor, labels: Tensor, weights: Tensor, learnt: list[Tensor], sums: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """As `Head.gradients`; the derivative of a cross-entropy by its logits is softmax - one-hot."""
        part = hidden.to(self.dtype)
        bias = None if self.linear.bias is None else self.linear.bias.detach().to(self.dtype)
        logits = self.after(F.linear(part, self.table, bias).float())
        loss = _weighted(logits, labels, weights)
        slope = logits.softmax(-1)
        slope[torch.arange(len(labels), device=labels.device), labels] -= 1
        slope *= weights[:, None]
        slope = self.after.slope(logits, slope)
        del logits
        slope = slope.to(self.dtype)
        for parameter, target in zip(learnt, sums, strict=True):
            if parameter is self.linear.bias:
                target += slope.sum(0)
            elif target.dtype == self.dtype:
                target.addmm_(slope.t(), part)
            else:
                target += slope.t() @ part
        return loss, (slope @ self.table).to(hidden.dtype)


def label_log_probabilities(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """(N, V) logits and (N,) labels -> (N,) log-probabilities in fp32."""
    return -F.cross_entropy(logits.float() / temperature, labels, reduction="none")


def _weighted(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return (F.cross_entropy(logits.float(), labels, reduction="none") * weights).sum()


def chunked_loss(
    states: Tensor, linear: nn.Linear, labels: Tensor, weights: Tensor, after: AfterHead | None = None
) -> Tensor:
    """Sum of the weighted cross-entropies (a scalar, fp32) of a linear head on (N, D) states, some tokens at a time.

    `linear` may be some rows of one: what has their `weight` (C, D) and `bias`. `after` is done to the logits.
    """
    chunk, head = max(1, CHUNK_ELEMENTS // len(linear.weight)), LinearHead(linear, after or AfterHead())
    return _chunked(states, head, labels, weights, chunk, _weights(linear))


def _chunked(
    states: Tensor, head: Head, labels: Tensor, weights: Tensor, chunk: int, parameters: list[Tensor]
) -> Tensor:
    # An evaluation asks for no gradients, and the table's would be as large as the table.
    learnt = parameters if torch.is_grad_enabled() else []
    states, labels, weights = _filled(states, labels, weights)  # what is filled in has no weight
    return _ChunkedLoss.apply(states, head, labels, weights, chunk, *learnt)


def _filled(*of_tokens: Tensor) -> list[Tensor]:
    """Tensors of N tokens each, with zeros up to a multiple of TOKEN_MULTIPLE."""
    missing = -len(of_tokens[0]) % TOKEN_MULTIPLE
    return [torch.cat([one, one.new_zeros(missing, *one.shape[1:])]) for one in of_tokens]


class AnswerLoss:
    """Sum of the weighted cross-entropies of the answer tokens of a causal LM, through its own head.

    Args:
        model: a transformers causal LM, adapters and all, not wrapped by an engine.
    """

    def __init__(self, model: nn.Module) -> None:
        self.head = model.get_output_embeddings()
        weight = getattr(self.head, "weight", None)
        self.rows = model.config.get_text_config().vocab_size if weight is None else weight.shape[0]
        self.after = AfterHead.of(model.config.get_text_config())

    def __call__(
        self, model: nn.Module, input_ids: Tensor, position_ids: Tensor, labels: Tensor, weights: Tensor, ignored: int
    ) -> Tensor:
        """The loss of a batch, as a scalar in fp32.

        Args:
            model: the one given before, as its engine wraps it.
            input_ids: (R, L).
            position_ids: (R, L).
            labels: (R, L), `ignored` where there is no answer; position j is predicted at j - 1.
            weights: (R, L) of the labels.
            ignored: the label of positions without loss.
        """
        answered = labels[:, 1:] != ignored
        targets, counts = labels[:, 1:][answered], weights[:, 1:][answered]
        chunk = max(1, CHUNK_ELEMENTS // self.rows)

        own, after, plain = self.head.forward, self.after, self.is_plain

        def loss(hidden: Tensor) -> Tensor:
            head = LinearHead(self.head, after) if plain else Head(lambda states: after(own(states)))
            # Of now: FSDP2 puts other tensors in their place when it gathers what it shards.
            parameters = _weights(self.head) if plain else _leaves(own, hidden)
            return _chunked(hidden[:, :-1][answered], head, targets, counts, chunk, parameters)

        with _in_place_of(self.head, loss) as found:
            model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return found[-1]

    @property
    def is_plain(self) -> bool:
        """Whether the head is a linear layer and nothing else: no adapters, no rows beside it."""
        return type(self.head) is nn.Linear and "forward" not in self.head.__dict__

    def log_probabilities(
        self,
        model: nn.Module,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        ignored: int,
        temperature: float = 1.0,
    ) -> Tensor:
        """Log-probability of each answer token, (N,) fp32, row after row; its gradient reaches all that is trained.

        The logits of a chunk are made again on the way back, so that none are kept.

        Args:
            model: as in :meth:`__call__`, and so the tensors.
            input_ids: (R, L).
            position_ids: (R, L).
            labels: (R, L).
            ignored: the label of positions that are not asked for.
            temperature: logits are divided by it.
        """
        answered = labels[:, 1:] != ignored
        targets, chunk = labels[:, 1:][answered], max(1, CHUNK_ELEMENTS // self.rows)
        own, after = self.head.forward, self.after

        def of_chunk(states: Tensor, targets: Tensor) -> Tensor:
            return label_log_probabilities(after(own(states)), targets, temperature)

        def log_probabilities(hidden: Tensor) -> Tensor:
            parts = zip(*(one.split(chunk) for one in _filled(hidden[:, :-1][answered], targets)), strict=True)
            return torch.cat([checkpoint(of_chunk, *part, use_reentrant=False) for part in parts])[: len(targets)]

        with _in_place_of(self.head, log_probabilities) as found:
            model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return found[-1]

    @classmethod
    def of(cls, bare: nn.Module, model: nn.Module) -> AnswerLoss | None:
        """The loss of a causal LM, `model` as it is called; None where its head or its logits are of another kind."""
        try:
            loss = cls(bare)
        except OTHER_LOGITS:
            return None
        return loss if loss.fits(model) else None

    def fits(self, model: nn.Module) -> bool:
        """Whether the model gives the loss of its whole logits this way: not where it changes them after the head."""
        ids = torch.arange(1, 9, device=next(model.parameters()).device)[None] % self.rows
        weights = torch.linspace(0.5, 1.5, ids.shape[1], device=ids.device)[None]
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                whole = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, :-1].float()
                wanted = (F.cross_entropy(whole, ids[0, 1:], reduction="none") * weights[0, 1:]).sum()
                got = self(model, ids, positions, ids, weights, ignored=-100)
        except OTHER_LOGITS:
            return False
        finally:
            model.train(was_training)
        return got.ndim == 0 and bool((got - wanted).abs() <= TOLERANCE * wanted.abs())


def _weights(linear: nn.Linear) -> list[Tensor]:
    return [p for p in (linear.weight, linear.bias) if p is not None]


def _leaves(head: Callable[[Tensor], Tensor], states: Tensor) -> list[Tensor]:
    """The trainable tensors behind a head's output, those that it shares with other modules too; states (..., D)."""
    with torch.enable_grad():
        output = head(torch.zeros(1, states.shape[-1], dtype=states.dtype, device=states.device))
    leaves: dict[int, Tensor] = {}
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        nodes += [following for following, _ in node.next_functions]
    return list(leaves.values())


@contextmanager
def _in_place_of(head: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Lets a function stand for the head's forward pass, inside the hooks of engines; gives what comes out of them.

    The model may go on with it as with logits: what comes of that is not used.
    """
    own, found = head.__dict__.get("forward"), []
    head.forward = function
    # Behind the hooks that are there: DeepSpeed's gives another tensor, by which it knows when to gather weights again.
    handle = head.register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()
        if own is None:
            del head.forward
        else:
            head.forward = own
