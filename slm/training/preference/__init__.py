"""Preference optimisation of an SLM's speech: DPO on pairs of answers (`dpo`), GRPO on groups of answers that are drawn
while it trains (`grpo`); what they minimise (`losses`), on which Trainer (`trainer`), and the frozen start they hold
the model against (`reference`).

Losses of our own on the Trainer of fine-tuning rather than TRL's trainers, because those (version 1.16 was read)
tokenise texts, where these prompts are ids, draw answers by `generate` from the process's random state, where these are
held to legal ids and must come out the same after a resume, and lay each sequence in a padded row, where these are
packed.

Begin with `dpo`.
"""
