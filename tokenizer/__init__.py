"""The LM-SPT speech tokenizer (arXiv 2506.16738): waveform -> codes -> waveform."""

from .checkpoints import load_tokenizer
from .configuration import LMSPTConfig
from .modeling import LMSPTModel

__all__ = ["LMSPTConfig", "LMSPTModel", "load_tokenizer"]
