"""Named, versioned text normalisers: what is done to reference and hypothesis before they are compared.

A score without its normaliser means nothing, so each one carries a name and a version, which stand in the protocol.
Change a rule and the version goes up; rows of different versions are then no longer comparable.

- ``basic`` (the default): see :func:`normalise_basic`.
- ``whisper-english``: Whisper's English normaliser as transformers ships it, without the spelling table (which comes
  with a downloaded tokenizer). For read speech only: it joins neighbouring number words ("three seven one" becomes
  "371"), which makes a five-digit utterance one word.
- ``none``: only runs of white space are folded, so that splitting into words is well defined.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

__all__ = ["NORMALISERS", "Normaliser", "get_normaliser", "normalise_basic", "spell_number"]

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
_IRREGULAR_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u02bc\u00b4`"), "'")
_WORDS_OF_SYMBOLS = {"%": " percent ", "&": " and ", "@": " at ", "+": " plus "}
_NUMBER = re.compile(r"(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?:\.(?P<fraction>\d+))?(?:(?P<ordinal>st|nd|rd|th)\b)?")


@dataclass(frozen=True)
class Normaliser:
    """A text normaliser that can be named in a protocol: call it on a text, get the text that is scored."""

    name: str
    version: str
    function: Callable[[str], str]

    def __call__(self, text: str) -> str:
        return self.function(text)


def _spell_cardinal(number: int) -> str:
    """Words of a number below one million, American style (no "and"): 371 -> "three hundred seventy one"."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        return _TENS[number // 10] + (f" {_UNITS[number % 10]}" if number % 10 else "")
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    rest = number % size
    return f"{_spell_cardinal(number // size)} {name}" + (f" {_spell_cardinal(rest)}" if rest else "")


def spell_number(digits: str, ordinal: bool = False) -> str:
    """Spell one numeral. ``digits`` may hold thousands commas ("12,500").

    Up to four digits without a leading zero, or up to six with thousands commas, are read as a number; everything
    else (five digits and more, "007") is read digit by digit, as telephone numbers and codes are.
    """
    plain = digits.replace(",", "")
    leading_zero = len(plain) > 1 and plain.startswith(("0", "\u0660"))
    if leading_zero or len(plain) > (6 if "," in digits else 4):
        words = " ".join(_UNITS[int(digit)] for digit in plain)
    else:
        words = _spell_cardinal(int(plain))
    if not ordinal:
        return words
    *head, last = words.split()
    if last in _IRREGULAR_ORDINALS:
        last = _IRREGULAR_ORDINALS[last]
    else:
        last = last[:-1] + "ieth" if last.endswith("y") else last + "th"
    return " ".join([*head, last])


def _spell_match(match: re.Match[str]) -> str:
    words = spell_number(match["whole"], ordinal=match["ordinal"] is not None and match["fraction"] is None)
    if match["fraction"] is not None:
        words += " point " + " ".join(_UNITS[int(digit)] for digit in match["fraction"])
    return f" {words} "


def normalise_basic(text: str) -> str:
    """The ``basic`` normaliser.

    In this order: Unicode NFKC; lower case; ``% & @ +`` become words; numerals are spelled (one rule, see
    :func:`spell_number`): "371" -> "three hundred seventy one", "3 7 1" -> "three seven one", "37192" -> "three seven
    one nine two", "3.05" -> "three point zero five", "21st" -> "twenty first", and a numeral next to a letter stands
    alone, "f2" -> "f two"; everything that is not a letter, a mark or an apostrophe inside a word becomes a space, so
    hyphens split. Number words are never joined and never turned into numerals: "three seven one nine two" stays five
    words.
    """
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES).lower()
    for symbol, words in _WORDS_OF_SYMBOLS.items():
        text = text.replace(symbol, words)
    text = _NUMBER.sub(_spell_match, text)
    kept = (char if char == "'" or unicodedata.category(char)[0] in "LM" else " " for char in text)
    # An apostrophe counts only between two letters: "don't" keeps it, "'tis" and "dogs'" lose it.
    return " ".join(re.sub(r"(?<!\w)'+|'+(?!\w)", " ", "".join(kept)).split())


@cache
def _whisper_normalizer() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


def _normalise_whisper(text: str) -> str:
    return " ".join(_whisper_normalizer()(text).split())


def _normalise_none(text: str) -> str:
    return " ".join(text.split())


NORMALISERS: dict[str, Normaliser] = {
    normaliser.name: normaliser
    for normaliser in (
        Normaliser("basic", "1", normalise_basic),
        Normaliser("whisper-english", "1", _normalise_whisper),
        Normaliser("none", "1", _normalise_none),
    )
}


def get_normaliser(name: str) -> Normaliser:
    """Look a normaliser up by name.

    Raises:
        ValueError: no normaliser has that name; the message lists those there are.
    """
    if name not in NORMALISERS:
        raise ValueError(f"normaliser {name!r} is unknown: choose one of {', '.join(sorted(NORMALISERS))}")
    return NORMALISERS[name]
