"""TTS with prosody tokens: the prosody of every word first, then the speech.

As ProsodyLM (arXiv 2507.20091) orders them: a text, then word-level prosody tokens. The codes of the whole utterance
follow here, where ProsodyLM leaves speech to a synthesiser behind the LLM. So the LLM can be told how a text is to be
said: prosody that is given is not written (:func:`slm.generation.generate_speech`).
"""

from __future__ import annotations

from slm.tasks.registry import Mark, Prosody, Speech, Task, Text, Turn, UtteranceTokens, register

SYNTHESIZE_PROSODY = "<|synthesize-prosody|>"


def turn(utterance: UtteranceTokens) -> Turn:
    """Text `<|synthesize-prosody|>` -> three tokens a word, then `<|speech|> codes <|/speech|>`."""
    answer = [Prosody(utterance.prosody), Speech(utterance.codes)]
    return Turn(prompt=[Text(utterance.text), Mark(SYNTHESIZE_PROSODY)], answer=answer)


TTS_PROSODY = register(Task("tts-prosody", "speech", turn, marks=(SYNTHESIZE_PROSODY,)))
