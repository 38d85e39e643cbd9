"""Turns as token sequences: pure functions from a task's parts to `input_ids` and `labels`.

Shapes: codes (K, F); text ids (T,); `input_ids` and `labels` (L,) int64, labels -100 wherever no loss is taken. With
`delay` and `parallel` a prompt is (P, n): its first column holds the ids, the others the codes of books 1 to n - 1.

    ASR   before <|speech|> codes <|/speech|> <|transcribe|> between | text end
    TTS   before text <|synthesize|> between <|speech|> | codes <|/speech|> end
    tts-aligned  before <|synthesize-aligned|> between word <|speech|> | codes <|/speech|> word <|speech|> codes ... end
    tts-prosody  before text <|synthesize-prosody|> between | prosody of each word <|speech|> codes <|/speech|> end

`before` and `between` are the chat template's ids (or bos, and nothing); what follows the bar is the answer, the only
part with loss. The mark that opens an answer's speech is given, not learnt, behind prosody too. Generation uses the
same prompt. A task by word has loss on each word's codes and their end alone: words, and that none is left, are given.
A wording of the task stands behind `before` and the tag of a language in front of `between`, where an utterance brings
them.

A vocabulary of 100 text ids (eos is 2, bos is 1) and one codebook of 8:

>>> from slm.tasks import get_task
>>> vocabulary = SpeechVocabulary(codebook_sizes=(8,), first_id=100, end_id=2, before=(1,))
>>> utterance = UtteranceTokens(codes=np.array([[0, 7, 3]]), text=np.array([40, 41]))
>>> asr = make_example(vocabulary, get_task("asr"), utterance)
>>> asr.input_ids.tolist()
[1, 100, 104, 111, 107, 101, 102, 40, 41, 2]
>>> asr.labels.tolist()
[-100, -100, -100, -100, -100, -100, -100, 40, 41, 2]
>>> tts = make_example(vocabulary, get_task("tts"), utterance)
>>> tts.input_ids.tolist()
[1, 40, 41, 103, 100, 104, 111, 107, 101, 2]
>>> tts.labels.tolist()
[-100, -100, -100, -100, -100, 104, 111, 107, 101, 2]
>>> make_prompt(vocabulary, get_task("tts"), UtteranceTokens(text=np.array([40, 41]))).tolist()
[1, 40, 41, 103, 100]

>>> spoken = UtteranceTokens(np.array([[0, 7, 3]]), words=[np.array([40]), np.array([41])], word_frames=[2, 1])
>>> marked = SpeechVocabulary((8,), 100, 2, before=(1,), added=(("more", ("<|synthesize-aligned|>",)),))
>>> aligned = make_example(marked, get_task("tts-aligned"), spoken)
>>> aligned.input_ids.tolist()
[1, 112, 40, 100, 104, 111, 101, 41, 100, 107, 101, 2]
>>> aligned.labels.tolist()
[-100, -100, -100, -100, 104, 111, 101, -100, -100, 107, 101, -100]

With `delay` a book of 8 stands beside that one, a frame later. The mark of the end stands where book 0 is over:

>>> beside = SpeechVocabulary(codebook_sizes=(8,), first_id=100, end_id=2, further_sizes=(8,))
>>> tts = make_example(beside, get_task("tts"), UtteranceTokens(np.array([[0, 7, 3], [4, 5, 6]]), np.array([40])))
>>> tts.input_ids.tolist(), tts.further[:, 0].tolist()
([40, 103, 100, 104, 111, 107, 101, 2], [-1, -1, -1, -1, 4, 5, 6, -1])
>>> tts.labels.tolist(), tts.further_labels[:, 0].tolist()
([-100, -100, -100, 104, 111, 107, 101, 2], [-100, -100, -100, -100, 4, 5, 6, -100])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from slm.patterns import EMPTY
from slm.tasks.registry import Mark, Part, Prosody, Speech, Task, TaskError, Text, UtteranceTokens
from slm.vocabulary import SpeechVocabulary

IGNORE = -100


@dataclass(frozen=True)
class SpokenText:
    """Where in a sequence a text stands, and from which positions the codes that say it are predicted."""

    text: range
    speech: range


@dataclass(frozen=True)
class Example:
    """One training sequence: `input_ids` (L,) and `labels` (L,), both int64.

    With further books beside the ids also their codes `further` (L, n - 1), `EMPTY` where there is none, and
    `further_labels`, shaped alike, -100 where no loss is taken. Of a task that says its prompt also where, unless there
    are fewer codes than tokens of text.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    further: np.ndarray | None = None
    further_labels: np.ndarray | None = None
    spoken: SpokenText | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


