"""From semantic codes and a voice to all books: iterative parallel decoding, book by book.

SoundStorm (Borsos et al. 2023, section 3.4): within a book all masked codes are drawn at once, those that the model is
surest of are kept, as many as MaskGIT's cosine schedule says, and the rest is drawn again.

Shapes: B items, n books that are given, K books, P frames of a voice, F of an answer, V entries of one book; codes
(n, F) in, (K, F) out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from slm.acoustic.configuration import AcousticError
from slm.acoustic.masking import masked_share
from slm.acoustic.modeling import AcousticModel
from slm.acoustic.samples import collate


@dataclass
class AcousticDecoding:
    """How the books are drawn."""

    steps: int = field(default=8, metadata={"help": "rounds of the first book that is filled (SoundStorm: 16)"})
    fine_steps: int = field(default=1, metadata={"help": "rounds of each book after it (SoundStorm: 1)"})
    temperature: float = field(default=1.0, metadata={"help": "of the drawing; 0: the likeliest code each time"})
    confidence_noise: float = field(
        default=1.0, metadata={"help": "noise on which codes are kept, falling to 0 with the rounds (MaskGIT)"}
    )
    batch_size: int = field(default=16, metadata={"help": "pieces of speech that are filled together"})

    def __post_init__(self) -> None:
        for name in ("steps", "fine_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise AcousticError(f"acoustic_decoding.{name}: {getattr(self, name)} must be at least 1")
        for name in ("temperature", "confidence_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise AcousticError(f"acoustic_decoding.{name}: {getattr(self, name):g} must be 0 or more")


def fill_books(
    model: AcousticModel,
    codes: Sequence[np.ndarray],
    voices: Sequence[np.ndarray],
    keys: Sequence[str],
    settings: AcousticDecoding | None = None,
    seed: int = 0,
) -> list[np.ndarray]:
    """Fills the books that are missing; an item's answer does not depend on what it is batched with.

    What is longer than the training's `window_s` is filled in equal pieces, each from the same voice.

    Args:
        model: The stage, in eval mode.
        codes: (n, F) of each item, the first n books, 1 <= n < K; one n for all.
        voices: (K, P) of each item; the first `max_prompt_s` seconds are read.
        keys: What, beside the seed, decides each item's random stream.
        settings: Rounds and temperature.
        seed: Of all streams.

    Returns:
        (K, F) int64 of each item; its first n books are those given.

    Raises:
        AcousticError: n is no such number, or a voice is shorter than `min_prompt_s`.
    """
    settings, config = settings or AcousticDecoding(), model.config
    least, most, window = (config.frames(s) for s in (config.min_prompt_s, config.max_prompt_s, config.window_s))
    pieces: list[tuple[np.ndarray, np.ndarray, str]] = []
    owners: list[int] = []
    for number, (item, voice, key) in enumerate(zip(codes, voices, keys, strict=True)):
        if not 1 <= len(item) < config.n_codebooks or len(item) != len(codes[0]):
            raise AcousticError(
                f"acoustic: {len(item)} of the tokenizer's {config.n_codebooks} books are given: the stage fills the "
                "rest from book 0 on, so there must be at least one and one fewer than all"
            )
        if len(voice) != config.n_codebooks or voice.shape[1] < least:
            raise AcousticError(
                f"acoustic: a voice of {len(voice)} books and {voice.shape[1] / config.frame_rate:.2f} s; the stage "
                f"needs {config.n_codebooks} books and {config.min_prompt_s:g} s"
            )
        for place, piece in enumerate(np.array_split(item, max(1, -(-item.shape[1] // window)), axis=1)):
            pieces.append((piece, voice[:, :most], f"{seed} {key} {place}"))
            owners.append(number)
    parts: list[list[np.ndarray]] = [[] for _ in codes]
    for start in range(0, len(pieces), settings.batch_size):
        for offset, filled in enumerate(_fill(model, pieces[start : start + settings.batch_size], settings)):
            parts[owners[start + offset]].append(filled)
    return [np.concatenate(some, axis=1) for some in parts]


@torch.inference_mode()
def _fill(
    model: AcousticModel, pieces: Sequence[tuple[np.ndarray, np.ndarray, str]], settings: AcousticDecoding
) -> list[np.ndarray]:
    """One batch of pieces: (given codes (n, F), voice (K, P), what decides its stream) each."""
    n_books, given, rows, streams = model.config.n_codebooks, len(pieces[0][0]), [], []
    for piece, voice, key in pieces:
        target = np.zeros((n_books, piece.shape[1]), dtype=np.int64)
        target[:given] = piece
        prompt = np.arange(voice.shape[1] + piece.shape[1]) < voice.shape[1]
        visible = np.ones((n_books, len(prompt)), dtype=bool)
        visible[given:, ~prompt] = False
        rows.append({"audio_codes": np.concatenate([voice, target], axis=1), "visible": visible, "prompt": prompt})
        rows[-1]["targets"] = ~visible
        digest = hashlib.sha256(key.encode()).digest()
        streams.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))
    batch = {name: tensor.to(model.device) for name, tensor in collate(rows).items()}
    del batch["targets"]
    for book in range(given, n_books):
        n_rounds = settings.steps if book == given else settings.fine_steps
        for number in range(1, n_rounds + 1):
            scores = model.logits(model.hidden(**batch), book).cpu()
            for row, stream in enumerate(streams):
                _keep_surest(batch, row, book, scores[row], number / n_rounds, settings, stream)
    codes, prompt, frames = (batch[name].cpu().numpy() for name in ("audio_codes", "prompt", "frames"))
    return [codes[row][:, frames[row] & ~prompt[row]] for row in range(len(pieces))]


def _keep_surest(
    batch: dict[str, Tensor],
    row: int,
    book: int,
    scores: Tensor,
    progress: float,
    settings: AcousticDecoding,
    stream: torch.Generator,
) -> None:
    """Draws one item's codes that are still masked, from scores (T, V), and keeps the surest of them in `batch`."""
    target = (batch["frames"][row] & ~batch["prompt"][row]).cpu()
    hidden = target & ~batch["visible"][row, book].cpu()
    places = hidden.nonzero().flatten()
    if not len(places):
        return
    log_shares = scores[places].log_softmax(dim=-1)
    drawn = log_shares
    if settings.temperature:
        drawn = log_shares / settings.temperature + _gumbel(log_shares.shape, stream)
    codes = drawn.argmax(dim=-1)
    sureness = log_shares.gather(1, codes[:, None])[:, 0]
    if settings.confidence_noise:
        sureness = sureness + settings.confidence_noise * (1 - progress) * _gumbel(sureness.shape, stream)
    left = min(math.floor(masked_share(progress) * int(target.sum())), len(places) - 1) if progress < 1 else 0
    kept = sureness.argsort(descending=True, stable=True)[: len(places) - left]
    device = batch["audio_codes"].device
    where = places[kept].to(device)
    batch["audio_codes"][row, book, where] = codes[kept].to(device)
    batch["visible"][row, book, where] = True


def _gumbel(shape: torch.Size, stream: torch.Generator) -> Tensor:
    """Standard Gumbel noise: the argmax of log-probabilities plus it is a draw from them."""
    uniform = torch.rand(shape, generator=stream, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)
    return -(-uniform.log()).log().float()
