"""Groups of new ids: the four marks, a group for each book whose codes are ids, and those that were added later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PROSODY = "prosody"  # the group of its tokens
SPEECH, SPEECH_END, TRANSCRIBE, SYNTHESIZE = MARKS = ("<|speech|>", "<|/speech|>", "<|transcribe|>", "<|synthesize|>")


class VocabularyError(ValueError):
    """A speech vocabulary does not fit a tokenizer, model folder or corpus; the message says which and the way out."""


@dataclass(frozen=True)
class Group:
    """Ids on end that belong together.

    Args:
        name: "marks", "book 0", ..., or the name of a group added later.
        first_id: Its first id.
        tokens: The names of its ids in the text tokenizer, in order.
    """

    name: str
    first_id: int
    tokens: tuple[str, ...]

    @property
    def ids(self) -> range:
        return range(self.first_id, self.first_id + len(self.tokens))


def laid_out(
    first_id: int, codebook_sizes: Sequence[int], added: Sequence[tuple[str, tuple[str, ...]]]
) -> dict[str, Group]:
    """Every group by name, in id order.

    Args:
        first_id: The first new id.
        codebook_sizes: Entries of the books whose codes are ids.
        added: Groups behind the books: (name, names of its tokens).

    >>> [(group.name, group.first_id) for group in laid_out(100, [2, 3], [("more", ("<|x|>",))]).values()]
    [('marks', 100), ('book 0', 104), ('book 1', 106), ('more', 109)]
    """
    books = enumerate(codebook_sizes)
    named = [
        ("marks", MARKS),
        *((f"book {book}", tuple(f"<|speech_{book}_{code}|>" for code in range(size))) for book, size in books),
        *added,
    ]
    groups, first = {}, first_id
    for name, tokens in named:
        groups[name] = Group(name, first, tokens)
        first += len(tokens)
    return groups
