"""Named, versioned text normalisers: what is done to reference and hypothesis before they are compared.

A score without its normaliser means nothing, so each one carries a name and a version, which stand in the protocol.
Change a rule and the version goes up; rows of different versions are then no longer comparable.

- ``basic`` (the default): see :func:`normalise_basic`. English; ``basic:de`` and the like for another language, whose
  numerals are spelled in its words; ``basic:any`` leaves digits alone. Chinese and Japanese (``basic:zh``,
  ``basic:yue``, ``basic:ja``) have no spaces between words: there each character is a word, and WER is what the field
  calls CER or mixed error rate; words in Latin letters stay whole. Digits stay in Chinese.
- ``whisper-english``: Whisper's English normaliser as transformers ships it, with Whisper's table of British and
  American spellings (from the package whisper-normalizer; version 1 had no table). For read speech only: it joins
  neighbouring number words ("three seven one" becomes "371"), which makes a five-digit utterance one word.
- ``seed-tts-eval``, ``seed-tts-eval-zh``: what github.com/BytedanceSpeech/seed-tts-eval (run_wer.py, 95003fe) does to
  both sides: all punctuation but ' is deleted, so that hyphens join words; then lower case, or for Chinese a space
  between all characters. Numerals stay as they are written.
- ``f5-tts``: the same with ' deleted as well (github.com/SWivid/F5-TTS, src/f5_tts/eval/utils_eval.py, 362a7a3).
- ``none``: only runs of white space are folded, so that splitting into words is well defined.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

from eval.text.numerals import check_language, spell_numerals

__all__ = ["NORMALISERS", "Normaliser", "get_normaliser", "normalise_basic", "unsegmented"]

_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u02bc\u00b4`"), "'")
_WORDS_OF_SYMBOLS = {"%": " percent ", "&": " and ", "@": " at ", "+": " plus ", "#": " number ", "°": " degrees "}
# Letters, marks, and digits that were not spelled.
_KEPT = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd"}
# Written without spaces between words; of each the character is the word.
_CHARACTER_LANGUAGES = {"zh", "yue", "ja"}
_CJK = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Beside these Thai, Lao, Burmese and Khmer.
_NO_SPACES = re.compile(f"[{_CJK}\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]{{8,}}")
# ASCII's, and the Chinese marks that the package zhon lists.
_PUNCTUATION = string.punctuation + "".join(
    map(chr, [*range(0xFF01, 0xFF10), *range(0xFF1A, 0xFF21), *range(0xFF3B, 0xFF41), *range(0xFF5B, 0xFF65)])
)
_PUNCTUATION += "\u3000\u3001\u3002\u3003\u3008\u3009\u300a\u300b\u300c\u300d\u300e\u300f\u3010\u3011"
_PUNCTUATION += "\u3014\u3015\u3016\u3017\u3018\u3019\u301a\u301b\u301c\u301d\u301e\u301f\u3030\u303e\u303f"
_PUNCTUATION += "\u2013\u2014\u2018\u2019\u201b\u201c\u201d\u201e\u201f\u2026\u2027\ufe4f\ufe51\ufe54\u00b7"


@dataclass(frozen=True)
class Normaliser:
    """A text normaliser that can be named in a protocol: call it on a text, get the text that is scored."""

    name: str
    version: str
    function: Callable[[str], str]

    def __call__(self, text: str) -> str:
        return self.function(text)


def normalise_basic(text: str, language: str | None = "en") -> str:
    """The ``basic`` normaliser.

    In this order: Unicode NFKC; lower case (Turkish and Azerbaijani with their two letters i); numerals are spelled in
    the language (:mod:`eval.text.numerals`), in English ``% & @ + # °`` too: "371" -> "three hundred seventy one", "3 7
    1" -> "three seven one", "37192" -> "three seven one nine two", "21st" -> "twenty first", "1994-02-11" -> "february
    eleventh nineteen ninety four", and a numeral next to a letter stands alone, "f2" -> "f two"; everything that is not
    a letter, a mark, a digit or an apostrophe inside a word becomes a space, so hyphens split. Number words are never
    turned into numerals: "three seven one nine two" stays five words.

    Digits stay as they are without a language, in a script other than ASCII's, and in English where most letters of the
    text are not Latin: there English words would be wrong.

    Args:
        text: what was said or written.
        language: a code that num2words knows; None: digits stay.
    """
    # NFKC alone would turn 2½ into 21⁄2.
    text = "".join(f" {char}" if "⁄" in unicodedata.normalize("NFKC", char) else char for char in text)
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES)
    if language in ("tr", "az"):
        text = text.replace("İ", "i").replace("I", "ı")
    text = text.lower().replace("i\u0307", "i")  # what lower() makes of İ elsewhere
    if language is not None and not (language == "en" and _mostly_not_latin(text)):
        text = spell_numerals(text, language)
    if language == "en":
        for symbol, words in _WORDS_OF_SYMBOLS.items():
            text = text.replace(symbol, words)
    kept = (char if char == "'" or unicodedata.category(char)[:2] in _KEPT else " " for char in text)
    # An apostrophe counts only between two letters: "don't" keeps it, "'tis" and "dogs'" lose it.
    return " ".join(re.sub(r"(?<!\w)'+|'+(?!\w)", " ", "".join(kept)).split())


def _mostly_not_latin(text: str) -> bool:
    letters = [char for char in text if char.isalpha()]
    return sum("LATIN" not in unicodedata.name(char, "") for char in letters) * 2 > len(letters)


@cache
def _whisper_normalizer() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
    from whisper_normalizer.english import EnglishSpellingNormalizer

    return EnglishTextNormalizer(EnglishSpellingNormalizer().mapping)


def _normalise_whisper(text: str) -> str:
    return " ".join(_whisper_normalizer()(text).split())


def _normalise_none(text: str) -> str:
    return " ".join(text.split())


def _without_punctuation(text: str, kept: str = "", characters: bool = False) -> str:
    """As in zero-shot speech synthesis: every mark but those kept is deleted, and nothing is put there."""
    text = text.translate({ord(mark): None for mark in _PUNCTUATION if mark not in kept})
    return " ".join((" ".join(text) if characters else text.lower()).split())


def _split_characters(text: str) -> str:
    """The text with each Chinese or Japanese character a word of its own."""
    return " ".join(re.sub(f"([{_CJK}])", r" \1 ", text).split())


def unsegmented(texts: Iterable[str]) -> int:
    """How many normalised texts hold a run of 8 characters or more of a script that puts no spaces between words.

    There a sentence is one word: it is right or wrong as a whole, and WER says little.
    """
    return sum(_NO_SPACES.search(text) is not None for text in texts)


NORMALISERS: dict[str, Normaliser] = {
    normaliser.name: normaliser
    for normaliser in (
        Normaliser("basic", "2", normalise_basic),
        Normaliser("whisper-english", "2", _normalise_whisper),
        Normaliser("none", "1", _normalise_none),
        Normaliser("seed-tts-eval", "1", partial(_without_punctuation, kept="'")),
        Normaliser("seed-tts-eval-zh", "1", partial(_without_punctuation, kept="'", characters=True)),
        Normaliser("f5-tts", "1", _without_punctuation),
    )
}


def get_normaliser(name: str) -> Normaliser:
    """Look a normaliser up by name.

    Args:
        name: one of ``NORMALISERS``; ``basic:de`` is ``basic`` with numerals in German, ``basic:zh`` takes characters
            as words, ``basic:any`` leaves digits alone.

    Raises:
        ValueError: no normaliser has that name, or none has that language; the message lists those there are.
    """
    if name in NORMALISERS:
        return NORMALISERS[name]
    base, _, language = name.partition(":")
    if base != "basic" or not language:
        known = ", ".join(sorted(NORMALISERS))
        raise ValueError(f"normaliser {name!r} is unknown: choose one of {known}, or basic:LANGUAGE such as basic:de")
    if language in ("any", "zh", "yue"):  # num2words knows no Chinese
        function = partial(normalise_basic, language=None)
    else:
        try:
            check_language(language)
        except ValueError as error:
            raise ValueError(
                f"normaliser {name!r}: {error}, or zh or yue, or basic:any, which leaves digits alone"
            ) from error
        function = partial(normalise_basic, language=language)
    if language in _CHARACTER_LANGUAGES:  # version 2 left a sentence one word
        return Normaliser(name, "3", lambda text: _split_characters(function(text)))
    return Normaliser(name, NORMALISERS[base].version, function)
