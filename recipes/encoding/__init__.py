"""Speech to codes, as `slm encode` and others need it.

`plan` deals utterances to batches and shards, `encoder` turns waveforms into codes, `skipped` lists what cannot be
used, `copies` tells varied copies apart. `books` are a corpus's codebooks, loaded again.
Begin with `encoder.encode_batch`.
"""
