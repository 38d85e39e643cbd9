"""A text longer than an SLM has learnt to say, cut into parts that it can: sentences, clauses, at the last words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import sentencex

# Behind these a speaker may pause; a comma inside a number has no space behind it.
_CLAUSE = re.compile(r"(?<=[,;:…—–])\s+|(?<=[，、；：])|\s+(?=[(\[—–])")


@dataclass(frozen=True)
class Part:
    """What is said in one go: as it was written, as it is said, and whether a sentence ends with it."""

    written: str
    said: str
    ends_sentence: bool = True


def cut_text(
    text: str, normalise: Callable[[str], str], longest: int, language: str = "en", longest_piece: int | None = None
) -> list[Part]:
    """Cuts a text into parts of at most `longest` characters as they are said; a text that short stays whole.

    A longer one is cut into its sentences, and a sentence that is still too long into pieces, at commas and the like,
    then between words: only a single word may be longer. A line's end is a sentence's end unless the next line begins
    with a small letter. What holds nothing to say is left out.

    Args:
        text: what is to be said, as it was written.
        normalise: what the training's texts went through.
        longest: characters of a part, normalised, at least 1.
        language: whose abbreviations end no sentence, as a code ("en", "de").
        longest_piece: characters of the pieces of a sentence that is longer than `longest`; None: as many as that.

    Returns:
        The parts in their order; none where nothing is to be said. Their words are the text's.
    """

    def part(written: str, ends_sentence: bool = True) -> Part:
        return Part(written.strip(), normalise(written), ends_sentence)

    whole = part(text)
    if len(whole.said) <= longest:
        return [whole] if whole.said else []
    parts: list[Part] = []
    for sentence in _sentences(text, language):
        is_whole = len(normalise(sentence)) <= longest
        found = [sentence] if is_whole else _pieces(sentence, normalise, longest_piece or longest)
        pieces = [part(piece, False) for piece in found]
        pieces = [piece for piece in pieces if piece.said]
        if pieces:
            parts += [*pieces[:-1], part(pieces[-1].written)]
    return parts


def _sentences(text: str, language: str) -> Iterator[str]:
    for line in re.split(r"\n(?=\s*\n|\s*[^\s\na-zà-öø-ÿ])", text):
        yield from sentencex.segment(language, " ".join(line.split()))


def _pieces(sentence: str, normalise: Callable[[str], str], longest: int) -> Iterator[str]:
    def fits(piece: str) -> bool:
        return len(normalise(piece)) <= longest

    for clause in _packed(_CLAUSE.split(sentence), fits):
        if fits(clause):
            yield clause
            continue
        for piece in _even_parts(clause.split(), normalise, longest):
            if fits(piece) or piece.isascii():
                yield piece
            else:  # a script without spaces
                yield from (piece[start : start + longest] for start in range(0, len(piece), longest))


def _even_parts(words: list[str], normalise: Callable[[str], str], longest: int) -> list[str]:
    """As few parts as can be, and of like length: one word left over would be said as if it stood alone."""
    total = len(normalise(" ".join(words)))
    # Words fill no part to the brim, so that it may take one more than the characters do.
    for n in range(-(-total // longest), len(words) + 1):
        even = -(-total // n)
        for tenths in range(11):
            most = even + (longest - even) * tenths // 10
            parts = list(_packed(words, lambda part, most=most: len(normalise(part)) <= most))
            if len(parts) <= n:
                return parts
    return words


def _packed(pieces: list[str], fits: Callable[[str], bool]) -> Iterator[str]:
    """Neighbours put together as long as they fit."""
    held = ""
    for piece in filter(None, (piece.strip() for piece in pieces)):
        together = f"{held} {piece}" if held else piece
        if held and not fits(together):
            yield held
            held = piece
        else:
            held = together
    if held:
        yield held
