"""Other tokenizers behind the codec protocol, and LM-SPT in its published layout.

Begin with `base.py`: a new codec is a subclass of `Codec` with `encode_frames` and `decode_frames`, made known by
`register_codec`; `transformers_codecs.py` has four short ones. A file that is put here is found by itself.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
