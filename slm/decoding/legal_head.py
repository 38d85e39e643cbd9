"""An LLM's head for the legal ids alone, while answers are decoded.

A head of 170,000 rows of which 2,049 are legal takes most of a step for logits that are then forbidden. Here the legal
rows are taken out once for a batch, and the others' logits are 0: whoever asks has to forbid them still.

Shapes: B rows, D width, V ids, C legal ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_SHARE = 0.5  # of the rows: with more, the rows that are left out do not pay for the copy


@contextmanager
def legal_rows(model: nn.Module, legal: Sequence[Tensor], end_id: int) -> Iterator[None]:
    """While open, the head's logits are those of the whole head where an id is legal, and 0 elsewhere.

    Nothing changes where most ids are legal, or where the head is no plain linear one: then its logits are all there.

    Args:
        model: A causal LM.
        legal: (V,) bool masks; an id is legal if it is in one of them.
        end_id: Legal too.
    """
    head = model.get_output_embeddings()
    allowed = torch.stack(list(legal)).any(dim=0)
    allowed[end_id] = True
    plain = type(head) is nn.Linear and "forward" not in head.__dict__
    if not plain or allowed.float().mean() > MOST_SHARE:
        yield
        return
    ids = allowed.nonzero()[:, 0].to(head.weight.device)
    weight = head.weight.detach()[ids]
    bias = None if head.bias is None else head.bias.detach()[ids]

    def forward(states: Tensor) -> Tensor:
        logits = F.linear(states, weight, bias)
        return logits.new_zeros(*logits.shape[:-1], len(allowed)).index_copy_(-1, ids, logits)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward
