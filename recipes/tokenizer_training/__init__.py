"""What `slm train-tokenizer` is made of: its keys (config.py), the networks as the first step finds them (networks.py),
recordings and crops (data.py), teacher and what is minimised (objective.py). The command itself is
recipes/commands/train_tokenizer.py, the training loop tokenizer/training/loop.py.
"""
