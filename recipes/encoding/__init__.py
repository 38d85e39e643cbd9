"""Speech to codes, as `slm encode` and others need it.

`plan` deals utterances to batches and shards, `encoder` turns waveforms into codes.
Begin with `encoder.encode_batch`.
"""
