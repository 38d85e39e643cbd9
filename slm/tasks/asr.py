"""ASR: speech in, its transcript out."""

from __future__ import annotations

from slm.tasks.registry import Mark, Speech, Task, Text, Turn, UtteranceTokens, register
from slm.vocabulary import TRANSCRIBE


def turn(utterance: UtteranceTokens) -> Turn:
    """`<|speech|> codes <|/speech|> <|transcribe|>` -> text."""
    return Turn(prompt=[Speech(utterance.codes), Mark(TRANSCRIBE)], answer=[Text(utterance.text)])


ASR = register(Task("asr", "text", turn))
