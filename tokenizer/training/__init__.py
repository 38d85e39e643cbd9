"""The training of the tokenizer: settings and state, one step, the loop around it.

Begin with `state.py` (CodecTrainingConfig, TrainState) and `step.py`; `objective.py` says what is minimised, `loop.py`
runs the steps, `health.py` watches them, `validation.py` scores crops of the valid split, `checkpoints.py`
keeps them; `initialisation.py` starts from another's weights.
`losses.py`, `discriminator.py` and `invariance.py` are the terms, `stft.py` the frames that both read, `revival.py` the
rule for dead entries, `parallel.py` is for several processes.
"""
