"""Test sets by the length of their texts: named ranges of words, and which utterances fall into each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["LENGTHS_HELP", "LengthBin", "in_order"]

LENGTHS_HELP = (
    "test sets by length of text, each a column of a table: [{name: short, most: 7}, {name: long, least: 21}]; words "
    "as the normaliser leaves them"
)


@dataclass(frozen=True)
class LengthBin:
    """The utterances whose reference has ``least`` to ``most`` words, both included; None: no upper end."""

    name: str = field(metadata={"help": "in tables, such as short"})
    least: int = field(default=1, metadata={"help": "fewest words"})
    most: int | None = field(default=None, metadata={"help": "most words; null: no upper end"})

    def __post_init__(self) -> None:
        if self.least < 0 or (self.most is not None and self.most < self.least):
            raise ValueError(
                f"{self.name}: {self.least} to {self.most} words is no range; most must not be below least"
            )

    def holds(self, n_words: int) -> bool:
        """Whether a text of so many words belongs to it."""
        return self.least <= n_words and (self.most is None or n_words <= self.most)

    @property
    def label(self) -> str:
        """The name with its range, for tables.

        >>> LengthBin("short", 1, 7).label, LengthBin("long", 21).label
        ('short (1 to 7 words)', 'long (21 words or more)')
        """
        if self.most is None:
            return f"{self.name} ({self.least} words or more)"
        return f"{self.name} ({self.least} to {self.most} words)"


def in_order(bins: Sequence[LengthBin]) -> list[LengthBin]:
    """The bins, the shortest first. A text may be in none of them.

    >>> [one.label for one in in_order([LengthBin("long", 21), LengthBin("short", 1, 7)])]
    ['short (1 to 7 words)', 'long (21 words or more)']

    Raises:
        ValueError: two of them share a length, or a name.
    """
    found = sorted(bins, key=lambda one: one.least)
    if len({one.name for one in found}) < len(found):
        raise ValueError("text_lengths: give each length a name of its own")
    for one, after in zip(found, found[1:], strict=False):
        if one.holds(after.least):
            raise ValueError(f"text_lengths: {one.label} and {after.label} share a length; an utterance belongs to one")
    return found
