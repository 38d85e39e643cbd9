"""The plain mean: latents predicted in one step from the condition alone, by their squared error.

What flow and diffusion are measured against: it draws nothing, so whatever it lacks the condition does not tell.

Shapes as in `paths`.
"""

from __future__ import annotations

from torch import Tensor


class Regression:
    """`objective: regression`."""

    one_step = True

    def mixture(self, clean: Tensor, noise: Tensor, time: Tensor | float) -> Tensor:
        """Zeros: the model reads the condition alone."""
        return clean.new_zeros(clean.shape)

    def target(self, clean: Tensor, noise: Tensor, time: Tensor | float) -> Tensor:
        """The latents themselves."""
        return clean

    def share(self, time: Tensor | float) -> Tensor | float:
        """There is no mixture to pass on."""
        return 0.0

    def step(self, mixture: Tensor, prediction: Tensor, time: float, until: float) -> Tensor:
        """The prediction is the answer."""
        return prediction
