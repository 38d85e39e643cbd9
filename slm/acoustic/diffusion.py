"""Variance-preserving diffusion that predicts v, with DDIM steps.

The mixture is x_t = a x_1 + s x_0 with a = sin(pi t / 2), s = cos(pi t / 2), the cosine schedule, time counted from
the noise. Predicted is v = a x_0 - s x_1 (Salimans and Ho 2022, arXiv 2202.00512, section 4 and appendix D): where
there is noise alone it tells the latents, as a prediction of the noise would not. A deterministic DDIM step (Song et
al. 2020, arXiv 2010.02502, equation 12) takes the latents and the noise apart, a x_t - s v and s x_t + a v, and mixes
them anew. Diff-LM-Speech (arXiv 2307.15484) makes spectrograms from semantic tokens by diffusion.

Shapes as in `paths`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Diffusion:
    """`objective: diffusion`."""

    one_step = False

    def mixture(self, clean: Tensor, noise: Tensor, time: Tensor | float) -> Tensor:
        """x_t, of variance 1 where that of the latents is 1."""
        signal, deviation = _shares(time)
        return signal * clean + deviation * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor | float) -> Tensor:
        """v."""
        signal, deviation = _shares(time)
        return signal * noise - deviation * clean

    def share(self, time: Tensor | float) -> Tensor | float:
        """v has no covariance with x_t."""
        return 0.0

    def step(self, mixture: Tensor, prediction: Tensor, time: float, until: float) -> Tensor:
        """A DDIM step without fresh noise."""
        signal, deviation = _shares(time)
        clean = signal * mixture - deviation * prediction
        noise = deviation * mixture + signal * prediction
        return self.mixture(clean, noise, until)


def _shares(time: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
    """The shares of latents and noise at a time; their squares add up to 1."""
    if isinstance(time, Tensor):
        angle = time * (math.pi / 2)
        return torch.sin(angle), torch.cos(angle)
    return math.sin(time * math.pi / 2), math.cos(time * math.pi / 2)
