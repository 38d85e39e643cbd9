"""Text translation: the transcript in, its text in another language out, which the column `translation` holds.

It shares its mark with speech translation (:mod:`slm.tasks.st`): where ASR has brought speech close to its text, a
model that has only learnt to translate texts may be asked to translate speech, zero-shot (DCMA, arXiv 2210.09556).
"""

from __future__ import annotations

from slm.tasks.registry import Mark, Task, Text, Turn, UtteranceTokens, register
from slm.tasks.st import TRANSLATE, TRANSLATION


def turn(utterance: UtteranceTokens) -> Turn:
    """Text `<|translate|>` -> the translation; the tag of its language may end the prompt."""
    prompt = [Text(utterance.text), Mark(TRANSLATE)]
    return Turn(prompt=prompt, answer=[Text(utterance.columns.get(TRANSLATION))])


MT = register(
    Task("mt", "text", turn, marks=(TRANSLATE,), columns=(TRANSLATION,), reference=TRANSLATION, scored_by="bleu")
)
