"""Other tokenizers behind the codec protocol, and LM-SPT in its published layout.

Begin with `base.py`: a new codec is a subclass of `Codec` with `encode_frames` and `decode_frames`, made known by
`tokenizer.loading.register_codec`; `transformers_codecs.py` has four short ones.
"""
