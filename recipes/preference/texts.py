"""The texts of a preference training: which are spoken to learn from, and which are held out to see what was learnt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError
from recipes.preference.config import Config
from slm.corpus import CodedCorpus
from slm.vocabulary import SpeechVocabulary
from tokenizer.data.utterances import DataError, text_of


@dataclass(frozen=True)
class Text:
    """A text to be spoken: as it was written, and as it stands in the prompt."""

    id: str
    written: str
    said: str


@dataclass(frozen=True)
class Texts:
    """The texts to learn from and the held-out ones; no text is both, none occurs twice.

    `left_out` counts those that hold no word, or are longer than any that the model was trained on.
    """

    train: list[Text]
    held_out: list[Text]
    left_out: int


def read_texts(config: Config, vocabulary: SpeechVocabulary) -> Texts:
    """The texts of a corpus or a file; the same in every run.

    Raises:
        ConfigError: There are none, or too few to hold some out.
        CorpusError: The corpus cannot be read.
    """
    source, train, valid = _read(config)
    known, say = vocabulary.trained_on, get_normaliser(vocabulary.normaliser_of_prompts)
    score, left_out = get_normaliser(config.normaliser), 0

    def sayable(texts: Iterable[tuple[str, str]]) -> list[Text]:
        nonlocal left_out
        found: dict[str, Text] = {}
        for text_id, written in texts:
            said = say(written)
            if not said.strip() or not score(written) or (known is not None and len(said) > known.longest_text):
                left_out += 1
            else:
                found.setdefault(said, Text(text_id, written, said))
        return list(found.values())

    training, held_out = sayable(train), _some(sayable(valid), config.eval_texts)
    if not held_out:
        if len(training) <= config.eval_texts:
            raise ConfigError(
                f"eval_texts: {source} has {len(training)} texts that can be said, of which {config.eval_texts} are to "
                "be held out: give more texts, or lower eval_texts"
            )
        held_out = _some(training, config.eval_texts)
    taken = {text.said for text in held_out}
    training = [text for text in training if text.said not in taken]
    if not training:
        raise ConfigError(
            f"{source}: no text is left to learn from ({left_out} hold no word or are longer than the model's training "
            f"texts, {len(held_out)} are held out): give other texts, or lower eval_texts"
        )
    return Texts(_some(training, config.limit), held_out, left_out)


def _some(texts: list[Text], most: int | None) -> list[Text]:
    """So many of the texts, chosen at random and always the same, in their order; None: all."""
    chosen = np.random.default_rng(0).permutation(len(texts))[:most]
    return [texts[i] for i in sorted(chosen)]


def _read(config: Config) -> tuple[str, list[tuple[str, str]], list[tuple[str, str]]]:
    """Where the texts are from, and (id, text) of those to learn from and of a valid split."""
    if config.corpus:
        corpus = CodedCorpus.open(config.corpus)
        if not corpus.count("train"):
            raise ConfigError(f"corpus {corpus.folder}: no train split (it has {', '.join(corpus.splits)})")
        splits = [
            [(row["id"], row["text"]) for row in (corpus.rows(split) if corpus.count(split) else ())]
            for split in ("train", "valid")
        ]
        return f"corpus {corpus.folder}", *splits
    if not config.texts:
        raise ConfigError("nothing to say: give corpus=... (the run_dir of `slm encode`) or texts=FILE, one a line")
    path = Path(config.texts).expanduser()
    try:
        lines = text_of(path).split("\n")
    except DataError as error:
        raise ConfigError(f"texts: {error}") from None
    except OSError as error:
        raise ConfigError(f"texts: {path} cannot be read ({error})") from error
    return f"texts {path}", [(f"line-{number}", line) for number, line in enumerate(lines, 1) if line.strip()], []
