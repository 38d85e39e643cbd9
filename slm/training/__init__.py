"""Training the LLM: `samples` into packed batches (`batches`, `packing`), and transformers' Trainer with exact resume
(`train`, `trainer`, `checkpoints`). What else than the answers' loss is minimised: `objectives`, `alignment`,
`preference`. `text_lm` is a small text LM to begin from where no pretrained one can be had.

Begin with `train`.
"""
