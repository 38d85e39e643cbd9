"""The training of the tokenizer: settings and state, one step, the loop around it.

Begin with `state.py` (CodecTrainingConfig, TrainState) and `step.py`; `objective.py` says what is minimised, `loop.py`
runs the steps, `health.py` watches them, `checkpoints.py` keeps them; `initialisation.py`
starts from another's weights.
`losses.py` and `discriminator.py` are the terms, `stft.py` the frames that both read, `revival.py` the rule for dead
entries, `parallel.py` is for several processes.
"""
