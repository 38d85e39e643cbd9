"""Text: what is done to a reference and a transcript before they are compared (`normalisers`, `numerals`), and how the
differences are counted (`wer`: WER and CER, by jiwer).
"""
