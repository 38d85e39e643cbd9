"""Speech tokenizers: waveform -> codes -> waveform. LM-SPT (arXiv 2506.16738), its training, and other codecs.

Begin with `load_tokenizer` (loading.py) and what every tokenizer can do (protocol.py). `model/` is LM-SPT itself,
`codecs/` the others; `data/`, `teacher/` and `training/` train it, `long_form/` reads recordings of any length.
"""

from tokenizer.loading import load_tokenizer
from tokenizer.model.configuration import LMSPTConfig
from tokenizer.model.modeling import LMSPTModel

__all__ = ["LMSPTConfig", "LMSPTModel", "load_tokenizer"]
