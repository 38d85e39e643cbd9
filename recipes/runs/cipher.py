"""A made-up language: every word of a text has one pronounceable word of its own, drawn from a seed.

A translation into it is right or wrong, word for word, and no model has read it before: what a translation task needs
to be tried where no parallel texts are at hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

ONSETS, VOWELS = "bdfgjklmnprstvz", "aeiou"
SYLLABLES = tuple(onset + vowel for onset in ONSETS for vowel in VOWELS)


def cipher_word(word: str, seed: int, attempt: int = 0) -> str:
    """A word of 2 to 4 syllables, the longer for longer words: a function of word, seed and attempt alone.

    >>> cipher_word("please", 0) == cipher_word("please", 0) != cipher_word("please", 1)
    True
    """
    drawn = int.from_bytes(hashlib.sha256(f"{seed}\0{attempt}\0{word}".encode()).digest(), "big")
    syllables = []
    for _ in range(2 + (len(word) > 3) + (len(word) > 6)):
        drawn, number = divmod(drawn, len(SYLLABLES))
        syllables.append(SYLLABLES[number])
    return "".join(syllables)


def make_lexicon(words: Iterable[str], seed: int) -> dict[str, str]:
    """One word of the made-up language for each word, no two the same and none a word of the source.

    Words are taken in alphabetical order, whatever order they come in. Where two would share a word, the later draws
    anew, so a lexicon of more words may name those few otherwise.
    """
    lexicon: dict[str, str] = {}
    wanted = sorted(set(words))
    taken = set(wanted)
    for word in wanted:
        attempt = 0
        while (made := cipher_word(word, seed, attempt)) in taken:
            attempt += 1
        lexicon[word] = made
        taken.add(made)
    return lexicon


def encipher(text: str, lexicon: Mapping[str, str]) -> str:
    """The text word for word, in its order.

    >>> encipher("set white", {"set": "bado", "white": "kuliza"})
    'bado kuliza'
    """
    return " ".join(lexicon[word] for word in text.split())
