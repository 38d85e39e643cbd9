"""Numerals as spoken words, so that "21st" and "twenty first" count as the same.

The words come from num2words. What stands here is which reading a written form gets: a date, a time of day, an amount
of money, a telephone number, a year, a fraction, an ordinal, a decimal, or plain digits. A written form has one
reading, the commonest in read speech; where people say it in several ways ("1905": nineteen oh five, nineteen five)
the others count as errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

__all__ = ["check_language", "spell_numerals"]

_MONTHS = (
    "january february march april may june july august september october november december jan feb mar apr jun jul aug "
    "sep sept oct nov dec"
).split()
_FULL_MONTHS = _MONTHS[:12]
_MONEY = {"$": ("dollar", "cent"), "£": ("pound", "penny"), "€": ("euro", "cent")}
_PLURALS = {"penny": "pence"}
_LARGE = "hundred|thousand|million|billion|trillion"
_SMALL_WORDS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
).split()
_DENOMINATORS = {2: "half", 4: "quarter"}
# Languages whose decimal mark is a point; the others of num2words write 3,5 and 1.000.
_DECIMAL_POINT = {"am", "bn", "cy", "en", "fa", "he", "ja", "kn", "ko", "te", "th"}


def check_language(language: str) -> None:
    """Raises ValueError unless numerals can be spelled in ``language``; the message lists the choices."""
    from num2words import CONVERTER_CLASSES

    if language not in CONVERTER_CLASSES:
        raise ValueError(f"numerals cannot be spelled in {language!r}: choose one of {', '.join(CONVERTER_CLASSES)}")


def spell_numerals(text: str, language: str) -> str:
    """Replace numerals of ASCII digits by words of ``language``, in lower case and without hyphens or commas.

    Digits of other scripts stay as they are. English has the readings that the module's head lists; in other languages
    whole numbers and decimals are spelled, with the language's own decimal mark.

    Args:
        text: in lower case.
        language: a code that num2words knows, such as "en" or "de".

    Raises:
        ValueError: no words are known for that language.
    """
    if not re.search("[0-9]", text):
        return _drop_and(text) if language == "en" else text
    check_language(language)
    # Beyond all names of numbers.
    text = re.sub("[0-9][0-9.,]{20,}", lambda match: f" {_digit_by_digit(match[0], language)} ", text)
    if language != "en":
        return _spell_plain(text, language)
    for pattern, reading in _english_rules():
        text = pattern.sub(lambda match, reading=reading: f" {reading(match)} ", text)
    return _drop_and(text)


def _words(number: int | str, to: str = "cardinal", language: str = "en") -> str:
    from num2words import num2words

    said = num2words(number, to=to, lang=language)
    if language == "en":
        said = said.replace(",", "").replace(" and ", " ")
    return said.replace("-", " ").lower()


def _digit_by_digit(text: str, language: str = "en") -> str:
    return " ".join(_words(int(digit), language=language) for digit in re.findall("[0-9]", text))


def _whole(written: str) -> str:
    """A whole number in English: ``1,000,000``, ``371``, a year of four digits, or digits one by one.

    Five digits and more without commas, and a leading zero, are read one by one, as telephone numbers and codes are.
    """
    digits = written.replace(",", "")
    if (len(digits) > 1 and digits[0] == "0") or (len(digits) > 4 and "," not in written):
        return _digit_by_digit(digits)
    if "," not in written and len(digits) == 4 and 1100 <= int(digits) < 2100:
        return _words(int(digits), "year")
    return _words(int(digits))


def _decimal(whole: str, fraction: str) -> str:
    before = f"{_words(int(whole.replace(',', '')))} " if whole else ""
    return f"{before}point {_digit_by_digit(fraction)}"


def _plural(word: str, number: int) -> str:
    return word if number == 1 else _PLURALS.get(word, word + "s")


def _money(match: re.Match[str]) -> str:
    unit, part = _MONEY[match["sign"]]
    whole = int(match["whole"].replace(",", ""))
    if match["scale"]:
        amount = _decimal(match["whole"], match["cents"]) if match["cents"] else _words(whole)
        return f"{amount} {match['scale']} {unit}s"
    said = f"{_words(whole)} {_plural(unit, whole)}"
    if match["cents"] and len(match["cents"]) == 2:
        cents = int(match["cents"])
        coins = f"{_words(cents)} {_plural(part, cents)}"
        return said if not cents else coins if not whole else f"{said} and {coins}"
    return f"{_decimal(match['whole'], match['cents'])} {unit}s" if match["cents"] else said


def _iso_date(match: re.Match[str]) -> str:
    month = _FULL_MONTHS[int(match["month"]) - 1]
    return f"{month} {_words(int(match['day']), 'ordinal')} {_words(int(match['year']), 'year')}"


def _time_of_day(match: re.Match[str]) -> str:
    hour, minutes, half = int(match["hour"]), int(match["minutes"] or 0), match["half"]
    said = _words(hour)
    if minutes:
        said += f" oh {_words(minutes)}" if minutes < 10 else f" {_words(minutes)}"
    elif not half:
        said += " o'clock" if hour <= 12 else " hundred"
    return f"{said} {half[0]} m" if half else said


def _fraction(match: re.Match[str]) -> str:
    above, below = int(match["above"]), int(match["below"])
    whole = match["whole"]
    if below not in range(2, 11):
        return f"{_whole(whole) + ' ' if whole else ''}{_whole(match['above'])} {_whole(match['below'])}"
    name = _DENOMINATORS.get(below) or _words(below, "ordinal")
    plural = "halves" if name == "half" else name + "s"
    if not whole:
        return f"{_words(above)} {name if above == 1 else plural}"
    article = "a" if above == 1 else _words(above)
    return f"{_whole(whole)} and {article} {name if above == 1 else plural}"


def _decade(match: re.Match[str]) -> str:
    number = match["number"]
    said = _words(int(number), "year" if len(number) == 4 else "cardinal")
    return said[:-1] + "ies" if said.endswith("y") else said + "s"


@cache
def _english_rules() -> list[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]]:
    """Patterns with their readings, the more specific first: what one has replaced the next does not see."""
    number = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+"
    # No digit, and no mark that binds two digits together, stands before or behind.
    free, end = r"(?<![0-9.,/:])", r"(?![0-9]|[.,/:][0-9])"
    months = "|".join(sorted(_MONTHS, key=len, reverse=True))
    half = r"(?P<half>[ap])\.?\s?m\b\.?"
    day = r"(?P<day>[12]?[0-9]|3[01])"
    return [
        (
            re.compile(rf"{free}(?P<year>[0-9]{{4}})-(?P<month>0[1-9]|1[0-2])-(?P<day>0[1-9]|[12][0-9]|3[01])\b{end}"),
            _iso_date,
        ),
        (  # "february 11, 1994" is said as an ordinal; "11 february" too
            re.compile(rf"\b(?P<month>{months})\.? {day}(?:st|nd|rd|th)?\b{end}"),
            lambda m: f"{m['month']} {_words(int(m['day']), 'ordinal')}",
        ),
        (
            re.compile(rf"{free}\b{day}(?= (?:{months})\b)"),
            lambda m: _words(int(m["day"]), "ordinal"),
        ),
        (
            re.compile(r"(?<![0-9.\-])(?:\+?[0-9]{1,2}[ .-])?\(?[0-9]{3}\)?[ .-][0-9]{3}[.-][0-9]{4}\b(?!-?[0-9])"),
            lambda m: ("plus " if m[0].startswith("+") else "") + _digit_by_digit(m[0]),
        ),
        (re.compile(r"(?<![0-9.\-])[0-9]{3}-[0-9]{4}\b(?!-?[0-9])"), lambda m: _digit_by_digit(m[0])),
        (
            re.compile(
                rf"(?P<sign>[$£€])\s?(?P<whole>{number})(?:\.(?P<cents>[0-9]+))?(?: (?P<scale>{_LARGE})\b)?"
                r"(?![0-9]|[.,][0-9])"
            ),
            _money,
        ),
        (
            re.compile(rf"{free}(?P<hour>[01]?[0-9]|2[0-3]):(?P<minutes>[0-5][0-9])(?![0-9:])(?:\s?{half})?"),
            _time_of_day,
        ),
        (re.compile(rf"{free}(?P<hour>1[0-2]|[1-9])(?P<minutes>)\s?{half}"), _time_of_day),
        (re.compile(rf"{free}(?:(?P<whole>[0-9]+)[ -]?)?\b(?P<above>[0-9]+)[/⁄](?P<below>[0-9]+){end}"), _fraction),
        (re.compile(rf"{free}'?\b(?P<number>[0-9]{{2,3}}0|[1-9]0)'?s\b"), _decade),
        (
            re.compile(rf"(?P<number>{number})(?:st|nd|rd|th)\b"),
            lambda m: _words(int(m["number"].replace(",", "")), "ordinal"),
        ),
        (re.compile(r"(?<![\w.,])[-−](?=\.?[0-9])"), lambda m: "minus"),
        (  # a version, an address
            re.compile(r"[0-9]+(?:\.[0-9]+){2,}"),
            lambda m: " point ".join(_whole(part) for part in m[0].split(".")),
        ),
        (
            re.compile(rf"(?P<whole>{number})?(?<![0-9]\.)\.(?P<fraction>[0-9]+)(?![0-9]|\.[0-9])"),
            lambda m: _decimal(m["whole"] or "", m["fraction"]),
        ),
        (re.compile(number), lambda m: _whole(m[0])),
    ]


_AND_IN_A_NUMBER = re.compile(rf"\b({_LARGE}) and (?=(?:{'|'.join(_SMALL_WORDS)})\b)")
_HALF_OF_THE_DAY = re.compile(rf"\b({'|'.join([*_SMALL_WORDS, 'clock'])}) ([ap])\.?m\b")


def _drop_and(text: str) -> str:
    """One way of saying a number: "two hundred and five" as "two hundred five", "ten pm" as "ten p m"."""
    return _HALF_OF_THE_DAY.sub(r"\1 \2 m", _AND_IN_A_NUMBER.sub(r"\1 ", text))


def _spell_plain(text: str, language: str) -> str:
    """Whole numbers and decimals in a language other than English."""
    point, group = (".", ",") if language in _DECIMAL_POINT else (",", ".")
    number = re.compile(
        rf"(?P<whole>[0-9]{{1,3}}(?:{re.escape(group)}[0-9]{{3}})+|[0-9]+)(?:{re.escape(point)}(?P<fraction>[0-9]+))?"
    )

    def reading(match: re.Match[str]) -> str:
        whole, fraction = match["whole"].replace(group, ""), match["fraction"]
        if fraction:
            return f" {_words(f'{whole}.{fraction}', language=language)} "
        code = (len(whole) > 1 and whole[0] == "0") or (len(whole) > 4 and group not in match["whole"])
        return f" {_digit_by_digit(whole, language) if code else _words(int(whole), language=language)} "

    return number.sub(reading, text)
