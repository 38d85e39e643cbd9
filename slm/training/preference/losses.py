"""What preference optimisation minimises, as pure functions of log-probabilities.

Shapes: P pairs, G answers of one group, N answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    Args:
        chosen: (P,) log-probabilities of whole chosen answers under the model that trains.
        rejected: (P,) of the rejected ones.
        reference_chosen: (P,) the same under the frozen start.
        reference_rejected: (P,).
        beta: How strongly the start holds the model.

    Returns:
        (P,) losses, and (P,) margins: how much more reward, by eq. 5, the chosen answer has than the rejected.
    """
    margins = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -F.logsigmoid(margins), margins


def group_advantages(rewards: Sequence[float]) -> np.ndarray:
    """(G,) rewards of one prompt's answers -> (G,) advantages of mean 0 and variance 1; zeros where all are equal.

    DeepSeekMath (Shao et al. 2024, arXiv 2402.03300), section 4.1.2.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.max() == values.min():
        return np.zeros_like(values)
    return (values - values.mean()) / values.std()


def clipped_policy_loss(
    log_probabilities: Tensor, drawn_with: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of the policy gradient (PPO, arXiv 1707.06347, eq. 7), as in DeepSeekMath's eq. 3.

    Args:
        log_probabilities: (N,) under the model that trains.
        drawn_with: (N,) under the model that drew the answers.
        advantages: (N,) of each token's answer.
        clip: The ratio counts from 1 - clip to 1 + clip.

    Returns:
        (N,) losses, and (N,) bool: where the clipped ratio was the one that counted.
    """
    ratio = (log_probabilities - drawn_with).exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(free, clipped), clipped < free


def kl_estimate(log_probabilities: Tensor, reference: Tensor) -> Tensor:
    """(N,) unbiased, never negative estimates of the divergence from the reference (DeepSeekMath, eq. 4)."""
    difference = reference - log_probabilities
    return difference.exp() - difference - 1
