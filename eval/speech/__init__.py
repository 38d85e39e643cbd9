"""Speech without words: reading and resampling (`audio`), and measures of a waveform against its recording, such as
STOI and PESQ (`quality`).
"""
