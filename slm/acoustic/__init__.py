"""The acoustic stage: a small model that adds to semantic codes what the other codebooks hold, in a recording's voice.

Of every objective: `configuration` and `layers` are the model's sizes and transformer, `samples` what it is trained on,
`training` its steps, `pieces` what it fills at once, `stages` the table of what differs, loading and filling.

Objective masked, which fills the codes themselves (SoundStorm, Borsos et al. 2023): `masking`, `masked_model`,
`masked_decoding` and `masked_scores`. Objectives flow (as CosyVoice), diffusion (as Diff-LM-Speech) and regression,
which predict what the codes add to the codec's latents: `latent_space`, `latent_model`, `latent_decoding`,
`latent_scores`; `paths` says what an objective is, and each has a file.
"""
