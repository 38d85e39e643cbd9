"""What differs from objective to objective, in one table; loading a stage, and filling speech with it.

Shapes: n books that are given, K books, P frames of a voice, F of an answer, D latent channels of the codec.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slm.acoustic.configuration import (
    LATENT_OBJECTIVES,
    MASKED,
    AcousticConfig,
    AcousticError,
    LatentConfig,
)
from slm.acoustic.latent_decoding import fill_latents
from slm.acoustic.latent_model import LatentModel, draw_latent_sample
from slm.acoustic.latent_scores import latent_scores
from slm.acoustic.masked_decoding import fill_books
from slm.acoustic.masked_model import AcousticModel
from slm.acoustic.masked_scores import book_scores
from slm.acoustic.masking import draw_masked_sample
from slm.acoustic.pieces import AcousticDecoding, Piece, cut_pieces
from slm.acoustic.samples import DrawSample, Item
from slm.model_folder import ModelFolder

Stage = AcousticModel | LatentModel


@dataclass(frozen=True)
class StageKind:
    """The parts of a kind of stage.

    Attributes:
        model: The class of its model.
        draw: Makes a training sample of an item.
        scores: Figures of a split's items, `loss` among them.
        fill: One batch of pieces: codes (K, F) int64 or latents (D, F) float32 each.
    """

    model: type[Stage]
    draw: DrawSample
    scores: Callable[[Stage, Sequence[Item]], dict[str, float]]
    fill: Callable[[Stage, Sequence[Piece], AcousticDecoding], list[np.ndarray]]


_MASKED = StageKind(AcousticModel, draw_masked_sample, book_scores, fill_books)
_LATENT = StageKind(LatentModel, draw_latent_sample, latent_scores, fill_latents)
KINDS = {MASKED: _MASKED} | dict.fromkeys(LATENT_OBJECTIVES, _LATENT)


def kind_of(config: AcousticConfig) -> StageKind:
    """The parts that a stage's objective asks for."""
    return KINDS[config.objective]


def load_acoustic_model(folder: str | Path, device: str = "cpu") -> Stage:
    """Loads the folder that `slm train-acoustic` wrote (`run_dir/model`), in eval mode and fp32.

    Raises:
        AcousticError: It is no such folder, or its weights are torn or do not fit its config.json.
    """
    place = ModelFolder(folder, "acoustic", "acoustic stage", "train-acoustic", AcousticError)
    settings = place.settings(AcousticConfig.model_type, LatentConfig.model_type)
    kind, objective = settings["model_type"], settings.get("objective")
    known = {name: parts for name, parts in KINDS.items() if parts.model.config_class.model_type == kind}
    if objective not in known:
        raise AcousticError(
            f"acoustic: {folder} was trained by objective {objective!r}; of a {kind} this version knows "
            f"{', '.join(known)}"
        )
    return place.load(known[objective].model, device)


def fill_speech(
    model: Stage,
    codes: Sequence[np.ndarray],
    voices: Sequence[np.ndarray],
    keys: Sequence[str],
    settings: AcousticDecoding | None = None,
    seed: int = 0,
) -> list[np.ndarray]:
    """Fills what is missing in speech; an item's answer does not depend on what it is batched with.

    What is longer than the training's `window_s` is filled in equal pieces, each from the same voice.

    Args:
        model: The stage, in eval mode.
        codes: (n, F) of each item, the first n books, 1 <= n < K; one n for all.
        voices: (K, P) of each item; the first `max_prompt_s` seconds are read.
        keys: What, beside the seed, decides each item's random stream.
        settings: Steps and temperature.
        seed: Of all streams.

    Returns:
        Of objective `masked` all books (K, F) int64 of each item, the first n those given; of the others what books
        1..K-1 add to the codec's latents, (D, F) float32.

    Raises:
        AcousticError: Items have different numbers of books, n does not suit the stage, or a voice is shorter than
            `min_prompt_s`.
    """
    settings, fill = settings or AcousticDecoding(), kind_of(model.config).fill
    if len({len(item) for item in codes}) > 1:
        raise AcousticError(f"acoustic: {sorted({len(item) for item in codes})} books are given: one number for all")
    pieces = list(cut_pieces(model.config, codes, voices, keys, seed))
    parts: list[list[np.ndarray]] = [[] for _ in codes]
    for start in range(0, len(pieces), settings.batch_size):
        some = pieces[start : start + settings.batch_size]
        filled = fill(model, [piece for _, piece in some], settings)
        for (number, _), part in zip(some, filled, strict=True):
            parts[number].append(part)
    return [np.concatenate(some, axis=1) for some in parts]
