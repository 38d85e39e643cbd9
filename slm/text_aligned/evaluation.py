"""What the word codes add to the text: how well semantic codes are predicted with them, without, and with others'.

Shapes: B items, K books of a word, W words, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slm.text_aligned.modeling import TextAlignedModel, attention_in_spans, code_losses, targets_of
from slm.text_aligned.samples import Item, collate


@torch.inference_mode()
def code_scores(model: TextAlignedModel, items: Sequence[Item], batch_size: int = 16) -> dict[str, float]:
    """Figures of utterances, each code predicted from the true ones before it.

    Args:
        model: It is put in eval mode and back.
        items: Utterances.
        batch_size: At a time.

    Returns:
        `loss` in nats and `accuracy` with an utterance's own word codes; the same with the prefix `text_alone/`, and
        `shuffled/`, with word codes of other words of the batch; `attention_in_word`, the share of a word's attention
        on its own frames, where those are known; `used/book1` ..., which share of each book's entries occurs.
    """
    was_training = model.training
    model.eval()
    losses: dict[str, list[Tensor]] = {}
    right: dict[str, list[Tensor]] = {}
    inside: list[Tensor] = []
    seen: list[Tensor] = []
    for start in range(0, len(items), batch_size):
        samples = collate([(item, True) for item in items[start : start + batch_size]])
        batch = {name: values.to(model.device) for name, values in samples.items()}
        codes, read = batch["codes"], model.encode_text(batch["text"], batch["word_of_byte"])
        gathered, attention, words = model.gather(codes, read)
        quantized = model.quantizer(gathered, words)
        own = quantized.vectors
        for name, vectors in {"": own, "text_alone/": None, "shuffled/": shuffled(own, words)}.items():
            scores = model.scores(codes, read, vectors)
            said, targets = targets_of(codes, model.config.codebook_size)
            losses.setdefault(name, []).append(code_losses(scores, codes))
            right.setdefault(name, []).append(scores.argmax(dim=-1)[said] == targets[said])
        seen.append(quantized.word_codes.transpose(1, 2)[words])
        share, known = attention_in_spans(attention, batch["spans"])
        inside.append(share[known])
    model.train(was_training)
    figures = {f"{name}loss": float(torch.cat(values).mean()) for name, values in losses.items()}
    figures |= {f"{name}accuracy": float(torch.cat(values).float().mean()) for name, values in right.items()}
    if len(shares := torch.cat(inside)):
        figures["attention_in_word"] = float(shares.mean())
    for book, values in enumerate(torch.cat(seen).T, start=1):
        figures[f"used/book{book}"] = len(values.unique()) / model.config.word_codebook_size
    return figures


def shuffled(vectors: Tensor, words: Tensor) -> Tensor:
    """Vectors (B, W, D), those of all words (B, W) moved on by half of their number."""
    moved = vectors.clone()
    flat = vectors[words]
    moved[words] = flat.roll(max(1, len(flat) // 2), dims=0)
    return moved
