"""From semantic codes and a voice to all books: iterative parallel decoding, book by book.

SoundStorm (Borsos et al. 2023, section 3.4): within a book all masked codes are drawn at once, those that the model is
surest of are kept, as many as MaskGIT's cosine schedule says, and the rest is drawn again.

Shapes: B items, n books that are given, K books, P frames of a voice, F of an answer, V entries of one book; codes
(n, F) in, (K, F) out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slm.acoustic.configuration import AcousticError
from slm.acoustic.masked_model import AcousticModel
from slm.acoustic.masking import masked_share
from slm.acoustic.pieces import AcousticDecoding, Piece
from slm.acoustic.samples import collate


@torch.inference_mode()
def fill_books(model: AcousticModel, pieces: Sequence[Piece], settings: AcousticDecoding) -> list[np.ndarray]:
    """All books (K, F) int64 of one batch of pieces; the first n of each are those given.

    Raises:
        AcousticError: There is no book to fill from or none to fill, or guidance is asked for.
    """
    n_books, given = model.config.n_codebooks, len(pieces[0].given)
    model.config.check_given(given)
    if settings.guidance != 1:
        raise AcousticError(
            f"acoustic_decoding.guidance: {settings.guidance:g}: a stage of objective masked has none; leave it out"
        )
    rows = []
    for piece in pieces:
        visible = np.ones((n_books, len(piece.is_prompt)), dtype=bool)
        visible[given:, ~piece.is_prompt] = False
        rows.append({"audio_codes": piece.codes, "visible": visible, "prompt": piece.is_prompt})
    batch = {name: tensor.to(model.device) for name, tensor in collate(rows).items()}
    streams = [piece.stream() for piece in pieces]
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
