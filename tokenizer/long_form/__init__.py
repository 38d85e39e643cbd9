"""Recordings of any length, whole or as they come: encoding and decoding in chunks, and streaming.

Begin with `chunking.py`; `long_audio.py` reads files block by block, `streaming.py` is for causal tokenizers,
`lookahead.py` plays any other's codes as they come.
"""
