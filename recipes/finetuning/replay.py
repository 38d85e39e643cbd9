"""Plain text that a fine-tuning goes on with, beside speech."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from recipes.config import ConfigError
from recipes.finetuning.config import Config
from slm.training.samples import TextSamples
from slm.vocabulary import SpeechVocabulary
from tokenizer.data.utterances import DataError, text_of

HELD_OUT = 50  # every fiftieth line of replayed text is for the valid loss
LONGEST_TEXT = 512  # tokens of a piece of it, where rows have no length


def replayed_text(
    config: Config, tokenizer: PreTrainedTokenizerBase, vocabulary: SpeechVocabulary, longest: int
) -> tuple[TextSamples | None, TextSamples | None]:
    """The texts of `replay` for training and for the valid loss. Raises ConfigError."""
    if config.replay is None:
        return None, None
    path = Path(config.replay.path).expanduser()
    try:
        lines = [line.strip() for line in text_of(path).split("\n")]
    except DataError as error:
        raise ConfigError(f"replay.path: {error}") from None
    except OSError as error:
        raise ConfigError(f"replay.path: {path} cannot be read ({error})") from error
    lines = [line for line in lines if line]
    if len(lines) < HELD_OUT:
        raise ConfigError(f"replay.path: {path} has {len(lines)} lines; {HELD_OUT} are the least, one of them held out")
    end = vocabulary.end_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    size = min(longest, config.training.pack_length or LONGEST_TEXT) - 2  # beside bos and eos

    def samples(chosen: list[str], repeat: float | None) -> TextSamples:
        ids = [vocabulary.encode_text(tokenizer, line) for line in chosen]
        pieces = [text[start : start + size] for text in ids for start in range(0, len(text), size)]
        return TextSamples(pieces, tokenizer.bos_token_id, end, config.replay.loss_weight, repeat)

    held_out = samples(lines[HELD_OUT - 1 :: HELD_OUT], None)
    kept = [line for number, line in enumerate(lines, start=1) if number % HELD_OUT]
    return samples(kept, config.replay.weight) if config.replay.loss_weight else None, held_out
