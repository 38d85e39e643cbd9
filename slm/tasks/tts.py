"""TTS: text in, speech out."""

from __future__ import annotations

from slm.tasks.registry import Mark, Speech, Task, Text, Turn, UtteranceTokens, register
from slm.vocabulary import SYNTHESIZE


def turn(utterance: UtteranceTokens) -> Turn:
    """Text `<|synthesize|>` -> `<|speech|> codes <|/speech|>`."""
    return Turn(prompt=[Text(utterance.text), Mark(SYNTHESIZE)], answer=[Speech(utterance.codes)])


TTS = register(Task("tts", "speech", turn))
