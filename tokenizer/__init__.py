"""The LM-SPT speech tokenizer (arXiv 2506.16738): waveform -> codes -> waveform."""

from tokenizer.loading import load_tokenizer
from tokenizer.model.configuration import LMSPTConfig
from tokenizer.model.modeling import LMSPTModel

__all__ = ["LMSPTConfig", "LMSPTModel", "load_tokenizer"]
