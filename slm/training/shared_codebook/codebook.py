"""States of any length as a distribution over a few discrete units, and how far two such distributions are apart.

Shapes: N pairs, S states of one (padded), D their width; M slots, V entries of the codebook, C their width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CODE_DIM = 64
TEMPERATURE = 0.1  # of the cosine between a slot's vector and the entries


class SharedCodebook(nn.Module):
    """Learnt queries gather states into slots, and each slot is written in the entries of one codebook.

    As the shared memory and the discrete vocabulary of DCMA (arXiv 2210.09556): what has another length, speech or
    text, becomes as many units of the same kind.

    Args:
        width: D.
        slots: M.
        entries: V.
    """

    def __init__(self, width: int, slots: int, entries: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(slots, width) * width**-0.5)
        self.project = nn.Linear(width, CODE_DIM)
        self.entries = nn.Parameter(torch.randn(entries, CODE_DIM))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Log probabilities (N, M, V) in fp32 of states (N, S, D), those where `mask` (N, S) is true."""
        states = self.norm(states.float())
        scores = torch.einsum("md,nsd->nms", self.queries.float(), states) * states.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        vectors = F.normalize(self.project(torch.einsum("nms,nsd->nmd", weights, states)), dim=-1)
        return (vectors @ F.normalize(self.entries.float(), dim=-1).T / TEMPERATURE).log_softmax(-1)


def alignment_loss(speech: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """How badly the two sides of each pair find each other in the batch by their units.

    DCMA takes the cross-entropy between both sides, each the other's target. By itself it is least where all pairs have
    one unit, and so it ends. Here minus that cross-entropy is the score of InfoNCE (arXiv 1807.03748): a pair has to be
    nearer to its own other side than to those of the other pairs.

    Args:
        speech, text: Log probabilities (N, M, V).

    Returns:
        The loss (N,), log N at chance, and whether the text's nearest recording is its own, (N,) float.
    """
    slots = speech.shape[1]
    of_text = torch.einsum("nmv,kmv->nk", text.exp(), speech) / slots  # minus the cross-entropy of each two
    of_speech = torch.einsum("nmv,kmv->nk", speech.exp(), text) / slots
    losses = -0.5 * (of_text.log_softmax(1) + of_speech.log_softmax(1)).diagonal()
    own = of_text.diagonal()
    others = of_text.detach().masked_fill(torch.eye(len(own), dtype=torch.bool, device=own.device), -torch.inf)
    return losses, (own.detach() > others.amax(1)).float()


@torch.no_grad()
def agreement(speech: Tensor, text: Tensor) -> Tensor:
    """Share of slots whose likeliest unit is the same on both sides, (N,)."""
    return (speech.argmax(-1) == text.argmax(-1)).float().mean(-1)
