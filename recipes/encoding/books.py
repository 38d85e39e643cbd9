"""The LM-SPT tokenizer that a coded corpus was made with, loaded again for the vectors of its codebooks."""

from __future__ import annotations

from recipes.config import ConfigError
from slm.corpus import CorpusMetadata
from tokenizer import LMSPTModel, load_tokenizer


def tokenizer_of_corpus(facts: CorpusMetadata, corpus: str, key: str, way_out: str) -> LMSPTModel:
    """Loads the tokenizer whose codes a corpus holds.

    Args:
        facts: The corpus's metadata.
        corpus: Its name, for messages.
        key: The configuration's key that asks for the codebooks.
        way_out: What can be done without them.

    Raises:
        ConfigError: It is no LM-SPT tokenizer, or is another by now.
    """
    tokenizer = load_tokenizer(facts.tokenizer)
    if not isinstance(tokenizer, LMSPTModel):
        raise ConfigError(f"{key}: {facts.tokenizer} is no LM-SPT tokenizer; encode with one, {way_out}")
    if tokenizer.fingerprint(facts.precision) != facts.fingerprint:
        raise ConfigError(f"{key}: {facts.tokenizer} is not what {corpus} was encoded with; {way_out}")
    return tokenizer