def make_prompt(
    vocabulary: SpeechVocabulary,
    task: Task,
    utterance: UtteranceTokens,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
    bare: bool = False,
) -> np.ndarray:
    """The ids after which the model writes the answer.

    Args:
        vocabulary: Ids of speech and marks.
        task: Whose prompt.
        utterance: What the prompt is made of; what only the answer needs may be missing.
        change: What is done to the codes (n, F) of the prompt's speech: training's noise.
        bare: Leave out the prompt's speech, text and wording, so that its marks ask for any answer at all: what
            classifier-free guidance (arXiv 2207.12598) holds the asked one against.

    Returns:
        (P,) int64; with books side by side (P, n).

    Raises:
        TaskError: The utterance lacks a part of the prompt.
    """
    wording = () if utterance.wording is None or bare else utterance.wording
    pieces: list[Sequence[int] | np.ndarray] = [[*vocabulary.before, *wording]]
    for part in task.turn(utterance).prompt:
        if bare and not isinstance(part, Mark):
            continue
        if isinstance(part, Speech) and part.codes is not None and change is not None:
            part = Speech(change(part.codes))
        pieces.append(_part_ids(vocabulary, task, part))
    if utterance.language is not None:
        pieces.append([vocabulary.mark_id(utterance.language)])
    ending = [*vocabulary.between, *_opening(vocabulary, task, utterance)]
    return np.concatenate([vocabulary.widened(piece) for piece in (*pieces, ending)])


def make_example(
    vocabulary: SpeechVocabulary,
    task: Task,
    utterance: UtteranceTokens,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
    prompted: UtteranceTokens | None = None,
    bare: bool = False,
) -> Example:
    """Prompt and answer, with loss on the answer and on its end.

    Args:
        vocabulary: As in :func:`make_prompt`, and so `task` and `change`.
        task: Whose sequence.
        utterance: What the answer is made of.
        change: What is done to the codes (n, F) of the prompt's speech.
        prompted: What the prompt is made of, where its texts are written otherwise; None: `utterance`.
        bare: As in :func:`make_prompt`.

    Raises:
        TaskError: An answer of speech that does not begin with speech.
    """
    prompt = make_prompt(vocabulary, task, prompted or utterance, change, bare)
    parts = task.turn(utterance).answer
    pieces = [vocabulary.widened(_part_ids(vocabulary, task, part)) for part in parts]
    ids = np.concatenate([*pieces, vocabulary.widened([vocabulary.end_id])])
    given = np.concatenate([*_given_places(parts, pieces), [task.by_word]])
    if task.answers == "speech":
        opening = len(_opening(vocabulary, task, utterance))
        if opening and np.ravel(ids[opening - 1])[0] != vocabulary.speech_id:
            raise TaskError(f"task {task.name}: an answer of speech must begin with Speech")
        ids, given = ids[opening:], given[opening:]  # stands in the prompt
    made = answer(prompt, ids)
    made.labels[len(prompt) :][given] = IGNORE
    if vocabulary.further_sizes:
        # While the further books come to their end, book 0's mark is given, not learnt, but for the first.
        repeated = (made.labels[1:] == vocabulary.speech_end_id) & (made.labels[:-1] == vocabulary.speech_end_id)
        made.labels[1:][repeated] = IGNORE
    if task.says_its_prompt and not bare and not vocabulary.further_sizes:
        made = replace(made, spoken=_spoken_text(vocabulary, task, prompted or utterance, len(prompt), len(ids)))
    return made


