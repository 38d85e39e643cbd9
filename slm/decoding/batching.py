"""Which prompts are decoded together: in batches of like length, or one after the other as others' rows end.

Shapes: B prompts of a batch, padded on the left to P.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel


def buckets(lengths: Sequence[int], batch_size: int, most: float = math.inf) -> Iterator[list[int]]:
    """Indices in batches of like prompt lengths: none is longer than twice another, or it would pad all the others.

    Args:
        lengths: Ids of each prompt.
        batch_size: Prompts of a batch, at most.
        most: Ids of a batch with its padding, at most; a prompt longer than that is alone.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        full = len(batch) == batch_size or (len(batch) + 1) * lengths[i] > most
        if batch and (full or lengths[i] > 2 * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class Waiting:
    """Prompts that are not begun yet, the longest first: their answers tend to be the longest, and to end the latest.

    Args:
        numbers: Of the prompts.
        lengths: Ids of each prompt, by its number.
        batch_size: Rows of the batch that they wait for, at most.
        most: Ids of the batch's prompts with their padding, at most; a prompt longer than that is alone.
    """

    def __init__(self, numbers: Sequence[int], lengths: Sequence[int], batch_size: int, most: float = math.inf) -> None:
        self.lengths, self.batch_size, self.most = lengths, batch_size, most
        self.left = sorted(numbers, key=lambda i: -lengths[i])

    def __len__(self) -> int:
        return len(self.left)

    def take(self, running: Sequence[int]) -> list[list[int]]:
        """The next prompts, in groups of like length, that there is room for beside prompts that are being answered."""
        lengths, taken = [self.lengths[i] for i in running], []
        for i in self.left:
            longest = max([*lengths, self.lengths[i]])
            if lengths and (len(lengths) == self.batch_size or (len(lengths) + 1) * longest > self.most):
                break
            taken.append(i)
            lengths.append(self.lengths[i])
        self.left = self.left[len(taken) :]
        own = [self.lengths[i] for i in taken]
        return [[taken[place] for place in group] for group in buckets(own, self.batch_size)]


def pad_prompts(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], end_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left, (B, P) ids and mask on the model's device."""
    length = max(len(prompt) for prompt in prompts)
    pad = model.generation_config.pad_token_id
    ids = torch.full((len(prompts), length), end_id if pad is None else pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.from_numpy(prompt if prompt.ndim == 1 else prompt[:, 0])
        mask[row, length - len(prompt) :] = 1
    return ids.to(model.device), mask.to(model.device)
