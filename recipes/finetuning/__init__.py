"""What `slm finetune` does: its keys (config.py), the coded corpora (corpora.py) and their utterances (utterances.py),
their columns of words and prosody (words.py, prosody.py), the speech vocabulary (vocabulary.py), the sequences that it
trains on (data.py) with replayed text (replay.py), what a plan tells of them (estimates.py) and of the patterns of
codes (pattern_costs.py), the steps that fit a budget of time (step_budget.py) or make exposures equal (exposure.py),
word errors and attention while it trains (measure.py, attention_picture.py), and what it leaves (results.py). The
command itself is recipes/commands/finetune.py.
"""
