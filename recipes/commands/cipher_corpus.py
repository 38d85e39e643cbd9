"""``slm cipher-corpus``: a manifest with the column `translation`, its texts word for word in a made-up language.

The result, ``run_dir/manifest.jsonl``, holds the same recordings; ``run_dir/lexicon.json`` is the whole language. The
tasks `st` and `mt` read the column (``slm encode data.0.columns=[translation]``). A column `translation` that the data
has already is not read: corpora with translations of their own need none of this.

Not here: word order, inflection, or words of several meanings, which make real translation hard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError, Problems
from recipes.runs.files import atomic_write_text
from recipes.runs.inputs import digest
from recipes.runs.logs import log
from recipes.runs.manifests import all_utterances, manifest_row, run_to_manifest
from recipes.runs.run_folder import RunFolder
from slm.tasks.st import TRANSLATION
from tokenizer.data.utterances import DataSource, Utterance

ONSETS, VOWELS = "bdfgjklmnprstvz", "aeiou"
SYLLABLES = tuple(onset + vowel for onset in ONSETS for vowel in VOWELS)


@dataclass
class Config:
    """Whose texts are translated, and into which language."""

    run_dir: str = field(default="runs/cipher", metadata={"help": "run folder; the result is its manifest.jsonl"})
    data: list[DataSource] = field(default_factory=list, metadata={"help": "manifests or folders, all their splits"})
    limit: int | None = field(default=None, metadata={"help": "only the first N utterances of each split"})
    normaliser: str = field(
        default="basic", metadata={"help": "what makes words of a text: basic (basic:de, ...), whisper-english, none"}
    )
    seed: int = field(default=0, metadata={"help": "of the language: another seed gives every word another one"})

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: {self.limit} must be at least 1, or null for all")
        if taken := [source.path for source in self.data if TRANSLATION in source.columns]:
            raise ValueError(f"data: {taken[0]}: columns names {TRANSLATION}, the column that this command writes")


def read_texts(config: Config) -> list[tuple[Utterance, str]]:
    """The utterances with a text and that text in words. Raises DataError, ConfigError."""
    normalise = get_normaliser(config.normaliser)
    read = [(row, normalise(row.text)) for row in all_utterances(config.data, config.limit)]
    spoken = [(row, text) for row, text in read if text]
    if not spoken:
        raise ConfigError("data: none of the utterances has a transcript to translate")
    if len(spoken) < len(read):
        log.warning("%d utterances without a transcript are left out", len(read) - len(spoken))
    return spoken


def plan(config: Config) -> dict[str, object]:
    """What would be translated; raises all that would stop it, together."""
    problems = Problems("slm cipher-corpus")
    problems.attempt(RunFolder(config.run_dir).check, config)
    read = problems.attempt(read_texts, config)
    problems.raise_all()
    lexicon = make_lexicon((word for _, text in read for word in text.split()), config.seed)
    return {
        "utterances": len(read),
        "words of the language": len(lexicon),
        "first text": read[0][1],
        "its translation": encipher(read[0][1], lexicon),
        "result": str(RunFolder(config.run_dir).path("manifest.jsonl")),
    }


def run(config: Config) -> Path:
    """Translate the corpus; returns the manifest."""
    return run_to_manifest(config, read_texts, fingerprint_of, "data", translated)


def fingerprint_of(config: Config, read: list[tuple[Utterance, str]]) -> str:
    """A hash of the texts."""
    return digest([json.dumps([row.id, text]) for row, text in read])


def translated(
    config: Config, read: list[tuple[Utterance, str]], folder: RunFolder
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The manifest's rows and their counts; the lexicon is written."""
    lexicon = make_lexicon((word for _, text in read for word in text.split()), config.seed)
    atomic_write_text(folder.path("lexicon.json"), json.dumps(lexicon, indent=1, ensure_ascii=False) + "\n")
    rows = [manifest_row(row, folder.folder, {TRANSLATION: encipher(text, lexicon)}) for row, text in read]
    return rows, {"utterances": len(read), "words": len(lexicon)}


def cipher_word(word: str, seed: int, attempt: int = 0) -> str:
    """A word of 2 to 4 syllables, the longer for longer words: a function of word, seed and attempt alone.

    >>> cipher_word("please", 0) == cipher_word("please", 0) != cipher_word("please", 1)
    True
    """
    drawn = int.from_bytes(hashlib.sha256(f"{seed}\0{attempt}\0{word}".encode()).digest(), "big")
    syllables = []
    for _ in range(2 + (len(word) > 3) + (len(word) > 6)):
        drawn, number = divmod(drawn, len(SYLLABLES))
        syllables.append(SYLLABLES[number])
    return "".join(syllables)


def make_lexicon(words: Iterable[str], seed: int) -> dict[str, str]:
    """One word of the made-up language for each word, no two the same and none a word of the source.

    Words are taken in alphabetical order, whatever order they come in. Where two would share a word, the later draws
    anew, so a lexicon of more words may name those few otherwise.
    """
    lexicon: dict[str, str] = {}
    wanted = sorted(set(words))
    taken = set(wanted)
    for word in wanted:
        attempt = 0
        while (made := cipher_word(word, seed, attempt)) in taken:
            attempt += 1
        lexicon[word] = made
        taken.add(made)
    return lexicon


def encipher(text: str, lexicon: Mapping[str, str]) -> str:
    """The text word for word, in its order.

    >>> encipher("set white", {"set": "bado", "white": "kuliza"})
    'bado kuliza'
    """
    return " ".join(lexicon[word] for word in text.split())
