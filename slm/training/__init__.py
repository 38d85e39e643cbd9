"""Training the LLM: `samples` into packed batches (`batches`, `packing`), and transformers' Trainer with exact resume
(`train`, `trainer`, `checkpoints`; `zero_checkpoints`: DeepSpeed's), set by `config`. The answers' loss is
`answer_loss`; what else is minimised: `objectives` (`delay`, `multi_token`, `alignment`) and `preference`.
`finite_steps` leaves out steps that are not finite. `text_lm` is a small text LM to begin from where no pretrained one
can be had, `small_models` the training of models beside the LLM.

Begin with `train`.
"""
