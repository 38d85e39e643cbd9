"""What `slm transcribe` and `slm synthesize` share: the model with its tokenizer, and the predictions they write.

`long_recordings` and `long_texts` cut what is longer than a model was trained on; `batches` deals the work to processes
and keeps what is done; `speech_checks` looks for text that was not spoken. Of
`slm synthesize` alone: its keys (`synthesis_config`), the texts that it is to say (`texts_to_say`), what the model is
asked for each of them (`speech_requests`). Begin with `setup`.
"""
