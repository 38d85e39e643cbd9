"""What DPO and GRPO share: samples of one task, and a trainer without dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from slm.training.trainer import SpeechTrainer


class OneTask:
    """Samples of one task: what of the protocol `Samples` is the same for pairs and prompts."""

    task_names: Sequence[str] = ("preference",)
    task_weights: Sequence[float] = (1.0,)
    repeats: np.ndarray | None = None

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.tasks = np.zeros(len(self.lengths), dtype=np.int64)


class PreferenceTrainer(SpeechTrainer):
    """What DPO and GRPO share: log-probabilities of answers, no dropout."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Dropout would move the probabilities that two of the same model are compared by.
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
