"""How well a stage predicts each book of a split, beside a baseline that knows how often each code occurs.

Shapes: K books, F frames, V entries of one book; codes (K, F).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from slm.acoustic.configuration import AcousticConfig
from slm.acoustic.masked_model import AcousticModel
from slm.acoustic.masking import mask_book, masked_sample
from slm.acoustic.samples import Item, collate


@torch.inference_mode()
def book_scores(model: AcousticModel, items: Sequence[Item], batch_size: int = 16) -> dict[str, float]:
    """Loss (nats) and accuracy of each book, all of whose target codes are predicted at once from the books below it.

    The books below are the true ones, so that each figure is of its book alone.

    Args:
        model: The stage; it is put in eval mode and back.
        items: What is predicted.
        batch_size: Items at a time.

    Returns:
        `loss`, the mean over all books; `loss/book1`, `accuracy/book1`, `loss/book2` ...
    """
    was_training = model.training
    model.eval()
    found: dict[str, float] = {}
    n_books = model.config.n_codebooks
    for book in range(1, n_books):
        loss, right, count = 0.0, 0, 0
        for batch in _batches(items, batch_size, n_books, book, model.device):
            wanted = batch.pop("targets")[:, book]
            scores = model.logits(model.hidden(**batch)[wanted], book)
            truth = batch["audio_codes"][:, book][wanted]
            loss += float(F.cross_entropy(scores, truth, reduction="sum"))
            right += int((scores.argmax(dim=-1) == truth).sum())
            count += len(truth)
        found |= {f"loss/book{book}": loss / count, f"accuracy/book{book}": right / count}
    model.train(was_training)
    return {"loss": float(np.mean([found[f"loss/book{book}"] for book in range(1, n_books)]))} | found


def _batches(
    items: Sequence[Item], size: int, n_books: int, book: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(items), size):
        rows = [masked_sample(item, mask_book(item.is_prompt, n_books, book)) for item in items[start : start + size]]
        yield {name: tensor.to(device) for name, tensor in collate(rows).items()}


def unigram_scores(
    train_codes: Iterable[np.ndarray], items: Sequence[Item], config: AcousticConfig
) -> dict[str, float]:
    """The same figures of a predictor that knows each book's counts in training (one added to each) and nothing else.

    Args:
        train_codes: (K, F) of the training utterances.
        items: What is predicted.
        config: The codec's books.

    Returns:
        `unigram_loss/book1`, `unigram_accuracy/book1` ...
    """
    counts = [np.ones(size) for size in config.codebook_sizes]
    for codes in train_codes:
        for book, count in enumerate(counts):
            count += np.bincount(codes[book], minlength=len(count))
    found: dict[str, float] = {}
    for book in range(1, config.n_codebooks):
        truth = np.concatenate([item.target[book] for item in items])
        log_share = np.log(counts[book] / counts[book].sum())
        found[f"unigram_loss/book{book}"] = float(-log_share[truth].mean())
        found[f"unigram_accuracy/book{book}"] = float((truth == counts[book].argmax()).mean())
    return found
