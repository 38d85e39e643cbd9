"""The rows of an embedding table and a head for the ids of speech: how many, and what they begin with.

Shapes: V rows of the embedding table, D its width; of a codebook (N, D) vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from slm.model.further_books import add_further_books, further_books_of
from slm.prosody import ProsodyBins
from slm.vocabulary import PROSODY, SpeechVocabulary

PAD_ROWS_TO = 64


def rows_needed(table_rows: int, vocabulary: SpeechVocabulary) -> int:
    """Rows of the embedding table once speech is in: as before if they suffice, else padded to a multiple of 64."""
    return table_rows if table_rows >= vocabulary.size else -(-vocabulary.size // PAD_ROWS_TO) * PAD_ROWS_TO


def extend_with_speech(
    model: PreTrainedModel,
    vocabulary: SpeechVocabulary,
    seed: int,
    books: Sequence[torch.Tensor] | None = None,
    first_id: int | None = None,
) -> None:
    """Gives the model rows for every new id, in place: the mean of the text rows plus a tenth of their spread as noise.

    Further books, which have no ids, are added too where the vocabulary has some and the model none.

    With `books` a speech token's row also holds its codebook vector, by a random projection and with the text rows'
    spread: codes of like sound are alike from the first step on, where noise leaves that to be learnt from data. So are
    tokens of prosody whose bins are near each other.

    Args:
        model: Any causal LM, its head tied to the embedding or not.
        vocabulary: The new ids.
        seed: Decides the noise and the projection.
        books: For each codebook used its vectors, (size, D); only where all ids are new.
        first_id: Rows from this id on are new; None: all ids of the vocabulary are. A model that speaks already keeps
            what it has learnt.
    """
    first = vocabulary.first_id if first_id is None else first_id
    embedding = model.get_input_embeddings()
    known = embedding.weight.shape[0]
    rows = rows_needed(known, vocabulary)
    if rows > known:
        model.resize_token_embeddings(rows, mean_resizing=False)
    # A text token that the model had no row for gets one here too: resizing draws it from a stream that nobody seeded.
    first, n_text = min(first, known), min(vocabulary.first_id, known)
    tables = {id(module.weight): module for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in tables.values():
            weight = module.weight
            text = weight[:n_text].float()
            noise = torch.randn(weight.shape[0] - first, weight.shape[1], generator=generator)
            spread = text.std(dim=0, keepdim=True)
            noise *= 0.1
            offsets = vocabulary.offsets - first
            for vectors, offset in zip(books[: vocabulary.ids_per_frame], offsets, strict=True) if books else ():
                noise[offset : offset + len(vectors)] += _projected(vectors, noise.shape[1], generator)
            if vocabulary.prosody is not None and (start := vocabulary.groups[PROSODY].first_id - first) >= 0:
                noise[start : start + sum(vocabulary.prosody.sizes)] += _bin_rows(
                    vocabulary.prosody, noise.shape[1], generator
                )
            fresh = text.mean(dim=0, keepdim=True) + spread * noise.to(weight.device)
            weight[first:] = fresh.to(weight.dtype)
            fill_bias(module, first, n_text)
    if vocabulary.further_sizes and further_books_of(model) is None:
        width, further = embedding.weight.shape[1], books[1:] if books else None
        vectors = further and [_projected(one, width, generator) for one in further]
        add_further_books(model, vocabulary, seed, vectors)
    model.config.get_text_config().vocab_size = model.get_input_embeddings().weight.shape[0]


def fill_bias(head: torch.nn.Module, first: int, n_text: int) -> None:
    """Gives new rows of a head the mean bias of the text's, which needs no file of its own."""
    if getattr(head, "bias", None) is not None:
        with torch.no_grad():
            head.bias[first:] = head.bias[:n_text].mean()


def _projected(vectors: torch.Tensor, width: int, generator: torch.Generator) -> torch.Tensor:
    """(N, D) codebook vectors -> (N, width) of mean 0 and unit variance, their distances kept about as they are."""
    centred = vectors.detach().float().cpu()
    centred = centred - centred.mean(dim=0)
    centred = centred / centred.square().sum(dim=1).mean().sqrt().clamp_min(1e-8)
    return centred @ torch.randn(centred.shape[1], width, generator=generator)


def _bin_rows(prosody: ProsodyBins, width: int, generator: torch.Generator) -> torch.Tensor:
    """(N, width) of about unit variance for the tokens of prosody: the bins of a feature lie on a line, in order."""
    rows = []
    for size in prosody.sizes:
        middle, slope, none = torch.randn(3, 1, width, generator=generator)
        places = torch.linspace(-1, 1, prosody.n)[:, None] * 3**0.5  # of unit variance
        rows += [(middle + slope * places) / 2**0.5, none[: size - prosody.n]]
    return torch.cat(rows)
