"""From semantic codes and a voice to what the acoustic books would add to the codec's latents.

Shapes: B items, F frames of an answer, T of voice, answer and padding, D latent channels, d of the latent space.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slm.acoustic.latent_model import LatentModel
from slm.acoustic.paths import follow
from slm.acoustic.pieces import AcousticDecoding, Piece
from slm.acoustic.samples import collate


@torch.inference_mode()
def fill_latents(model: LatentModel, pieces: Sequence[Piece], settings: AcousticDecoding) -> list[np.ndarray]:
    """What the books add, (D, F) float32 each, of one batch of pieces.

    Raises:
        AcousticError: Not exactly one book is given.
    """
    model.config.check_given(len(pieces[0].given))
    rows = []
    for piece in pieces:
        noise = torch.zeros(model.config.space_dim, len(piece.is_prompt))
        drawn = torch.randn(noise.shape[0], piece.given.shape[1], generator=piece.stream())
        noise[:, piece.voice.shape[1] :] = settings.temperature * drawn
        rows.append({"audio_codes": piece.codes, "prompt": piece.is_prompt, "noise": noise.numpy()})
    batch = {name: tensor.to(model.device) for name, tensor in collate(rows).items()}
    points = drawn_points(model, **batch, settings=settings)
    latents = model.space.latents(points, batch["audio_codes"][:, 0]).cpu().numpy()
    wanted = (batch["frames"] & ~batch["prompt"]).cpu().numpy()
    return [latents[row][wanted[row]].T.copy() for row in range(len(pieces))]


def drawn_points(
    model: LatentModel, audio_codes: Tensor, prompt: Tensor, frames: Tensor, noise: Tensor, settings: AcousticDecoding
) -> Tensor:
    """Follows the objective's path from noise (B, d, T) to points of the latent space (B, T, d)."""
    batch = {"audio_codes": audio_codes, "prompt": prompt, "frames": frames}

    def predict(mixture: Tensor, time: float) -> Tensor:
        times = mixture.new_full((len(mixture),), time)
        dropped = torch.zeros(len(mixture), dtype=torch.bool, device=mixture.device)
        conditional = model.predict(mixture=mixture, time=times, dropped=dropped, **batch)
        if settings.guidance == 1:
            return conditional
        # Away from the prediction without a condition (Ho and Salimans 2022, equation 6, with 1 as none).
        free = model.predict(mixture=mixture, time=times, dropped=~dropped, **batch)
        return free + settings.guidance * (conditional - free)

    return follow(model.path, predict, noise.transpose(1, 2), settings.steps)
