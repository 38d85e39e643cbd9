"""Instruction following: speech and an instruction in, a text answer out, as DeSTA2 trains it (arXiv 2409.20007).

Both texts are columns of the corpus, which `slm describe-corpus` writes.
"""

from __future__ import annotations

from slm.tasks.registry import Mark, Speech, Task, Text, Turn, UtteranceTokens, register

INSTRUCT, INSTRUCTION, ANSWER = "<|instruct|>", "instruction", "answer"


def turn(utterance: UtteranceTokens) -> Turn:
    """`<|speech|> codes <|/speech|>` instruction `<|instruct|>` -> answer."""
    columns = utterance.columns
    prompt = [Speech(utterance.codes), Text(columns.get(INSTRUCTION)), Mark(INSTRUCT)]
    return Turn(prompt=prompt, answer=[Text(columns.get(ANSWER))])


INSTRUCT_TASK = register(
    Task("instruct", "text", turn, marks=(INSTRUCT,), columns=(INSTRUCTION, ANSWER), reference=ANSWER)
)
