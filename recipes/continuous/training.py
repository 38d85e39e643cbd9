"""Training of a continuous-input SLM with transformers' Trainer, in an order fixed by (seed, step, sample).

Shapes: S samples at 16 kHz, T text ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer

from recipes.continuous.encoder import ENCODER_RATE_HZ, encode_recordings
from slm.model.continuous import ContinuousLM
from tokenizer.data.augmentation import AugmentationConfig, augment
from tokenizer.data.mixing import TrainingAudio
from tokenizer.teacher.whisper import SpeechTeacher


class TrainingRecordings(Dataset):
    """Item n of an endless augmented run, {"samples" (S,), "text" (T,)}, drawn from (seed, n) alone."""

    def __init__(
        self,
        audio: TrainingAudio,
        texts: dict[str, np.ndarray],
        augmentation: AugmentationConfig,
        length: int,
        window_s: float,
        seed: int,
    ) -> None:
        self.audio, self.texts, self.augmentation, self.length, self.seed = audio, texts, augmentation, length, seed
        self.most = round(window_s * ENCODER_RATE_HZ)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        utterance, samples = self.audio.recording(self.audio.key(position))
        changed = augment(samples, self.augmentation, np.random.default_rng((self.seed, position)), ENCODER_RATE_HZ)
        return {"samples": samples if len(changed) > self.most else changed, "text": self.texts[utterance.id]}


def collate(items: list[dict[str, np.ndarray]]) -> dict[str, list[Any]]:
    """Recordings and texts as they are: nothing is padded before the encoder has heard it."""
    return {
        "waveforms": [item["samples"] for item in items],
        "texts": [torch.from_numpy(item["text"]) for item in items],
    }


class ContinuousTrainer(Trainer):
    """A Trainer whose encoder hears each step's recordings, and is no part of what is trained or saved."""

    def __init__(
        self, *args: Any, encoder: SpeechTeacher, validate: Callable[[ContinuousLM], dict[str, float]], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.encoder, self.validate = encoder, validate
        self.model_accepts_loss_kwargs = False  # the loss is a mean: the Trainer divides it by the accumulation

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> torch.Tensor:
        """The loss of a micro-batch."""
        return model(encode_recordings(self.encoder, inputs["waveforms"]), inputs["texts"])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The figures of `validate`, logged."""
        self.model.eval()
        metrics = self.validate(self.accelerator.unwrap_model(self.model))
        self.model.train()
        self.log(metrics)
        return metrics
