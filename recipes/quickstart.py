"""``slm quickstart``: the embedded models at three frame rates, from a corpus to a scored comparison.

A small corpus is synthesised; at 25, 12.5 and 6.25 Hz the embedded tokenizer encodes it, the embedded LLM is fine-tuned
on its codes for ASR and TTS together, and all is scored by the embedded recogniser: recordings, the tokenizer's three
ways back, and the SLM. With ``--train-tokenizer`` nothing embedded is used: a teacher, a tokenizer at 12.5 Hz and a
text LM are trained first (`quickstart/from-scratch`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recipes import compare
from recipes.config import ConfigError
from recipes.embedded import EmbeddedError


@dataclass
class Config(compare.Config):
    """A comparison like any other, with a folder of its own."""

    run_dir: str = "runs/quickstart"


def plan(config: Config) -> dict[str, object]:
    """The stages of each frame rate and where they stand; raises what is wrong in any stage's configuration."""
    try:
        return compare.plan(config)
    except EmbeddedError as error:
        raise _with_way_out(error) from error


def run(config: Config) -> Path:
    """Run every stage that is not complete; print the table; returns the report."""
    try:
        return compare.run(config)
    except EmbeddedError as error:
        raise _with_way_out(error) from error


def _with_way_out(error: EmbeddedError) -> ConfigError:
    return ConfigError(f"{error}\n`slm quickstart --train-tokenizer` needs none of them: it trains its own.")
