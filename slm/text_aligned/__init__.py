"""Text-aligned speech tokens: one frame of K codes per word of the text, learnt by reconstruction.

After TASTE (Tseng et al. 2025, arXiv 2504.07053), as a layer on top of a speech tokenizer's semantic codes:
`configuration` and `modeling` are the model and its folder, `layers` and `aggregator` its parts, `text` how a text is
spelled, `samples` what it is trained on, `training` its steps, `evaluation` what the word codes add to the text,
`decoding` the way back to semantic codes.
"""
