"""Conditional flow matching on straight paths (Lipman et al. 2022, arXiv 2210.02747, section 4.1, example II).

The optimal-transport path with its smallest deviation at 0, as rectified flow has it: x_t = t x_1 + (1 - t) x_0, whose
velocity x_1 - x_0 is predicted; Euler steps. Voicebox (arXiv 2306.15687), Matcha-TTS (arXiv 2309.03199) and CosyVoice
(arXiv 2407.05407, section 2.3) generate speech so.

Shapes as in `paths`.
"""

from __future__ import annotations

from torch import Tensor


class Flow:
    """`objective: flow`."""

    one_step = False

    def mixture(self, clean: Tensor, noise: Tensor, time: Tensor | float) -> Tensor:
        """x_t."""
        return time * clean + (1 - time) * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor | float) -> Tensor:
        """The velocity, the same at all times."""
        return clean - noise

    def share(self, time: Tensor | float) -> Tensor | float:
        """The covariance of velocity and x_t, by the variance of x_t."""
        return (2 * time - 1) / (time**2 + (1 - time) ** 2)

    def step(self, mixture: Tensor, prediction: Tensor, time: float, until: float) -> Tensor:
        """An Euler step."""
        return mixture + (until - time) * prediction