def _spoken_text(
    vocabulary: SpeechVocabulary, task: Task, prompted: UtteranceTokens, n_prompt: int, n_answer: int
) -> SpokenText | None:
    """Where the text of a prompt stands and its speech behind it, of an answer that says its prompt."""
    first = len(vocabulary.before) + (0 if prompted.wording is None else len(prompted.wording))
    for part in task.turn(prompted).prompt:
        if isinstance(part, Text):
            text = part.ids
            break
        first += _part_length(vocabulary, task, part)
    n_codes = n_answer - 2  # without the two ends
    if not 0 < len(text) <= n_codes:
        return None
    return SpokenText(range(first, first + len(text)), range(n_prompt - 1, n_prompt - 1 + n_codes))


def prompt_size(task: Task, utterance: UtteranceTokens) -> tuple[int, int]:
    """Frames of speech and tokens of text that a task's prompt holds, from which the length of an answer follows.

    Raises:
        TaskError: The utterance lacks a part of the prompt.
    """
    parts = task.turn(utterance).prompt
    frames = sum(_given(task, part.codes, "codes").shape[1] for part in parts if isinstance(part, Speech))
    return frames, sum(len(_given(task, part.ids, "text")) for part in parts if isinstance(part, Text))


def example_length(
    vocabulary: SpeechVocabulary, task: Task, utterance: UtteranceTokens, prompted: UtteranceTokens | None = None
) -> int:
    """The length L of :func:`make_example`, without building it."""
    prompted = prompted or utterance
    every = (*task.turn(prompted).prompt, *task.turn(utterance).answer)
    parts = sum(_part_length(vocabulary, task, part) for part in every)
    style = (0 if prompted.wording is None else len(prompted.wording)) + (prompted.language is not None)
    return len(vocabulary.before) + style + len(vocabulary.between) + parts + 1


def answer(prompt: np.ndarray, target: np.ndarray) -> Example:
    """(P,) prompt and (A,) answer, or (P, n) and (A, n) -> a sequence of P + A with loss on the answer."""
    ids, labels = np.concatenate([prompt, target]), np.concatenate([np.full_like(prompt, IGNORE), target])
    if ids.ndim == 1:
        return Example(ids, labels)
    further_labels = np.where(labels[:, 1:] == EMPTY, IGNORE, labels[:, 1:])
    return Example(ids[:, 0], labels[:, 0].copy(), ids[:, 1:], further_labels)


def _opening(vocabulary: SpeechVocabulary, task: Task, utterance: UtteranceTokens) -> list[int]:
    """The ids of an answer in speech that are given before the model goes on: its first words, and the mark.

    None where prosody comes first, which the model writes.
    """
    if task.answers != "speech" or task.answer_holds_prosody:
        return []
    first = takewhile(_is_given, task.turn(utterance).answer)
    return [*(i for part in first for i in _part_ids(vocabulary, task, part)), vocabulary.speech_id]


def _is_given(part: Part) -> bool:
    return isinstance(part, Text) and part.given


def _given_places(parts: Sequence[Part], pieces: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Which ids of an answer's parts are given: (L,) bool of each.

    Behind a given text, and behind prosody, that is the mark that opens speech.
    """
    before = False
    for part, piece in zip(parts, pieces, strict=True):
        given = np.full(len(piece), _is_given(part))
        if before and isinstance(part, Speech):
            given[0] = True
        before = _is_given(part) or isinstance(part, Prosody)
        yield given


def _part_ids(vocabulary: SpeechVocabulary, task: Task, part: Part) -> Sequence[int] | np.ndarray:
    if isinstance(part, Mark):
        return [vocabulary.mark_id(part.name)]
    if isinstance(part, Speech):
        return vocabulary.speech(_given(task, part.codes, "codes"))
    if isinstance(part, Prosody):
        return vocabulary.ids_from_prosody(_given(task, part.bins, "prosody"))
    return _given(task, part.ids, "text")


def _part_length(vocabulary: SpeechVocabulary, task: Task, part: Part) -> int:
    if isinstance(part, Mark):
        return 1
    if isinstance(part, Speech):
        return vocabulary.speech_length(_given(task, part.codes, "codes").shape[1])
    if isinstance(part, Prosody):
        return _given(task, part.bins, "prosody").size
    return len(_given(task, part.ids, "text"))


def _given(task: Task, value: np.ndarray | None, what: str) -> np.ndarray:
    if value is None:
        raise TaskError(f"task {task.name}: an utterance without {what}, which its sequence is made of")
    return value
