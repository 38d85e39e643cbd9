"""Codes, prosody, marks and text <-> the ids of an LLM.

Shapes: K codebooks of the tokenizer, n of them used (the first ones), F frames; codes (K, F), speech ids (F * n,), or
(T, n) with the patterns `delay`, T = F + n - 1, and `parallel`, T = F (:mod:`slm.patterns`): ids of book 0, and codes
of the further books beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from slm.patterns import EMPTY, Delayed, Interleaved, Pattern
from slm.prosody import ProsodyBins
from slm.text_tokens import added_ids, own_pieces, special_ids
from slm.trained_on import TrainedOn
from slm.vocabulary.file import FILE_NAME, damaged, read_fields, write_fields
from slm.vocabulary.groups import MARKS, PROSODY, SPEECH, SPEECH_END, Group, VocabularyError, laid_out


@dataclass(frozen=True)
class SpeechVocabulary:
    """(codebook, code) <-> LLM id, the marks' ids, and the fixed ids around a prompt.

    Args:
        codebook_sizes: Entries of the codebooks whose codes are ids, book 0 first. With n > 1 such books a frame is n
            ids, book by book.
        first_id: The first new id, which is the number of the text tokenizer's own ids.
        end_id: The id that ends an answer: the chat template's end of turn, or the tokenizer's eos.
        before: Ids in front of a prompt (bos, or the chat template's opening of the user turn).
        between: Ids between prompt and answer (the chat template's change of turn).
        fingerprint: The speech tokenizer's fingerprint.
        frame_rate: Its frames per second.
        tokenizer: The name or folder it was loaded from.
        precision: The arithmetic its encoder ran in, which the fingerprint includes.
        normaliser: Name of what was done to the training texts that the model writes.
        prompt_normaliser: Name of what was done to those that it reads, and is done to a text to be spoken; "": the
            same.
        trained_on: What the training's utterances were like; None where the model was saved without.
        added: Groups behind the books, in the order in which they came: (name, names of its tokens).
        further_sizes: Entries of the books 1, 2, ... that stand beside book 0 (patterns `delay`, `parallel`): they have
            no ids but tables of their own (:mod:`slm.model.further_books`).
        late: Frames that each of these is later than the one before: 1 with `delay`, 0 with `parallel`.
        prosody: Where words' prosody is cut into bins, whose tokens are the group `prosody`; None: there is none.
    """

    codebook_sizes: tuple[int, ...]
    first_id: int
    end_id: int
    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    fingerprint: str = ""
    frame_rate: float = 12.5
    tokenizer: str = ""
    precision: str = "fp32"
    normaliser: str = "none"
    prompt_normaliser: str = ""
    trained_on: TrainedOn | None = None
    added: tuple[tuple[str, tuple[str, ...]], ...] = ()
    further_sizes: tuple[int, ...] = ()
    late: int = 1
    prosody: ProsodyBins | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prosody, dict):  # as JSON gives it back
            object.__setattr__(self, "prosody", ProsodyBins(**self.prosody))
        if isinstance(self.trained_on, dict):  # as JSON gives it back
            object.__setattr__(self, "trained_on", TrainedOn(**self.trained_on))
        object.__setattr__(self, "added", tuple((name, tuple(tokens)) for name, tokens in self.added))
        for name in ("codebook_sizes", "further_sizes", "before", "between"):
            object.__setattr__(self, name, tuple(int(value) for value in getattr(self, name)))
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise VocabularyError(f"codebook_sizes: {self.codebook_sizes} must be one positive size per codebook used")
        if self.further_sizes and (len(self.codebook_sizes) > 1 or min(self.further_sizes) < 1):
            raise VocabularyError(f"further_sizes: {self.further_sizes} must be positive, beside book 0 alone")

    @property
    def normaliser_of_prompts(self) -> str:
        """Name of what is done to a text before the model reads it."""
        return self.prompt_normaliser or self.normaliser

    @property
    def book_sizes(self) -> tuple[int, ...]:
        """Entries of all codebooks used, book 0 first."""
        return self.codebook_sizes + self.further_sizes

    @property
    def n_codebooks(self) -> int:
        return len(self.book_sizes)

    @property
    def ids_per_frame(self) -> int:
        """Positions of a sequence that a frame takes."""
        return len(self.codebook_sizes)

    @property
    def pattern(self) -> Pattern:
        """How the codes of a frame come in the sequence."""
        return Delayed(self.n_codebooks, self.late) if self.further_sizes else Interleaved(self.n_codebooks)

    @property
    def ends_late(self) -> bool:
        """Whether further books go on behind book 0, beside marks of the end (`delay`)."""
        return bool(self.further_sizes) and self.late > 0

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Every group by name, in id order."""
        return laid_out(self.first_id, self.codebook_sizes, self.added)

    @cached_property
    def _mark_ids(self) -> dict[str, int]:
        marks = (group for name, group in self.groups.items() if not name.startswith("book "))
        return {token: i for group in marks for token, i in zip(group.tokens, group.ids, strict=True)}

    def mark_id(self, name: str) -> int:
        """The id of a mark, such as `<|transcribe|>`.

        Raises:
            VocabularyError: The vocabulary has no such mark.
        """
        if name not in self._mark_ids:
            raise VocabularyError(f"the speech vocabulary has no {name}; it has {', '.join(self._mark_ids)}")
        return self._mark_ids[name]

    @property
    def speech_id(self) -> int:
        return self.mark_id(SPEECH)

    @property
    def speech_end_id(self) -> int:
        return self.mark_id(SPEECH_END)

    @property
    def offsets(self) -> np.ndarray:
        """(n,) int64: the id of code 0 of each codebook used."""
        return self.first_id + len(MARKS) + np.concatenate([[0], np.cumsum(self.codebook_sizes)[:-1]]).astype(np.int64)

    def speech_ids(self) -> list[np.ndarray]:
        """The ids of each codebook used, (size,) int64 in the order of its codes."""
        return [offset + np.arange(n) for offset, n in zip(self.offsets, self.codebook_sizes, strict=True)]

    @property
    def speech_rows(self) -> slice:
        """The ids from the marks' first to the last code's: all that an answer in speech is made of is among them."""
        return slice(self.first_id, int(self.offsets[-1]) + self.codebook_sizes[-1])

    @property
    def size(self) -> int:
        """Ids in all, text and speech: the least number of rows that an embedding table needs."""
        return next(reversed(self.groups.values())).ids.stop

    @property
    def new_ids(self) -> list[int]:
        """Every id that is not the text tokenizer's own."""
        return list(range(self.first_id, self.size))

    def token_names(self) -> list[str]:
        """Names of the new ids, in id order."""
        return [token for group in self.groups.values() for token in group.tokens]

    def with_group(self, name: str, tokens: Sequence[str]) -> SpeechVocabulary:
        """This vocabulary and one group more, behind all ids that there are.

        Raises:
            VocabularyError: The name or a token is taken.
        """
        taken = [token for token in tokens if token in set(self.token_names())]
        if name in self.groups or taken or len(set(tokens)) < len(tokens):
            raise VocabularyError(f"group {name!r}: its name or {', '.join(taken) or 'one of its tokens'} is taken")
        return replace(self, added=(*self.added, (name, tuple(tokens))))

    def ids_from_codes(self, codes: np.ndarray) -> np.ndarray:
        """(K, F) codes -> (F * n,) int64 ids, by arithmetic; with `delay` (F + n - 1, n), with `parallel` (F, n).

        There the first column holds book 0's ids, and the mark of the end once its frames are over; the others hold the
        further books' codes, `EMPTY` where there is none.

        Raises:
            VocabularyError: Fewer codebooks than this vocabulary uses, or a code outside its book.
        """
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[0] < self.n_codebooks:
            raise VocabularyError(f"codes of shape {codes.shape}: expected (K, F) with K >= {self.n_codebooks}")
        used = codes[: self.n_codebooks].astype(np.int64)
        if used.size and (used.min() < 0 or (used.max(axis=1) >= np.asarray(self.book_sizes)).any()):
            raise VocabularyError(
                f"a code lies outside its codebook (sizes {self.book_sizes}); cut padding (-1) off first"
            )
        if not self.further_sizes:
            return self.pattern.apply(used + self.offsets[:, None])[:, 0]
        grid = self.pattern.apply(used)
        grid[:, 0] = np.where(grid[:, 0] == EMPTY, self.speech_end_id, grid[:, 0] + self.offsets[0])
        return grid

    def speech(self, codes: np.ndarray) -> np.ndarray:
        """A stretch of speech between its marks: the ids of (K, F) codes and the marks', shaped as theirs.

        Raises:
            VocabularyError: As :meth:`ids_from_codes`.
        """
        ids = self.ids_from_codes(codes)
        start, end = self.widened([self.speech_id]), self.widened([self.speech_end_id])
        return np.concatenate([start, ids] if self.ends_late else [start, ids, end])  # which holds its end already

    def speech_length(self, n_frames: int) -> int:
        """Positions of :meth:`speech`."""
        return 1 + self.pattern.positions(n_frames) + (not self.ends_late)

    def widened(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(T,) ids of marks or text, shaped as those of speech: with books beside (T, n), without their codes."""
        ids = np.asarray(ids, dtype=np.int64)
        if not self.further_sizes or ids.ndim == 2:
            return ids
        return np.concatenate([ids[:, None], np.full((len(ids), len(self.further_sizes)), EMPTY)], axis=1)

    def codes_from_ids(self, ids: Sequence[int] | np.ndarray, further: np.ndarray | None = None) -> np.ndarray:
        """(F * n,) ids -> (n, F) int64 codes; a last frame that is cut short is left out.

        Args:
            ids: Of the answer; with books beside (F,) of book 0.
            further: The codes (T, n - 1) of books beside, T > F where book 0 has ended and they have not (`delay`).

        Raises:
            VocabularyError: An id is no code of the book due at its place.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if self.further_sizes:
            own = ids - self.offsets[0]
            grid = np.full((len(further), self.n_codebooks), EMPTY, dtype=np.int64)
            grid[: len(own), 0], grid[:, 1:] = own[: len(further)], further
            codes = self.pattern.undo(grid[: self.pattern.positions(len(own))])
        else:
            codes = self.pattern.undo(ids[:, None]) - self.offsets[:, None]
        if codes.size and ((codes < 0) | (codes >= np.asarray(self.book_sizes)[:, None])).any():
            raise VocabularyError("ids that are not speech tokens of the codebook due at their place")
        return codes

    def prosody_ids(self) -> list[np.ndarray]:
        """The ids of each feature of prosody, (bins,) int64 in the order of its bins.

        Raises:
            VocabularyError: The vocabulary has no prosody.
        """
        if self.prosody is None:
            raise VocabularyError("the speech vocabulary has no prosody tokens; fine-tune the model on tts-prosody")
        first, sizes = self.groups[PROSODY].first_id, self.prosody.sizes
        return [first + sum(sizes[:feature]) + np.arange(size) for feature, size in enumerate(sizes)]

    def ids_from_prosody(self, bins: np.ndarray) -> np.ndarray:
        """(W, 3) bins -> (W * 3,) int64 ids, word by word.

        Raises:
            VocabularyError: A bin lies outside its feature, or the vocabulary has no prosody.
        """
        bins, ids = np.asarray(bins, dtype=np.int64), self.prosody_ids()
        if bins.ndim != 2 or bins.shape[1] != len(ids):
            raise VocabularyError(f"prosody of shape {bins.shape}: expected (W, {len(ids)})")
        if bins.size and (bins.min() < 0 or (bins >= [len(own) for own in ids]).any()):
            raise VocabularyError(f"a bin of prosody lies outside its feature (sizes {self.prosody.sizes})")
        return (bins + [own[0] for own in ids]).ravel()

    def prosody_from_ids(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(W * 3,) ids, each of the feature due at its place -> (W, 3) int64 bins."""
        features = self.prosody_ids()
        return np.asarray(ids, dtype=np.int64).reshape(-1, len(features)) - [own[0] for own in features]

    def encode_text(self, text_tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
        """A user's text -> (T,) int64 ids of plain text, whatever it spells: no mark, no speech token, no special
        token, nor one that was added to the tokenizer's own for another purpose (`<tool_call>`).

        Raises:
            VocabularyError: The text tokenizer makes a special id of plain text all the same.
        """
        ids = np.asarray(
            text_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], dtype=np.int64
        )
        if added_ids(text_tokenizer).intersection(ids.tolist()):
            ids = own_pieces(text_tokenizer, text)
        reserved = {self.end_id, text_tokenizer.bos_token_id, text_tokenizer.eos_token_id}
        if ids.size and (ids.max() >= self.first_id or reserved & set(ids.tolist())):
            raise VocabularyError(
                f"the text tokenizer turns {text[:60]!r} into a special token though told to split it; "
                "use a model whose tokenizer is a fast one (tokenizer.json)"
            )
        return ids

    def text_ids(self, text_tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        """(T,) int64: the ids that may stand in a transcript: the text tokenizer's own less special and added ones."""
        own = {i for i in text_tokenizer.get_vocab().values() if i < self.first_id}
        return np.asarray(sorted(own - special_ids(text_tokenizer) - added_ids(text_tokenizer)), dtype=np.int64)

    def check_text_tokenizer(self, text_tokenizer: PreTrainedTokenizerBase) -> None:
        """Compares every new id with the text tokenizer's.

        Raises:
            VocabularyError: A name is missing there or has another id.
        """
        if (wrong := self.first_difference(text_tokenizer)) is not None:
            name, expected, found = wrong
            raise VocabularyError(
                f"{FILE_NAME} gives {name} the id {expected}, the text tokenizer {found}: they are not from one "
                "model; take both from the folder that `slm finetune` wrote"
            )

    def first_difference(self, text_tokenizer: PreTrainedTokenizerBase) -> tuple[str, int, int | None] | None:
        """The first new name whose id in the text tokenizer is another: (name, our id, its id)."""
        known = text_tokenizer.get_vocab()
        names = zip(self.token_names(), self.new_ids, strict=True)
        return next(((name, i, known.get(name)) for name, i in names if known.get(name) != i), None)

    def check_fingerprint(self, fingerprint: str, what: str) -> None:
        """Refuses a tokenizer or corpus of other codes.

        Raises:
            VocabularyError: The fingerprints differ. `what` names the offender.
        """
        if fingerprint != self.fingerprint:
            raise VocabularyError(
                f"{what} has fingerprint {fingerprint}, the speech language model was trained on {self.fingerprint} "
                f"(tokenizer {self.tokenizer!r}): its codes mean something else. Use that tokenizer, at the "
                f"same precision, or "
                "fine-tune on this one's codes"
            )

    def save(self, folder: str | Path) -> Path:
        """Writes speech_vocabulary.json into a model folder."""
        return write_fields(folder, asdict(self), self.groups, self.pattern.name if self.further_sizes else None)

    @classmethod
    def load(cls, folder: str | Path, text_tokenizer: PreTrainedTokenizerBase | None = None) -> SpeechVocabulary:
        """Reads a model folder's vocabulary and, given its text tokenizer, checks the two against each other.

        Raises:
            VocabularyError: No such file, another format, or ids that differ.
        """
        fields = read_fields(folder)
        try:
            vocabulary = cls(**fields)
        except (TypeError, AttributeError, KeyError) as error:
            raise damaged(Path(folder) / FILE_NAME, error) from error
        if text_tokenizer is not None:
            vocabulary.check_text_tokenizer(text_tokenizer)
        return vocabulary
