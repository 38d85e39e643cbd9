"""From noise to latents: what an objective of the latent stage is, and how its answer is reached in steps.

A path mixes clean latents and Gaussian noise: at time 0 there is noise alone, at time 1 the latents. The model reads
the mixture and predicts what the objective says; a step of the objective moves on along the path. `flow`, `diffusion`
and `regression` are the objectives; the model, the data and the interface are the same.

Shapes: B items, T frames, d channels; mixtures, noise and predictions (B, T, d), times (B,) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class LatentPath(Protocol):
    """An objective of the latent stage. Times come as (B, 1, 1), or as plain numbers."""

    one_step: bool
    """Whether the prediction is the answer, so that further steps would change nothing."""

    def mixture(self, clean: Tensor, noise: Tensor, time: Tensor | float) -> Tensor:
        """What the model reads at `time`."""

    def target(self, clean: Tensor, noise: Tensor, time: Tensor | float) -> Tensor:
        """What the model is to predict from it."""

    def share(self, time: Tensor | float) -> Tensor | float:
        """How much of the mixture is the best guess at the target that needs no model, were the latents noise too.

        That of variance 1, which the latents have along each direction. The model adds to this guess, so that it need
        not learn to pass its input on (the skip connection of Karras et al. 2022, arXiv 2206.00364, section 5).
        """

    def step(self, mixture: Tensor, prediction: Tensor, time: float, until: float) -> Tensor:
        """The mixture at the time `until`, from that at `time` and what was predicted there."""


def follow(path: LatentPath, predict: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Follows a path from noise at time 0 to latents at time 1 in steps of equal length.

    Args:
        path: The objective.
        predict: Gives the model's prediction for a mixture (B, T, d) at a time.
        noise: (B, T, d).
        steps: How many; of an objective of one step, one is taken.

    Returns:
        The latents (B, T, d).
    """
    steps = 1 if path.one_step else steps
    mixture = path.mixture(noise.new_zeros(noise.shape), noise, 0.0)
    for number in range(steps):
        time, until = number / steps, (number + 1) / steps
        mixture = path.step(mixture, predict(mixture, time), time, until)
    return mixture
