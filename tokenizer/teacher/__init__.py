"""The speech recognisers that teach: Whisper's encoder with its log-mel, the distillation losses, our own recogniser.

Begin with `distillation.py`, which says what is taught and how (`default_weight.py`: how much it counts); `whisper.py`
is the frozen teacher, `recogniser.py` and `recogniser_training.py` make a small one from scratch. `contrastive.py`
teaches by the text in a teacher's place.
"""
