"""LM-SPT itself: configuration and presets, encoders, quantizers and decoders, and the model made of them.

Begin with `modeling.py` (encode, decode, resynthesize, forward). `configuration.py` explains every size, `presets.py`
names sets of them (`preset_table.py` shows them). `encoder.py`, `quantizer.py` and `decoder.py` are its parts: of
blocks in `layers.py` and `dac.py`, with `spectral.py` between waveform and spectrum, and of books in `book.py` and
`fsq.py`, whose use `code_use.py` counts. `first_weights.py` draws the weights of a start; `cpu_kernels.py` holds the
operations written by hand for CPUs.
"""
