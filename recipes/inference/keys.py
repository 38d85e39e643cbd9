"""Keys that `slm transcribe`, `slm synthesize` and `slm generate` have alike."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from slm.embedded import DEFAULT_SPEECH_LM


def model_key() -> Any:
    """The field `model`: str."""
    about = "folder of a fine-tuned model (RUN_DIR/model of `slm finetune`), or an embedded one"
    return field(default=DEFAULT_SPEECH_LM, metadata={"help": about})


def wording_key() -> Any:
    """The field `wording`: str or None."""
    about = (
        "how the task is put in words, in front of the prompt; null: as the model was trained, by its first wording; "
        "empty: the task's marks alone"
    )
    return field(default=None, metadata={"help": about})


def language_key() -> Any:
    """The field `language`: str."""
    about = (
        "language of the answers (de, pt-BR), of a model that was trained with their tags; empty: as the data source's "
        "or corpus's column says"
    )
    return field(default="", metadata={"help": about})
