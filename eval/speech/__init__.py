"""Speech without words. Begin with `measures/`: what can be measured of a waveform, alone or against its recording.

`quality` computes measures of clips and sums them up over a test set; `audio` resamples, cuts and levels waveforms.
"""
