"""The books that stand beside the LLM's ids: their embedding tables, their output heads, their file.

With the patterns `delay` and `parallel` (:mod:`slm.patterns`) a position holds an id of the LLM, which is book 0's code
or text, and the codes of books 1 to n - 1. What the LLM reads there is the sum of all their embeddings; each book has a
head of its own on the LLM's last states (MusicGen, arXiv 2306.05284, section 2.2). The tables and heads are a submodule
of the LLM, so that optimizers, checkpoints and adapters know of them, and a file of their own in its folder: the folder
without it is a plain one of transformers, of book 0 alone.

Shapes: R rows of length L, N tokens, D width, n codebooks used; further codes (R, L, n - 1), `EMPTY` (-1) for none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from slm.model.parts import attach, head_states, part_of
from slm.patterns import EMPTY
from slm.vocabulary import SpeechVocabulary

FILE_NAME = "further_books.safetensors"
NAME = "further_books"  # of the submodule
START_SHARE = 0.1  # of the text embeddings' spread, as the new ids' noise
HEAD_SPREAD = 0.02
MOST_TEXT = 4096  # text embeddings that their spread is taken of


class FurtherBooksError(ValueError):
    """A model's further books are missing, damaged, or asked for what they cannot do yet; the message says which."""


class FurtherBooks(nn.Module):
    """Embedding tables and heads of books 1 to n - 1.

    Args:
        sizes: Entries of each.
        width: D of the LLM.
    """

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        self.heads = nn.ModuleList(nn.Linear(width, size, bias=False) for size in sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(head.out_features for head in self.heads)

    def embed(self, codes: Tensor) -> Tensor:
        """The sum (R, L, D) of the embeddings of further codes; nothing of `EMPTY` ones."""
        total: Tensor | float = 0.0
        for book, table in enumerate(self.embeddings):
            own = codes[..., book]
            total = total + F.embedding(own.clamp_min(0), table.weight) * (own != EMPTY)[..., None]
        return total

    def logits(self, states: Tensor) -> list[Tensor]:
        """(N, D) states in front of the LLM's head -> (N, size) fp32 of each book."""
        return [head(states.to(head.weight.dtype)).float() for head in self.heads]


def add_further_books(
    model: nn.Module, vocabulary: SpeechVocabulary, seed: int, vectors: Sequence[Tensor] | None = None
) -> FurtherBooks:
    """Gives an LLM new further books, as a submodule: noise of a tenth of the text embeddings' spread.

    Args:
        model: A causal LM, grown by the vocabulary's ids.
        vocabulary: Whose `further_sizes`.
        seed: Decides the noise.
        vectors: Of each further book, (size, D) with the spread of the text rows and mean 0, added to the noise.
    """
    table = model.get_input_embeddings()
    books = FurtherBooks(vocabulary.further_sizes, table.weight.shape[1])
    generator = torch.Generator().manual_seed(seed + 1)  # not what the new ids drew
    with torch.no_grad():
        some = torch.linspace(0, vocabulary.first_id - 1, min(vocabulary.first_id, MOST_TEXT)).long()
        spread = table(some.to(table.weight.device)).float().std(dim=0).cpu()  # as it comes out: some models scale it
        for number, (embedding, head) in enumerate(zip(books.embeddings, books.heads, strict=True)):
            noise = START_SHARE * torch.randn(embedding.weight.shape, generator=generator)
            if vectors is not None:
                noise += vectors[number]
            embedding.weight.copy_(spread * noise)
            head.weight.copy_(HEAD_SPREAD * torch.randn(head.weight.shape, generator=generator))
    attach(model, NAME, books)
    return books


def further_books_of(model: nn.Module) -> FurtherBooks | None:
    """The further books of a causal LM, those that are trained where PEFT keeps two; None where it has none."""
    return part_of(model, NAME)


def load_further_books(model: nn.Module, vocabulary: SpeechVocabulary, folder: str | Path) -> None:
    """Attaches the further books of a model's folder; nothing where its vocabulary has none.

    Raises:
        FurtherBooksError: Their file is missing, or is of other books.
    """
    if not vocabulary.further_sizes:
        return
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise FurtherBooksError(
            f"{folder}: no {FILE_NAME}, which a model of books side by side needs; copy the folder anew"
        )
    books = FurtherBooks(vocabulary.further_sizes, model.get_input_embeddings().weight.shape[1])
    try:
        books.load_state_dict(load_file(path))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise FurtherBooksError(
            f"{path}: not the further books of this folder's model ({str(error).splitlines()[0]}); copy it anew"
        ) from error
    attach(model, NAME, books)


@contextmanager
def read_beside(model: nn.Module, codes_of: Callable[[int, int], Tensor]) -> Iterator[list[Tensor]]:
    """While open, the model reads further codes beside its ids; gives the states (R, L, D) in front of its head.

    By hooks on its embedding and its head, so that the model's own forward pass, and `generate`, stay as they are.

    Args:
        model: A causal LM with further books, no engine or PeftModel around it.
        codes_of: From the rows and the length of what is embedded to its further codes.

    Yields:
        A list that holds the states of the newest forward pass.
    """
    books = further_books_of(model)

    def add(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output + books.embed(codes_of(*output.shape[:2])).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        with head_states(model) as states:
            yield states
    finally:
        handle.remove()
