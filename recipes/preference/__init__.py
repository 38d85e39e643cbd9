"""What `slm train-preference` does: its keys (config.py), the texts (texts.py), answers drawn and judged (samples.py),
pairs of them for DPO (pairs.py), groups for GRPO (groups.py), and what is watched on held-out texts (held_out.py). The
command itself is recipes/commands/train_preference.py.
"""
