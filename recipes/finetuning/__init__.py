"""What `slm finetune` does: its keys (config.py), the coded corpora (corpora.py) and their utterances (utterances.py),
the speech vocabulary (vocabulary.py), the sequences that it trains on (data.py) with replayed text (replay.py), what a
plan tells of them (estimates.py) and of the patterns of codes (pattern_costs.py), word errors while it trains
(measure.py), the steps that fit a budget of time (step_budget.py). The command itself is recipes/commands/finetune.py.
"""
