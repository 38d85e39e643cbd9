"""Normalisers: each rule that the documentation states."""

from __future__ import annotations

import random

import pytest

from eval.text.normalisers import NORMALISERS, get_normaliser


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Author of the danger trail, Philip Steels, etc.", "author of the danger trail philip steels etc"),
        ("well-known — it's the dogs' bone; 'tis O’Neil", "well known it's the dogs bone tis o'neil"),
        ("371", "three hundred seventy one"),
        ("3 7 1", "three seven one"),
        ("37192", "three seven one nine two"),
        ("007 and 0", "zero zero seven and zero"),
        ("12,500 men in 1905", "twelve thousand five hundred men in nineteen oh five"),
        ("3.05% of 20", "three point zero five percent of twenty"),
        ("the 21st, 12th, 30th and 2nd", "the twenty first twelfth thirtieth and second"),
        ("bin blue at F2 now", "bin blue at f two now"),
        ("ﬁne ｆｕｌｌ　width", "fine full width"),
        ("café naïve", "café naïve"),
        ("", ""),
        ("?!…", ""),
    ],
)
def test_basic(text: str, expected: str) -> None:
    assert get_normaliser("basic")(text) == expected


# What is written and how it is read aloud. Scored against each other they must be without an error.
SPOKEN_AND_WRITTEN = [
    ("February eleventh nineteen ninety four", "1994-02-11"),
    ("February eleventh, nineteen ninety-four", "February 11, 1994"),
    ("on the eleventh February nineteen oh five", "on the 11 February 1905"),
    ("March third two thousand and five", "March 3 2005"),
    ("July fourth seventeen seventy six", "July 4th, 1776"),
    ("in two thousand", "in 2000"),
    ("in nineteen hundred", "in 1900"),
    ("the nineteen nineties", "the 1990s"),
    ("the nineties", "the '90s"),
    ("ten a m", "10:00 AM"),
    ("ten am sharp", "10 a.m. sharp"),
    ("seven thirty pm", "7:30 p.m."),
    ("at ten oh five", "at 10:05"),
    ("at ten o'clock", "at 10:00"),
    ("fourteen thirty", "14:30"),
    ("the twenty first", "the 21st"),
    ("the one hundredth", "the 100th"),
    ("third and twelfth", "3rd and 12th"),
    ("three dollars and fifty cents", "$3.50"),
    ("one dollar", "$1"),
    ("five million dollars", "$5 million"),
    ("two point five billion pounds", "£2.5 billion"),
    ("ninety nine cents", "$0.99"),
    ("twenty euros", "€20"),
    ("one million dollars", "$1,000,000"),
    ("nine one nine six nine six three nine zero one", "919-696-3901"),
    ("plus one nine one nine six nine six three nine zero one", "+1 (919) 696-3901"),
    ("five five five zero one nine nine", "555-0199"),
    ("point five", ".5"),
    ("three point zero five percent", "3.05%"),
    ("minus three point two degrees", "-3.2°"),
    ("zero point zero zero one", "0.001"),
    ("one half", "½"),
    ("two and a half", "2½"),
    ("two and three quarters", "2 3/4"),
    ("two thirds", "2/3"),
    ("one million", "1,000,000"),
    ("two hundred and five", "205"),
    ("twelve thousand three hundred and forty five", "12,345"),
    ("three thousand two hundred", "3,200"),
    ("zero zero seven", "007"),
    ("version one point two point three", "version 1.2.3"),
    ("number five", "#5"),
]


@pytest.mark.parametrize(("spoken", "written"), SPOKEN_AND_WRITTEN)
def test_a_written_number_is_what_is_said(spoken: str, written: str) -> None:
    basic = get_normaliser("basic")
    assert basic(spoken) == basic(written)
    assert not any(char.isdigit() for char in basic(written))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("basic:de", "Ich habe 3 Hunde und 3,5 Euro.", "ich habe drei hunde und drei komma fünf euro"),
        ("basic:de", "1.000.000 Menschen", "eine million menschen"),
        ("basic:fr", "21 chats", "vingt et un chats"),
        ("basic:tr", "İstanbul'da IŞIK 3", "istanbul'da ışık üç"),
        ("basic", "İstanbul", "istanbul"),
        ("basic:any", "Ich habe 3 Hunde", "ich habe 3 hunde"),
        # Digits of another language than English are no English words.
        ("basic", "我有3只狗", "我有3只狗"),
        ("basic", "у меня 3 собаки", "у меня 3 собаки"),
        ("basic", "لدي ٣ كلاب", "لدي ٣ كلاب"),
        ("basic", "আমার ৩টি কুকুর", "আমার ৩টি কুকুর"),
        # Marks are part of a word.
        ("basic", "हिन्दी ภาษาไทย", "हिन्दी ภาษาไทย"),
    ],
)
def test_languages(name: str, text: str, expected: str) -> None:
    assert get_normaliser(name)(text) == expected


def test_whisper_english_carries_the_spelling_table() -> None:
    whisper = get_normaliser("whisper-english")
    assert whisper("the colour of the programme") == whisper("the color of the program")


@pytest.mark.parametrize("name", ["basic", "basic:de", "basic:ar", "basic:any"])
def test_any_text_has_a_normal_form(name: str) -> None:
    characters = "0123456789.,:/-+$£½⁄ ٣৩'ap.m.stndrdth°#%&@janmay\u2028\x00"
    draw = random.Random(0)
    basic = get_normaliser(name)
    for _ in range(2000):
        text = "".join(draw.choice(characters) for _ in range(draw.randrange(24)))
        assert isinstance(basic(text), str)
    assert basic("9" * 5000) and basic("1" + ",000" * 2000) and basic("0." + "3" * 5000)


def test_unknown_language_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'basic:xx'.*'xx'.*choose one of .*de.*basic:any"):
        get_normaliser("basic:xx")
    with pytest.raises(ValueError, match=r"'none:de' is unknown"):
        get_normaliser("none:de")


def test_basic_is_stable_under_itself() -> None:
    basic = get_normaliser("basic")
    for text in ("37192 f2 it's 3.05% — 21st", "bin blue at f two now", *(pair[1] for pair in SPOKEN_AND_WRITTEN)):
        assert basic(basic(text)) == basic(text)


def test_five_digits_are_five_words_under_basic_but_not_under_whisper_english() -> None:
    said = "three seven one nine two"
    assert len(get_normaliser("basic")(said).split()) == 5
    assert len(get_normaliser("whisper-english")(said).split()) == 1


def test_none_only_folds_white_space() -> None:
    assert get_normaliser("none")("  Bin  BLUE, at\n2 ") == "Bin BLUE, at 2"


def test_unknown_name_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'fancy' is unknown.*basic, f5-tts, none, seed-tts-eval.*, whisper-english"):
        get_normaliser("fancy")
    assert all(n.version for n in NORMALISERS.values())
