"""The acoustic stage: a small model that fills codebooks 1..K-1 from the semantic codes and a few seconds of a voice.

Masked prediction in the manner of SoundStorm (Borsos et al. 2023, arXiv 2305.09636): `configuration` and `modeling` are
the model and its folder, `samples` and `masking` what it is trained on, `training` its steps, `evaluation` its accuracy
beside a unigram baseline, `decoding` the iterative parallel decoding.
"""
