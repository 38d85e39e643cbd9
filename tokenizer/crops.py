"""Training crops: item n of an endless run, everything about it drawn from (seed, n).

Shapes: B batch, S samples of a crop, K books.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokenizer.augmentation import AugmentationConfig, augment
from tokenizer.data import AudioStore, epoch_item


@dataclass
class CropConfig:
    """How a crop is cut and which parts of the tokenizer it passes."""

    crop_s: float = field(default=2.0, metadata={"help": "length of a crop, seconds (published: 6)"})
    quantizer_dropout: float = field(
        default=0.5, metadata={"help": "share of crops that keep only 1 to K-1 acoustic books (published: 0.5)"}
    )
    semantic_only: float = field(
        default=0.1,
        metadata={
            "help": "share decoded from book 0 alone, detached (ours: it makes semantic reconstruction sound well)"
        },
    )

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}: must lie in [0, 1]"
            for name in ("quantizer_dropout", "semantic_only")
            if not 0 <= getattr(self, name) <= 1
        ]
        if self.crop_s <= 0:
            problems.append(f"crop_s={self.crop_s}: must be positive")
        if problems:
            raise ValueError("crops: " + "; ".join(problems))


class TrainingCrops(Dataset):
    """Item n: {"input_values" (1, S), "padding_mask" (S,), "n_acoustic_books" (), "semantic_only" ()}."""

    def __init__(
        self,
        store: AudioStore,
        config: CropConfig,
        augmentation: AugmentationConfig,
        n_books: int,
        length: int,
        seed: int,
    ) -> None:
        self.store, self.config, self.augmentation = store, config, augmentation
        self.n_books, self.length, self.seed = n_books, length, seed
        self.samples = round(config.crop_s * store.sampling_rate)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, position))
        _, waveform = self.store.readable(epoch_item(position, len(self.store), self.seed))
        # A margin is cut with the crop, so that a faster copy still fills it; resampling less costs less.
        margin = round(self.samples * (1 + self.augmentation.speed)) + 64
        start = int(rng.integers(0, max(1, len(waveform) - margin + 1)))
        crop = augment(waveform[start : start + margin], self.augmentation, rng)[: self.samples]
        keeps_some = rng.uniform() < self.config.quantizer_dropout
        kept = int(rng.integers(1, self.n_books)) if keeps_some else self.n_books - 1
        semantic_only = bool(rng.uniform() < self.config.semantic_only)
        padded = np.pad(crop, (0, self.samples - len(crop)))
        return {
            "input_values": torch.from_numpy(padded)[None],
            "padding_mask": torch.arange(self.samples) < len(crop),
            "n_acoustic_books": torch.tensor(kept),
            "semantic_only": torch.tensor(semantic_only),
        }


def validation_crops(store: AudioStore, crop_s: float, limit: int) -> Tensor:
    """The middle `crop_s` seconds of up to `limit` recordings (B, 1, S), the same at every validation."""
    samples = round(crop_s * store.sampling_rate)
    crops = []
    for index in range(min(limit, len(store))):
        _, waveform = store.readable(index)
        start = max(0, (len(waveform) - samples) // 2)
        crop = waveform[start : start + samples]
        crops.append(np.pad(crop, (0, samples - len(crop))))
    return torch.from_numpy(np.stack(crops))[:, None]
