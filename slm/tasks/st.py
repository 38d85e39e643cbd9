"""Speech translation: speech in, its text in another language out, which the corpus's column `translation` holds."""

from __future__ import annotations

from slm.tasks.registry import Mark, Speech, Task, Text, Turn, UtteranceTokens, register

TRANSLATE, TRANSLATION = "<|translate|>", "translation"


def turn(utterance: UtteranceTokens) -> Turn:
    """`<|speech|> codes <|/speech|> <|translate|>` -> the translation; the tag of its language may end the prompt."""
    return Turn(prompt=[Speech(utterance.codes), Mark(TRANSLATE)], answer=[Text(utterance.columns.get(TRANSLATION))])


ST = register(
    Task("st", "text", turn, marks=(TRANSLATE,), columns=(TRANSLATION,), reference=TRANSLATION, scored_by="bleu")
)
