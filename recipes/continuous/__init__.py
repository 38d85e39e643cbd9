"""Continuous-input ASR: a frozen `encoder`, how `slm finetune-continuous` trains an LLM on its features (`training`),
and how `slm transcribe` runs it (`transcription`).
"""
