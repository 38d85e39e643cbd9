"""Scores: text normalisers, WER / CER, judges, audio quality, code statistics, intervals, and the report.

This package knows nothing of the tokenizer, of the LLM or of the recipes: it takes texts, waveforms and arrays.
"""
