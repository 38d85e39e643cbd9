"""New tokens for a text tokenizer: marks, speech tokens and prosody, behind all ids that it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from slm.patterns import LATE, PatternError, resolve_pattern
from slm.prompt_format import PromptFormatError, read_prompt_format
from slm.prosody import ProsodyBins
from slm.vocabulary.file import FILE_NAME
from slm.vocabulary.groups import PROSODY, SPEECH, VocabularyError
from slm.vocabulary.ids import SpeechVocabulary


def add_speech(
    text_tokenizer: PreTrainedTokenizerBase,
    codebook_sizes: Sequence[int],
    *,
    n_codebooks: int = 1,
    fingerprint: str = "",
    frame_rate: float = 12.5,
    tokenizer: str = "",
    precision: str = "fp32",
    normaliser: str = "none",
    prompt_normaliser: str = "",
    marks: Sequence[str] = (),
    pattern: str = "auto",
) -> SpeechVocabulary:
    """Adds the marks and speech tokens to a text tokenizer, in place, and says which ids they got.

    Args:
        text_tokenizer: The LLM's tokenizer.
        codebook_sizes: Sizes of all K codebooks of the speech tokenizer.
        n_codebooks: How many of them, from book 0 on, become speech tokens.
        fingerprint: The speech tokenizer's fingerprint.
        frame_rate: Its frames per second.
        tokenizer: Its name or folder.
        precision: The arithmetic of its encoder.
        normaliser: Name of what was done to the training texts that the model writes.
        prompt_normaliser: Name of what was done to those that it reads; "": the same.
        marks: Further marks that the tasks need.
        pattern: How the codes of a frame come in the sequence: `semantic`, `flatten`, `delay`, `parallel`; `auto`
            is one of the first two.

    Raises:
        VocabularyError: No such pattern with so many codebooks, the speech tokenizer has fewer codebooks, the names
            are taken, there is no end token, or the text tokenizer's ids have gaps.
    """
    if not 1 <= n_codebooks <= len(codebook_sizes):
        raise VocabularyError(f"n_codebooks: {n_codebooks}, but the speech tokenizer has 1 to {len(codebook_sizes)}")
    try:
        before, between, end_id = read_prompt_format(text_tokenizer)
        pattern = resolve_pattern(pattern, n_codebooks).name
    except (PromptFormatError, PatternError) as error:
        raise VocabularyError(str(error)) from error
    n_books = 1 if pattern in LATE else n_codebooks  # whose codes are ids
    vocabulary = SpeechVocabulary(
        codebook_sizes=tuple(codebook_sizes[:n_books]),
        further_sizes=tuple(codebook_sizes[n_books:n_codebooks]),
        late=LATE.get(pattern, 1),
        first_id=len(text_tokenizer),
        end_id=end_id,
        before=tuple(before),
        between=tuple(between),
        fingerprint=fingerprint,
        frame_rate=frame_rate,
        tokenizer=tokenizer,
        precision=precision,
        normaliser=normaliser,
        prompt_normaliser=prompt_normaliser,
    )
    if SPEECH in (taken := text_tokenizer.get_vocab()):
        raise VocabularyError(
            f"the text tokenizer already has {SPEECH}: the model has speech, but its folder lost {FILE_NAME}"
        )
    if (highest := max(taken.values())) >= len(text_tokenizer):
        raise VocabularyError(
            f"the text tokenizer's ids have gaps ({len(text_tokenizer)} tokens, highest id {highest}), so new tokens "
            "would get ids that text tokens have. Fill the gaps with placeholder tokens in the model folder's "
            "tokenizer.json, so that the ids run from 0 without a break, or take another model"
        )
    _add_tokens(text_tokenizer, vocabulary.token_names(), vocabulary)
    return add_marks(text_tokenizer, vocabulary, marks)


def add_marks(
    text_tokenizer: PreTrainedTokenizerBase, vocabulary: SpeechVocabulary, marks: Sequence[str]
) -> SpeechVocabulary:
    """Adds marks that a vocabulary lacks behind all ids that there are, to the text tokenizer in place too.

    Returns:
        The vocabulary with one group more, or the same where nothing is missing.
    """
    missing = [mark for mark in dict.fromkeys(marks) if mark not in set(vocabulary.token_names())]
    if not missing:
        return vocabulary
    number = sum(name.startswith("more marks") for name in vocabulary.groups)
    larger = vocabulary.with_group(f"more marks {number}", missing)
    _add_tokens(text_tokenizer, missing, larger)
    return larger


def add_prosody(
    text_tokenizer: PreTrainedTokenizerBase, vocabulary: SpeechVocabulary, bins: ProsodyBins
) -> SpeechVocabulary:
    """Adds the tokens of prosody behind all ids that there are, to the text tokenizer in place too.

    Raises:
        VocabularyError: The vocabulary has prosody already, or a name is taken.
    """
    larger = replace(vocabulary.with_group(PROSODY, bins.token_names()), prosody=bins)
    _add_tokens(text_tokenizer, bins.token_names(), larger)
    return larger


def _add_tokens(text_tokenizer: PreTrainedTokenizerBase, names: Sequence[str], vocabulary: SpeechVocabulary) -> None:
    # Special and not normalized: only so does split_special_tokens keep a user's text from matching them.
    text_tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    if (wrong := vocabulary.first_difference(text_tokenizer)) is not None:
        name, expected, found = wrong
        raise VocabularyError(
            f"the text tokenizer gave the new token {name} the id {found}, not {expected}, the one after its last: "
            "speech tokens need ids on end. Take a model whose tokenizer is a fast one (tokenizer.json)"
        )
