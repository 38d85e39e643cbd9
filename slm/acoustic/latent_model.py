"""The stage that predicts what acoustic books add to the codec's latents: flow matching, diffusion or regression.

Shapes: B items, T frames (a prompt's, then a target's, then padding), K books, D width, d of the latent space.
`audio_codes` (B, K, T) int64 with -1 in padding, `noise` (B, d, T), `time` (B,) in [0, 1] with the latents at 1,
`dropped` (B,) bool marks items whose condition is left out; `prompt` and `frames` (B, T) as in `layers`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel

from slm.acoustic.configuration import LatentConfig
from slm.acoustic.diffusion import Diffusion
from slm.acoustic.flow import Flow
from slm.acoustic.latent_space import LatentSpace
from slm.acoustic.layers import AcousticOutput, FrameTransformer
from slm.acoustic.paths import LatentPath
from slm.acoustic.regression import Regression
from slm.acoustic.samples import Item

PATHS: dict[str, LatentPath] = {"flow": Flow(), "diffusion": Diffusion(), "regression": Regression()}


class LatentModel(FrameTransformer):
    """Predicts where a mixture of latents and noise is to go, from the codes of book 0 and a voice.

    A frame is the sum of its code's vector, of what is added to that code in the mean, of its point in the latent space
    and of the time's vector. The voice's points are the clean ones, those of the target the mixture (as the infilling
    of Voicebox, arXiv 2306.15687). For classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) the codes and
    the voice of some items are dropped.
    """

    config_class = LatentConfig

    def __init__(self, config: LatentConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.codes = nn.Embedding(config.codebook_sizes[0] + 1, width)  # the last one: dropped
        self.means_in = nn.Linear(config.space_dim, width, bias=False)
        self.points_in = nn.Linear(config.space_dim, width)
        self.time_in = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.add_layers()
        self.points_out = nn.Linear(width, config.space_dim)
        self.space = LatentSpace(config.codebook_sizes[: 1 + config.n_added_books], config.latent_dim, config.space_dim)
        self.path = PATHS[config.objective]
        self.post_init()

    def predict(
        self, audio_codes: Tensor, mixture: Tensor, prompt: Tensor, frames: Tensor, time: Tensor, dropped: Tensor
    ) -> Tensor:
        """What the objective asks for, (B, T, d) in fp32; on the voice's frames it means nothing.

        Args:
            audio_codes: (B, K, T); of the target's frames book 0 is read alone.
            mixture: (B, T, d); of the voice's frames nothing is read.
            prompt, frames, time, dropped: As in the file's legend.
        """
        codes = audio_codes[:, 0].clamp_min(0)
        means = self.space.entries_0[codes].masked_fill(dropped[:, None, None], 0.0)
        codes = codes.masked_fill(dropped[:, None], self.config.codebook_sizes[0])
        voice = self.points(audio_codes).masked_fill(dropped[:, None, None], 0.0)
        points = torch.where(prompt[..., None], voice, mixture)
        waves = _waves(time, self.config.hidden_size)
        x = self.codes(codes) + self.means_in(means) + self.points_in(points) + self.time_in(waves)[:, None]
        guess = mixture * self.path.share(time[:, None, None])
        return guess + self.points_out(self.through_layers(x, prompt, frames)).float()

    def points(self, audio_codes: Tensor) -> Tensor:
        """Where the acoustic codes lie in the latent space, (B, T, d)."""
        return self.space.points(audio_codes[:, : 1 + self.config.n_added_books])

    def forward(
        self,
        audio_codes: Tensor,
        prompt: Tensor,
        frames: Tensor,
        noise: Tensor,
        time: Tensor,
        dropped: Tensor,
    ) -> AcousticOutput:
        """The squared error of what the objective asks for, averaged over directions and the targets' frames."""
        clean, noise, when = self.points(audio_codes), noise.transpose(1, 2), time[:, None, None]
        found = self.predict(audio_codes, self.path.mixture(clean, noise, when), prompt, frames, time, dropped)
        errors = (found - self.path.target(clean, noise, when)).square().mean(dim=-1)
        wanted = frames & ~prompt
        return AcousticOutput(loss=errors.masked_fill(~wanted, 0.0).sum() / wanted.sum().clamp_min(1))


def draw_latent_sample(item: Item, config: LatentConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """An item with a time, noise and whether its condition is dropped, all drawn from `rng`."""
    time, dropped = rng.random(), rng.random() < config.condition_dropout
    noise = rng.standard_normal((config.space_dim, len(item.is_prompt)), dtype=np.float32)
    return {
        "audio_codes": item.codes,
        "prompt": item.is_prompt,
        "noise": noise,
        "time": np.asarray(time, dtype=np.float32),
        "dropped": np.asarray(dropped),
    }


def _waves(time: Tensor, width: int) -> Tensor:
    """Sines and cosines (B, D) of times (B,), of 1 to 1000 radians a unit."""
    rates = 1000.0 ** torch.linspace(0, 1, width // 2, device=time.device)
    angles = time.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def new_latent_model(config: LatentConfig, space: LatentSpace, seed: int) -> LatentModel:
    """A stage for a fitted latent space, with random weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LatentModel(config)
    model.space.load_state_dict(space.state_dict())
    return model


AutoModel.register(LatentConfig, LatentModel)
