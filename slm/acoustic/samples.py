"""What an acoustic stage is trained on: an utterance to fill, and another one of the same speaker as its voice.

Shapes: B items, K books, P frames of a prompt, F of a target, T of both and padding; codes (K, F).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from slm.acoustic.configuration import AcousticConfig, AcousticError


@dataclass(frozen=True)
class Item:
    """The frames of a voice, (K, P), and those to fill, (K, F), whole."""

    prompt: np.ndarray
    target: np.ndarray

    @property
    def codes(self) -> np.ndarray:
        """Both, (K, P + F)."""
        return np.concatenate([self.prompt, self.target], axis=1)

    @property
    def is_prompt(self) -> np.ndarray:
        """(P + F,) bool."""
        return np.arange(self.prompt.shape[1] + self.target.shape[1]) < self.prompt.shape[1]


class VoicedUtterances:
    """The utterances of a split, each with others of its speaker to take a voice from.

    An utterance whose speaker has no other one (or no name) gives its own beginning as the voice; one that is too short
    for that is left out.

    Args:
        rows: `speaker` and `audio_codes` (K, F) of each; no varied copies, whose speed is not their speaker's.
        config: How long prompts and targets are.

    Attributes:
        config: As given.
        n_left_out: Utterances too short to give both.
        n_speakers: How many speakers there are; utterances without a name count as one each.

    Raises:
        AcousticError: There is no utterance to learn from.
    """

    def __init__(self, rows: Iterable[Any], config: AcousticConfig) -> None:
        self.config = config
        self.least, self.most = config.frames(config.min_prompt_s), config.frames(config.max_prompt_s)
        self.window = config.frames(config.window_s)
        self.codes: list[np.ndarray] = []
        self.others: list[list[int]] = []
        self.n_left_out = 0
        speakers: list[str] = []
        for row in rows:
            speakers.append(row["speaker"] or f"\0{len(speakers)}")
            self.codes.append(np.asarray(row["audio_codes"], dtype=np.int16 if _small(config) else np.int32))
        by_speaker: dict[str, list[int]] = {}
        for number, speaker in enumerate(speakers):
            by_speaker.setdefault(speaker, []).append(number)
        n_frames = {name: sum(self.codes[n].shape[1] for n in numbers) for name, numbers in by_speaker.items()}
        kept = []
        for number, speaker in enumerate(speakers):
            if n_frames[speaker] - self.codes[number].shape[1] >= self.least:
                self.others.append(by_speaker[speaker])
            elif self.codes[number].shape[1] > self.least:
                self.others.append([])
            else:
                self.n_left_out += 1
                continue
            kept.append(number)
        self.numbers = kept
        self.n_speakers = len(by_speaker)
        if not kept:
            raise AcousticError(
                f"corpus: none of {len(speakers)} utterances has {config.min_prompt_s:g} s of another one of its "
                "speaker, or is longer than that itself; lower min_prompt_s, or encode longer recordings"
            )

    def __len__(self) -> int:
        return len(self.numbers)

    def item(self, index: int, rng: np.random.Generator) -> Item:
        """Utterance `index` with a voice, both cut where `rng` says."""
        number, others = self.numbers[index], self.others[index]
        length = int(rng.integers(self.least, self.most + 1))
        target = self.codes[number]
        if not others:
            cut = min(length, max(self.least, target.shape[1] // 2))
            prompt, target = target[:, :cut], target[:, cut:]
        else:
            parts, n_frames = [], 0
            for other in rng.permutation(len(others)):
                if others[other] != number:
                    parts.append(self.codes[others[other]])
                    n_frames += parts[-1].shape[1]
                    if n_frames >= length:
                        break
            prompt = _crop(np.concatenate(parts, axis=1), length, rng)
        return Item(prompt.astype(np.int64), _crop(target, self.window, rng).astype(np.int64))


DrawSample = Callable[[Item, AcousticConfig, np.random.Generator], dict[str, np.ndarray]]


def _small(config: AcousticConfig) -> bool:
    return max(config.codebook_sizes) <= np.iinfo(np.int16).max + 1


def _crop(codes: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """At most `length` frames of (K, F), from a place that is drawn."""
    spare = codes.shape[1] - length
    start = int(rng.integers(spare + 1)) if spare > 0 else 0
    return codes[:, start : start + length]


class AcousticSamples(Dataset):
    """Item n of a training without end, drawn from (seed, n) alone: each utterance once an epoch, in a new order.

    Args:
        utterances: What it draws from.
        draw: Adds to an item what the objective draws, such as masks or noise (`stages`).
        length: Items of the whole training.
        seed: Decides order, voices and what `draw` draws.
    """

    def __init__(self, utterances: VoicedUtterances, draw: DrawSample, length: int, seed: int) -> None:
        self.utterances, self.draw, self.length, self.seed = utterances, draw, length, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=int))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(position, len(self.utterances))
        if self._order[0] != epoch:
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.utterances))
            self._order = (epoch, order)
        rng = np.random.default_rng((self.seed, 1, position))
        item = self.utterances.item(int(self._order[1][place]), rng)
        return self.draw(item, self.utterances.config, rng)


def collate(items: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Items as one batch, their last dimension padded to the longest; `frames` (B, T) marks what is no padding.

    Codes are padded with -1, all else with 0; numbers without a dimension are stacked.
    """
    lengths = [len(item["prompt"]) for item in items]

    def padded(name: str) -> Tensor:
        if not items[0][name].ndim:
            return torch.from_numpy(np.stack([item[name] for item in items]))
        value, before = (-1 if name == "audio_codes" else 0), [(0, 0)] * (items[0][name].ndim - 1)
        widths = [[*before, (0, max(lengths) - length)] for length in lengths]
        rows = [np.pad(item[name], width, constant_values=value) for item, width in zip(items, widths, strict=True)]
        return torch.from_numpy(np.stack(rows))

    batch = {name: padded(name) for name in items[0]}
    return batch | {"frames": torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]}


def evaluation_items(utterances: VoicedUtterances, limit: int, seed: int) -> list[Item]:
    """The first `limit` utterances, each with a voice drawn from (seed, number): the same in every evaluation."""
    return [
        utterances.item(number, np.random.default_rng((seed, 2, number)))
        for number in range(min(limit, len(utterances)))
    ]
