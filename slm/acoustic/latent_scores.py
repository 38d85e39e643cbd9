"""How much of what the acoustic books add a stage explains on a split.

Shapes: B items, d of the latent space.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from slm.acoustic.latent_decoding import drawn_points
from slm.acoustic.latent_model import LatentModel, draw_latent_sample
from slm.acoustic.pieces import AcousticDecoding
from slm.acoustic.samples import Item, collate


@torch.inference_mode()
def latent_scores(model: LatentModel, items: Sequence[Item], batch_size: int = 16) -> dict[str, float]:
    """The loss, and the share of the variance about the codes' means that a drawing without noise explains.

    Args:
        model: The stage; it is put in eval mode and back.
        items: What is predicted.
        batch_size: Items at a time.

    Returns:
        `loss`, at times and noise that are the same in every evaluation; `explained`, 1 - squared error / variance, in
        the directions that are predicted and measured in the codec's latents: 1 are the true latents, 0 is the mean of
        each code of book 0, which needs no stage.
    """
    was_training = model.training
    model.eval()
    lengths, settings = model.space.directions.square().sum(dim=-1), AcousticDecoding()
    loss, error, variance = 0.0, 0.0, 0.0
    for start in range(0, len(items), batch_size):
        some = list(enumerate(items))[start : start + batch_size]
        rows = [draw_latent_sample(item, model.config, np.random.default_rng(number)) for number, item in some]
        batch = {name: tensor.to(model.device) for name, tensor in collate(rows).items()}
        batch["dropped"] = torch.zeros_like(batch["dropped"])
        loss += float(model(**batch).loss) * len(some)
        batch = {name: batch[name] for name in ("audio_codes", "prompt", "frames", "noise")}
        batch["noise"], wanted = torch.zeros_like(batch["noise"]), batch["frames"] & ~batch["prompt"]
        truth = model.points(batch["audio_codes"])[wanted]
        error += float(((drawn_points(model, **batch, settings=settings)[wanted] - truth).square() * lengths).sum())
        variance += float((truth.square() * lengths).sum())
    model.train(was_training)
    return {"loss": loss / len(items), "explained": 1 - error / variance}
