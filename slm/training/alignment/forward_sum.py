"""A monotonic alignment of speech with its text, as a loss on attention and a prior for it.

The forward-sum loss is minus the log of all monotonic paths through a soft alignment: "One TTS Alignment To Rule Them
All" (Badlani et al. 2021, arXiv 2108.10447, section 2.1), which takes it from CTC; here without CTC's blank, so that
every frame is on one token. The beta-binomial prior is section 2.2 of the same paper. Both on attention heads of an LLM
that speaks: Neekhara et al. 2024 (arXiv 2406.17957).

Shapes: N alignments, F frames (positions from which a code is predicted), T tokens of text, h heads; a soft alignment
(N, F, T) in logarithms, padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = -1e9  # log of what cannot be: finite, so that its gradient is 0 and not NaN


def forward_sum(log_alignment: Tensor, frames: Tensor, tokens: Tensor) -> Tensor:
    """Minus the log of the sum over all monotonic paths of their products.

    A path is on the first token at the first frame and on the last one at the last, and from frame to frame it stays or
    goes on by one: no token is skipped, none is come back to.

    Args:
        log_alignment: (N, F, T) fp32, log of how much each frame belongs to each token; padding is not read.
        frames: (N,) frames of each, not fewer than its tokens.
        tokens: (N,) tokens of each, at least 1.

    Returns:
        (N,).
    """
    n, longest, width = log_alignment.shape
    outside = log_alignment.new_full((n, 1), LOWEST)
    reached = torch.cat([log_alignment[:, 0, :1], outside.expand(n, width - 1)], dim=1)
    by_frame = [reached]
    for frame in range(1, longest):
        from_before = torch.cat([outside, reached[:, :-1]], dim=1)
        reached = torch.logaddexp(reached, from_before) + log_alignment[:, frame]
        by_frame.append(reached)
    return -torch.stack(by_frame, dim=1)[torch.arange(n, device=frames.device), frames - 1, tokens - 1]


def log_prior(frames: Tensor, tokens: Tensor, longest: int, width: int) -> Tensor:
    """The beta-binomial prior against an even one: log(T x P(token | frame)), so that T = 1 gives 0.

    P(. | f) is beta-binomial over tokens 0 to T - 1, a = f and b = F - f + 1 for the frame f = 1 ... F: a band along
    the diagonal, widest in the middle.

    Args:
        frames: (N,) F of each.
        tokens: (N,) T of each.
        longest: frames of the result.
        width: tokens of the result.

    Returns:
        (N, longest, width) fp32, 0 where padding is.
    """
    frame = torch.arange(1, longest + 1, device=frames.device, dtype=torch.float32)[None, :, None]
    token = torch.arange(width, device=frames.device, dtype=torch.float32)[None, None, :]
    n_frames, n_tokens = (count[:, None, None].float() for count in (frames, tokens))
    inside = (frame <= n_frames) & (token < n_tokens)
    a, b, last = frame, (n_frames - frame + 1).clamp_min(1), n_tokens - 1
    k, rest = torch.minimum(token, last), (last - token).clamp_min(0)
    choices = torch.lgamma(last + 1) - torch.lgamma(k + 1) - torch.lgamma(rest + 1)
    log_p = choices + _log_beta(k + a, rest + b) - _log_beta(a, b)
    return torch.where(inside, log_p + n_tokens.log(), 0.0)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
