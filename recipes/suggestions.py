"""What a user may have meant by a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

ENOUGH = 0.6  # of likeness, as `difflib.get_close_matches` takes it


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """The known names that a mistyped one is like, as the middle of a message; empty where none is.

    A name with folders is also found by its last part.

    Args:
        name: what was given.
        known: what there is.
        most: how many are named at most.

    >>> did_you_mean("finetuen", ["quickstart/finetune", "embedded/finetune", "quickstart/encode"])
    'did you mean `embedded/finetune` or `quickstart/finetune`? '
    >>> did_you_mean("whatever", ["asr", "tts"])
    ''
    """
    likeness = {one: (max(_ratio(name, one), _ratio(_last(name), _last(one))), _ratio(name, one)) for one in known}
    close = sorted((one for one in likeness if likeness[one][0] >= ENOUGH), key=likeness.get, reverse=True)
    return one_of(close[:most]) if close else ""


def one_of(names: Sequence[str]) -> str:
    """Names that may have been meant, as the middle of a message.

    >>> one_of(["asr", "tts", "st"])
    'did you mean `asr`, `tts` or `st`? '
    """
    *first, last = [f"`{name}`" for name in names]
    return f"did you mean {', '.join(first)}{' or ' if first else ''}{last}? "


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _last(name: str) -> str:
    return name.rpartition("/")[2]
