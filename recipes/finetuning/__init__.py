"""What `slm finetune` does: its keys (config.py), the sequences that it trains on (data.py), what a plan tells of them
(estimates.py), word errors while it trains (measure.py). The command itself is recipes/commands/finetune.py.
"""
