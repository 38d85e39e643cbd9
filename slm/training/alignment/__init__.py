"""Attention that follows the text: heads that learn, while an LLM learns to speak, to go through the text once and in
order. The loss and its prior (`forward_sum`), how the heads are read while the model runs (`attention_reader`), and
what is added to fine-tuning (`trainer`, asked for by `config`).

Begin with `trainer`.
"""
