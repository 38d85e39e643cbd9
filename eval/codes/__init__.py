"""Codes measured as codes, without a waveform: what they cost, how the books are used, what they tell of the text.

Begin with `statistics` (use and bitrate). `information` has entropy and mutual information, `characters` puts an
aligned text on code frames, `ngrams` is the small language model, `probe` the small recogniser, `robustness` compares
the codes of a recording with those of a changed one, and `measures` holds all that is known of one corpus.
"""

from eval.codes.statistics import BookStatistics, CodeStatistics, code_statistics, most_frames, nominal_bitrate

__all__ = ["BookStatistics", "CodeStatistics", "code_statistics", "most_frames", "nominal_bitrate"]
