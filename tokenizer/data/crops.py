"""Training crops: item n of an endless run, everything about it drawn from (seed, n); and who computes which.

Shapes: B batch, S samples of a crop, K books.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from tokenizer.data.augmentation import AugmentationConfig, augment, draw_speed
from tokenizer.data.characters import frame_characters, read_spans
from tokenizer.data.mixing import Key, TrainingAudio
from tokenizer.data.pieces import Recording
from tokenizer.data.utterances import AudioError, Utterance

logger = logging.getLogger(__name__)

VALID_BATCH = 16
# Version of what is drawn for a position and of which recordings a validation reads: raise it when either changes.
# Since 2 the speed is drawn before the place; checkpoints before that hold no version.
DATA_VERSION = 2


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
    """Item n: {"input_values" (1, S), "padding_mask" (S,), "n_acoustic_books" (), "semantic_only" ()}.

    With `hop` there is "characters" (F,) too, the aligned character of each frame; with `changes` "changed_values"
    (1, S), the same crop with further changes.

    An item may also be asked for by the key that `TrainingAudio.key` gives, which carries the row of a stream.
    """

    def __init__(
        self,
        audio: TrainingAudio,
        config: CropConfig,
        augmentation: AugmentationConfig,
        n_books: int,
        length: int,
        seed: int,
        hop: int | None = None,
        changes: AugmentationConfig | None = None,
    ) -> None:
        self.hop = hop  # samples of a code frame, where its characters are wanted
        self.changes = changes
        self.audio, self.config, self.augmentation = audio, config, augmentation
        self.n_books, self.length, self.seed = n_books, length, seed
        self.samples = round(config.crop_s * audio.sampling_rate)

    def __len__(self) -> int:
        return self.length

    def utterance(self, position: int) -> Utterance:
        """Which recording item `position` is cut from, found again from (seed, position). It is decoded to see."""
        return self._draw(self.audio.key(position))[0]

    def _draw(self, key: Key) -> tuple[Utterance, np.ndarray, float, np.random.Generator, int]:
        """A recording, a piece (S,) of it that makes a crop at the speed drawn, that speed, other draws, and its start.

        Every recording that is tried draws anew from (seed, position), so that one that cannot be read leaves no trace.
        """
        drawn = []

        def part(n_samples: int) -> tuple[int, int]:
            rng = np.random.default_rng((self.seed, key[0]))
            # A faster copy takes a longer piece to fill the crop, and resampling no more than that costs less.
            speed = draw_speed(self.augmentation, rng)
            length = round(self.samples * speed) + 64
            start = int(rng.integers(0, max(1, n_samples - length + 1)))
            drawn[:] = speed, rng, start
            return start, start + length

        utterance, piece = self.audio.recording(key, part)
        return utterance, piece, *drawn

    def __getitem__(self, key: int | Key) -> dict[str, Tensor]:
        utterance, piece, speed, rng, start = self._draw(self.audio.key(key) if isinstance(key, int) else key)
        crop = augment(piece, self.augmentation, rng, self.audio.sampling_rate, speed)[: self.samples]
        keeps_some = rng.uniform() < self.config.quantizer_dropout
        kept = int(rng.integers(1, self.n_books)) if keeps_some else self.n_books - 1
        semantic_only = bool(rng.uniform() < self.config.semantic_only)
        targets = {}
        if self.changes is not None:  # by draws of its own: the others are those of a training without
            changed = augment(crop, self.changes, rng.spawn(1)[0], self.audio.sampling_rate, speed=1.0)
            targets["changed_values"] = self._padded(changed)
        if self.hop is not None:
            rate, n_frames = self.audio.sampling_rate, -(-self.samples // self.hop)
            classes = frame_characters(read_spans(utterance), start / rate, self.hop * speed / rate, n_frames)
            targets["characters"] = torch.from_numpy(classes)
        return targets | {
            "input_values": self._padded(crop),
            "padding_mask": torch.arange(self.samples) < len(crop),
            "n_acoustic_books": torch.tensor(kept),
            "semantic_only": torch.tensor(semantic_only),
        }

    def _padded(self, crop: np.ndarray) -> Tensor:
        """(1, S) with zeros behind."""
        return torch.from_numpy(np.pad(crop, (0, self.samples - len(crop))))[None]


class StepBatches(Sampler[list[Key]]):
    """The micro-batches of one process, step after step.

    Step s is made of positions s * batch_size up to (s + 1) * batch_size. They are cut into one contiguous part per
    process, and that into one per accumulation: put together by process, then by accumulation, they stand in order
    again.

    Raises:
        ValueError: if the batch cannot be cut so.
    """

    def __init__(
        self, audio: TrainingAudio, steps: range, batch_size: int, accumulation: int, process: int, processes: int
    ) -> None:
        self.audio, self.steps, self.batch_size = audio, steps, batch_size
        self.accumulation, self.process = accumulation, process
        self.micro = micro_batch_size(batch_size, accumulation, processes)

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        for step in self.steps:
            first = step * self.batch_size + self.process * self.micro * self.accumulation
            for start in range(first, first + self.micro * self.accumulation, self.micro):
                yield [self.audio.key(position) for position in range(start, start + self.micro)]


def micro_batch_size(batch_size: int, accumulation: int, processes: int) -> int:
    """Crops in one forward pass. Raises ValueError where the batch of a step cannot be divided evenly."""
    if batch_size % (accumulation * processes):
        raise ValueError(
            f"training.batch_size={batch_size} is the batch of a whole step: it must divide by training.accumulation="
            f"{accumulation} times {processes} process(es)"
        )
    return batch_size // (accumulation * processes)


def validation_crops(
    sources: Sequence[tuple[str, Sequence[Utterance]]],
    sampling_rate: int,
    crop_s: float,
    limit: int,
    min_samples: int = 1,
) -> list[Tensor]:
    """The middle `crop_s` seconds of up to `limit` recordings, one of each source in turn, the same each time.

    Args:
        sources: name and recordings of each, as `validation_utterances` gives them.
        sampling_rate: in Hz.
        crop_s: length of a crop; a shorter recording is taken whole.
        limit: how many crops.
        min_samples: recordings of fewer give the tokenizer no frame, and are passed over.

    Returns:
        Batches (B, 1, S) of crops of one length each: nothing is padded, so that no score is of silence.

    Raises:
        AudioError: if not one recording can be used.
    """
    samples = round(crop_s * sampling_rate)
    waiting = [(name, _middles(own, sampling_rate, samples, min_samples)) for name, own in sources]
    taken = dict.fromkeys((name for name, _ in sources), 0)
    by_length: dict[int, list[np.ndarray]] = {}
    while waiting and sum(taken.values()) < limit:
        name, middles = waiting.pop(0)
        if (crop := next(middles, None)) is not None:
            by_length.setdefault(len(crop), []).append(crop)
            taken[name] += 1
            waiting.append((name, middles))
    if not by_length:
        raise AudioError("none of the valid recordings can be used; the warnings above say why")
    logger.info("validation crops: %s", ", ".join(f"{count} of {name}" for name, count in taken.items()))
    groups = [torch.from_numpy(np.stack(crops))[:, None] for _, crops in sorted(by_length.items())]
    return [batch for group in groups for batch in group.split(VALID_BATCH)]


def _middles(
    utterances: Sequence[Utterance], sampling_rate: int, samples: int, min_samples: int
) -> Iterator[np.ndarray]:
    """The middle of each recording that can be used, (S,) with S up to `samples`."""
    for utterance in utterances:
        try:
            recording = Recording(utterance, sampling_rate)
            start = max(0, (recording.n_samples - samples) // 2)
            crop = recording.piece(start, start + samples)
        except AudioError as error:
            logger.warning("left out of the validation: %s", error)
            continue
        if len(crop) >= min_samples:
            yield crop
        else:
            logger.warning("left out of the validation: %s: too short for one frame", utterance.name)
