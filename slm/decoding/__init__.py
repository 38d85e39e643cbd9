"""How answers are written, id after id: which rows are written when (`decode`, `running_batch`, `batching`), by what
rules (`row_rules`, `sampling`, `loops`, `legal_head`), what is kept of what was read (`attention_cache`), the books
beside the ids (`further_codes`), and several tokens at once (`multi_token`). `slm.generation` is what asks for them.
"""
