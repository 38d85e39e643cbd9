"""LM-SPT itself: configuration and presets, encoders, quantizers and decoders, and the model made of them.

Begin with `modeling.py` (encode, decode, resynthesize, forward). `configuration.py` explains every size; `layers.py`
and `dac.py` hold the blocks, `cpu_kernels.py` the operations written by hand for CPUs.
"""
