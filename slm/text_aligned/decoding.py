"""From a text and its word codes back to semantic codes, one after the other.

Shapes: B items, K books of a word, W words, F frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from slm.decoding.sampling import gumbel_noise, warpers
from slm.text_aligned.configuration import TextAlignedError
from slm.text_aligned.modeling import TextAlignedModel
from slm.text_aligned.samples import Item, collate


@dataclass
class RebuildSettings:
    """How semantic codes are drawn. Each utterance has a random stream of its own, from the seed and its key."""

    temperature: float = field(default=0.0, metadata={"help": "0: the likeliest code each time"})
    top_k: int = field(default=50, metadata={"help": "draw from the k likeliest codes; 0: all"})
    batch_size: int = field(default=32, metadata={"help": "utterances rebuilt together"})
    seed: int = field(default=0, metadata={"help": "seed of the draws"})

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.top_k < 0 or not 0 <= self.temperature < float("inf"):
            raise TextAlignedError("decoding: batch_size must be 1 or more, top_k and temperature 0 or more")


@dataclass(frozen=True)
class RebuiltCodes:
    """Semantic codes (F,), and whether the model ended them itself or was cut off at the longest it knows."""

    codes: np.ndarray
    ended: bool


def encode_words(model: TextAlignedModel, items: Sequence[Item], batch_size: int = 32) -> list[np.ndarray]:
    """Word codes (K, W) of each utterance."""
    found = []
    for start in range(0, len(items), batch_size):
        batch = collate([(item, True) for item in items[start : start + batch_size]])
        names = ("codes", "text", "word_of_byte")
        word_codes = model.encode(**{name: batch[name].to(model.device) for name in names}).cpu().numpy()
        found += [row[:, row[0] >= 0] for row in word_codes]
    return found


def shuffle_words(word_codes: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Word codes (K, W) of utterances, dealt anew among all their words."""
    order = np.random.default_rng((seed, 3)).permutation(sum(codes.shape[1] for codes in word_codes))
    borders = np.cumsum([codes.shape[1] for codes in word_codes])[:-1]
    return np.split(np.concatenate(word_codes, axis=1)[:, order], borders, axis=1)


@torch.inference_mode()
def rebuild(
    model: TextAlignedModel,
    items: Sequence[Item],
    word_codes: Sequence[np.ndarray] | None,
    keys: Sequence[str],
    settings: RebuildSettings,
) -> list[RebuiltCodes]:
    """Semantic codes of one batch; an utterance's do not depend on what it is batched with.

    What was said is read anew for each code, in place of going on from a cache.

    Args:
        model: In eval mode.
        items: Whose texts are said; their codes are not read.
        word_codes: (k, W) of each, the first k books; None: from the texts alone.
        keys: What, beside the seed, decides each utterance's random stream.
        settings: How codes are drawn.
    """
    batch = collate([(item, True) for item in items])
    read = model.encode_text(batch["text"].to(model.device), batch["word_of_byte"].to(model.device))
    vectors = None if word_codes is None else model.word_vectors(_padded_words(word_codes).to(model.device))
    streams = [_stream(settings.seed, key) for key in keys]
    end, most = model.config.codebook_size, model.config.max_frames
    said = torch.full((len(items), 0), -1, dtype=torch.int64, device=model.device)
    going = torch.ones(len(items), dtype=torch.bool, device=model.device)
    while bool(going.any()):
        scores = model.scores(said, read, vectors)[:, -1]
        if said.shape[1] == 0:
            scores[:, end] = -torch.inf  # at least a frame
        drawn = _draw(scores, streams, settings)
        going = going & (drawn != end)
        if said.shape[1] == most:  # the longest may still be ended there
            break
        said = torch.cat([said, torch.where(going, drawn, -1)[:, None]], dim=1)
    rows = said.cpu().numpy()
    return [RebuiltCodes(row[row >= 0], not more) for row, more in zip(rows, going.tolist(), strict=True)]


def _draw(scores: Tensor, streams: list[torch.Generator], settings: RebuildSettings) -> Tensor:
    """One of each row's scores (B, C)."""
    if not settings.temperature:
        return scores.argmax(dim=-1)
    for warp in warpers(settings.temperature, settings.top_k):
        scores = warp(None, scores)
    return (scores + gumbel_noise(scores, streams)).argmax(dim=-1)


def _padded_words(word_codes: Sequence[np.ndarray]) -> Tensor:
    """(k, W) each -> (B, k, W), -1 in padding."""
    longest = max(item.shape[1] for item in word_codes)
    padded = [np.pad(item, [(0, 0), (0, longest - item.shape[1])], constant_values=-1) for item in word_codes]
    return torch.from_numpy(np.stack(padded))


def _stream(seed: int, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
