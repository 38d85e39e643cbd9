"""Normalisers: each rule that the documentation states."""

from __future__ import annotations

import pytest

from eval.text import NORMALISERS, get_normaliser


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Author of the danger trail, Philip Steels, etc.", "author of the danger trail philip steels etc"),
        ("well-known — it's the dogs' bone; 'tis O’Neil", "well known it's the dogs bone tis o'neil"),
        ("371", "three hundred seventy one"),
        ("3 7 1", "three seven one"),
        ("37192", "three seven one nine two"),
        ("007 and 0", "zero zero seven and zero"),
        ("12,500 men in 1905", "twelve thousand five hundred men in one thousand nine hundred five"),
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


def test_basic_is_stable_under_itself() -> None:
    basic = get_normaliser("basic")
    for text in ("37192 f2 it's 3.05% — 21st", "bin blue at f two now"):
        assert basic(basic(text)) == basic(text)


def test_five_digits_are_five_words_under_basic_but_not_under_whisper_english() -> None:
    said = "three seven one nine two"
    assert len(get_normaliser("basic")(said).split()) == 5
    assert len(get_normaliser("whisper-english")(said).split()) == 1


def test_none_only_folds_white_space() -> None:
    assert get_normaliser("none")("  Bin  BLUE, at\n2 ") == "Bin BLUE, at 2"


def test_unknown_name_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'fancy' is unknown.*basic, none, whisper-english"):
        get_normaliser("fancy")
    assert all(n.version for n in NORMALISERS.values())
