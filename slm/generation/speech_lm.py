"""A fine-tuned model with its tokenizer and speech vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slm.model.modeling import load_llm
from slm.vocabulary import SpeechVocabulary, VocabularyError


@dataclass
class SpeechLM:
    """A fine-tuned model with its tokenizer and speech vocabulary, ready to generate."""

    model: PreTrainedModel
    text_tokenizer: PreTrainedTokenizerBase
    vocabulary: SpeechVocabulary

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", dtype: str = "fp32") -> SpeechLM:
        """Loads the folder that `slm finetune` wrote.

        Raises:
            VocabularyError: The folder is no speech language model.
            ModelError: It is no model at all.
        """
        model, text_tokenizer, vocabulary = load_llm(str(folder), dtype)
        if vocabulary is None:
            raise VocabularyError(
                f"{folder}: a text LM without speech_vocabulary.json; make a speech one with `slm finetune`"
            )
        return cls(model.to(device).eval(), text_tokenizer, vocabulary)
