"""The further columns of a row, as text: lists and objects as JSON, and an exchange of messages as its two texts.

Data sets of instructions mostly hold an exchange as chat templates take it, `[{"role": "user", "content": ...},
{"role": "assistant", "content": ...}]`, in a column `messages`. A row without `instruction` and `answer` gets them from
there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizer.data.utterances import DataError

MESSAGES = "messages"
TURNS = {"instruction": "user", "answer": "assistant"}  # column -> whose turn it is


def columns_of(row: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, str]:
    """The texts of some columns of a row; empty where it has none.

    Args:
        row: of a manifest or a table.
        names: the columns that are asked for.
        where: the row, for messages.

    Raises:
        DataError: `instruction` or `answer` is asked for, the row has neither, and its `messages` are not one turn of
            the user and one of the assistant (which may be missing, as where it is to be generated).

    >>> turns = [{"role": "user", "content": "Who speaks?"}, {"role": "assistant", "content": "Jo."}]
    >>> columns_of({"messages": turns, "topic": ["a", 1]}, ["instruction", "answer", "topic"], "row 3")
    {'instruction': 'Who speaks?', 'answer': 'Jo.', 'topic': '["a", 1]'}
    """
    asked = [name for name in names if name in TURNS]
    if asked and row.get(MESSAGES) and all(row.get(name) is None for name in TURNS):
        row = {**row, **_exchange(row[MESSAGES], where)}
    return {name: _as_text(row.get(name)) for name in names}


def _as_text(value: object) -> str:
    return (
        json.dumps(value, ensure_ascii=False, default=str)
        if isinstance(value, list | dict) and value
        else str(value or "")
    )


def _exchange(messages: object, where: str) -> dict[str, str]:
    """The two texts of an exchange. Raises DataError."""
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise DataError(f"{where}: messages is not JSON ({error})") from None
    turns = messages if isinstance(messages, list) else [messages]
    if not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns):
        raise DataError(f'{where}: messages must be a list of {{"role": ..., "content": ...}}')
    roles = [str(turn["role"]) for turn in turns]
    if roles not in (list(TURNS.values()), ["user"]):
        raise DataError(
            f"{where}: messages holds the turns {', '.join(roles)}; one of the user and then one of the assistant are "
            "taken, as the columns instruction and answer. Write these two into the row, cut a longer exchange into "
            "rows, or leave the row out"
        )
    return {column: _content(turn["content"], where) for column, turn in zip(TURNS, turns, strict=False)}


def _content(content: object, where: str) -> str:
    """A turn's text; of one in parts those of text, for its audio is the row's own. Raises DataError."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, Mapping) and part.get("type") in ("text", "audio") for part in parts):
        raise DataError(f"{where}: the content of messages must be a text, or a list of parts of type text and audio")
    return "\n".join(str(part.get("text") or "") for part in parts if part["type"] == "text")
