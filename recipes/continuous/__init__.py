"""Continuous-input ASR: how `slm finetune-continuous` trains it, and how `slm transcribe` runs it."""
